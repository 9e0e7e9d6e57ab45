"""Every default and limit, once. The unit is in the name."""

from __future__ import annotations

from typing import Final

from flame.protocol.resources import Resources

INLINE_LIMIT_BYTES: Final = 256 * 1024
"""The most that travels within a message, its envelope included; larger values go in parts."""
VALUE_LIMIT_BYTES: Final = 1024**3
"""The most an input, output or common data may hold."""
VALUE_PART_BYTES: Final = 1024 * 1024
"""Of a value that goes in parts, each; the last one may be shorter."""
VALUE_WINDOW: Final = 8
"""Parts of one value that are under way at once."""
VALUE_TIMEOUT_S: Final = 30.0
"""How long it is tried to store or read one part: longer than a broker's change of leader."""
VALUE_MISSING_S: Final = 5.0
"""How long a part that isn't found is looked for: a replica may be behind, or may have no contact."""
VALUE_ORPHAN_S: Final = 3600.0
"""Parts of a session that doesn't exist are kept for this long: it may be about to be created."""
MAX_PAYLOAD_BYTES: Final = 8 * 1024 * 1024
"""The server's largest message: room for API replies that list many things."""

RESULT_AGE_S: Final = 24 * 3600.0
VALUE_AGE_S: Final = RESULT_AGE_S + 3600.0
"""Of the parts of an output, which are stored before the record that names them."""
LOG_AGE_S: Final = 24 * 3600.0
LOG_BYTES: Final = 256 * 1024 * 1024
"""Of captured output, per application."""
CHUNK_AGE_S: Final = RESULT_AGE_S
"""As long as results: whoever learns of a task's end finds what it emitted."""
CHUNK_BYTES: Final = 1024**3
"""Of emitted chunks, per application; then the oldest go."""
CHUNK_WINDOW: Final = 256
"""Chunks of one run that the broker has not acknowledged yet: no chunk is stored further out of its order."""
EMIT_TIMEOUT_S: Final = 30.0
"""How long an executor keeps trying to store a chunk: longer than a broker's change of leader."""
PROGRESS_INTERVAL_S: Final = 0.1
"""Between two notifications of a run's progress at least; the first and the last are always sent."""
PROGRESS_MESSAGE: Final = 1000
"""Characters that the message of a progress may have."""
WAITING_TASKS: Final = 1_000_000
WAITING_BYTES: Final = 8 * 1024**3

ACK_WAIT_S: Final = 15.0
LEASE_EXTENSION_S: Final = 5.0
"""How often a lease is extended, with that ``ack_wait``; see `extension_s`."""
MANAGER_SILENCE_S: Final = 2.0
"""After this long without a sign of its manager, an executor keeps its leases itself, with that ``ack_wait``."""
LEASE_CERTAIN: Final = 0.8
"""The part of ``ack_wait`` during which a lease is certainly still held."""

TASK_TIMEOUT_S: Final = 3600.0
"""How long one run of a task may take."""
TASK_STOP_S: Final = 5.0
"""How long a run that was cancelled, or is over its time, may take to end before its process is ended."""
MAX_ATTEMPTS: Final = 1
RETRY_BACKOFF_S: Final = 0.1
"""Before the second run of a task that may be tried again; doubled each time up to `BACKOFF_MAX_S`."""
IDLE_TIMEOUT_S: Final = 24 * 3600.0
"""An open session without tasks is closed after this long."""
WEIGHT: Final = 1.0

POISON_LIMIT: Final = 3
"""A task that this many executors were lost with is given up."""

NODE_HEARTBEAT_S: Final = 1.0
NODE_UNKNOWN_S: Final = 5.0
NODE_GIVEN_UP_S: Final = 15.0

LEADER_LEASE_S: Final = 3.0
LEADER_RENEWAL_S: Final = 1.0

SESSION_RETRY_LIMIT: Final = 5
BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
READY_TIMEOUT_S: Final = 60.0
ENTER_TIMEOUT_S: Final = 300.0
LEAVE_TIMEOUT_S: Final = 10.0

DELAY_RELEASE_S: Final = 60.0
MIN_INSTANCES: Final = 0
MAX_INSTANCES: Final = 8
CONCURRENCY: Final = 1
PRIORITY: Final = 0
RESOURCES: Final = Resources(cpu=0.1, memory=128 * 1024**2, gpu=0)

PUBLISH_WINDOW: Final = 4096
"""Publishes of one client that the broker has not acknowledged yet."""
STORE_TIMEOUT_S: Final = 30.0
"""How long a client keeps trying to store a task: longer than a broker's change of leader."""
REQUEST_TIMEOUT_S: Final = 10.0
CONNECT_TIMEOUT_S: Final = 5.0
RECONCILE_FIRST_S: Final = 5.0
RECONCILE_MAX_S: Final = 60.0

RUNNING_NOTICE_S: Final = 0.1
"""A task that nobody listens for says that it runs only if it still does after this long."""


def manager_silence_s(ack_wait_s: float) -> float:
    """Return after which silence of its manager an executor keeps leases of ``ack_wait_s`` itself.

    Together with the time between two extensions this is less than a lease is certain for.
    """
    return ack_wait_s * MANAGER_SILENCE_S / ACK_WAIT_S


def extension_s(ack_wait_s: float) -> float:
    """Return how often a lease of ``ack_wait_s`` is extended: as many times in its life as the default one."""
    return ack_wait_s * LEASE_EXTENSION_S / ACK_WAIT_S
