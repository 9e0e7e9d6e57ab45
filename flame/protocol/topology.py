"""What the broker holds, as data: streams, buckets and consumers with their limits, and who may create them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from flame.protocol import defaults, subjects

UNLIMITED: Final = -1


class Retention(StrEnum):
    """When a stored message goes."""

    WORK = "work"
    """When it is acknowledged."""
    LIMITS = "limits"
    """When a limit is passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """A stream. All are kept in files; ages in seconds."""

    name: str
    subjects: tuple[str, ...]
    retention: Retention = Retention.LIMITS
    one_per_subject: bool = False
    """A second message on a subject is refused."""
    refuse_when_full: bool = False
    """At a limit new messages are refused; otherwise old ones go."""
    max_messages: int = UNLIMITED
    max_bytes: int = UNLIMITED
    max_age_s: float = 0.0
    """0: no limit."""
    direct: bool = False
    """Any replica may answer reads."""
    republish: tuple[str, str] | None = None
    """What is stored on the first subject is announced on the second."""
    message_ttl: bool = False
    """A message may be given a time to live of its own. Can't be taken back."""
    replicas: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSpec:
    """A key-value bucket. One value a key, kept in files."""

    name: str
    ttl_s: float = 0.0
    replicas: int = 1
    max_value_bytes: int = UNLIMITED


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerSpec:
    """A pull consumer on a stream, in the broker's memory."""

    stream: str
    name: str
    filter_subject: str
    ack_wait_s: float = defaults.ACK_WAIT_S
    max_waiting: int = 512
    replicas: int = 0
    """0: as the stream."""


def task_stream(application: str, replicas: int = 1) -> StreamSpec:
    """Return the stream of an application's waiting and running tasks; the control API creates it."""
    return StreamSpec(
        name=subjects.task_stream(application),
        subjects=(subjects.task(application, "*", "*"),),
        retention=Retention.WORK,
        one_per_subject=True,
        refuse_when_full=True,
        max_messages=defaults.WAITING_TASKS,
        max_bytes=defaults.WAITING_BYTES,
        replicas=replicas,
    )


def result_stream(application: str, replicas: int = 1) -> StreamSpec:
    """Return the stream of an application's terminal records; the control API creates it.

    Only its age limits it: a result can't be refused for want of room, and the first record of a task stays.
    """
    return StreamSpec(
        name=subjects.result_stream(application),
        subjects=(subjects.result(application, "*", "*"),),
        one_per_subject=True,
        refuse_when_full=True,
        max_age_s=defaults.RESULT_AGE_S,
        direct=True,
        republish=(
            subjects.result(application, "*", "*"),
            subjects.event(application, "{{wildcard(1)}}", "{{wildcard(2)}}", "done"),
        ),
        replicas=replicas,
    )


def log_stream(application: str, replicas: int = 1) -> StreamSpec:
    """Return the stream of what an application's services wrote; the control API creates it."""
    return StreamSpec(
        name=subjects.log_stream(application),
        subjects=(subjects.log(application, "*", "*"),),
        max_bytes=defaults.LOG_BYTES,
        max_age_s=defaults.LOG_AGE_S,
        replicas=replicas,
    )


def chunk_stream(application: str, replicas: int = 1) -> StreamSpec:
    """Return the stream of what an application's tasks emit while they run; the control API creates it.

    Every application has one, whether or not it emits anything: an executor may make none, and what a service does
    is not known before it does it.
    """
    return StreamSpec(
        name=subjects.chunk_stream(application),
        subjects=(subjects.chunk(application, "*", "*"),),
        max_bytes=defaults.CHUNK_BYTES,
        max_age_s=defaults.CHUNK_AGE_S,
        replicas=replicas,
    )


def blob_stream(application: str, replicas: int = 1) -> StreamSpec:
    """Return the stream of the parts of an application's large values; the control API creates it.

    No age limits it: an input lives as long as its task waits. What a session was given is removed when it has
    settled, outputs have a time to live. Nothing is dropped to make room: a part that is missing makes the value
    worthless. A part that is stored twice, since its acknowledgement was lost, is refused and there.
    """
    return StreamSpec(
        name=subjects.blob_stream(application),
        subjects=(subjects.all_blobs(application),),
        one_per_subject=True,
        refuse_when_full=True,
        direct=True,
        message_ttl=True,
        replicas=replicas,
    )


def application_streams(application: str, replicas: int = 1) -> tuple[StreamSpec, ...]:
    """Return every stream of an application, in the order of creation: nothing may be asked before it can be kept."""
    return (
        log_stream(application, replicas),
        chunk_stream(application, replicas),
        blob_stream(application, replicas),
        result_stream(application, replicas),
        task_stream(application, replicas),
    )


def session_consumer(
    application: str, session: str, epoch: int, max_executors: int, ack_wait_s: float = defaults.ACK_WAIT_S
) -> ConsumerSpec:
    """Return the consumer that a bound session's executors share; the scheduler creates and deletes it."""
    return ConsumerSpec(
        stream=subjects.task_stream(application),
        name=subjects.consumer(session, epoch),
        filter_subject=subjects.session_tasks(application, session),
        ack_wait_s=ack_wait_s,
        max_waiting=max(16, 2 * max_executors),
    )


def buckets(replicas: int = 1) -> tuple[BucketSpec, ...]:
    """Return the control plane's buckets, in the order of creation; the scheduler creates them.

    Nodes come last: a manager that can register its node finds everything else there.
    """
    names = (
        subjects.APPLICATIONS,
        subjects.SESSIONS,
        subjects.COMMON_DATA,
        subjects.CREDENTIALS,
        subjects.STATE,
        subjects.EXECUTORS,
        subjects.BINDINGS,
        subjects.NODES,
    )
    kept = tuple(BucketSpec(name=name, replicas=replicas) for name in names)
    attempts = BucketSpec(name=subjects.ATTEMPTS, ttl_s=defaults.RESULT_AGE_S, replicas=replicas)
    leases = BucketSpec(name=subjects.LEASES, ttl_s=defaults.LEADER_LEASE_S, replicas=replicas)
    return (leases, attempts, *kept)
