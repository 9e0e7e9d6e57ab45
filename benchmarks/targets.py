"""What the project has set itself to reach on a machine with two cores. Each is written here once."""

from __future__ import annotations

from typing import Final

from benchmarks.figures import Target

THROUGHPUT: Final = Target(ratio_at_least=0.8, at_least=20_000)
"""Tasks a second of one session, durable, with exactly one result each."""
INVOKE_P50: Final = Target(ratio_at_most=1.3, at_most=0.5)
"""Milliseconds, one at a time."""
FIRST_RESULT_P50: Final = Target(at_most=15)
"""Milliseconds from the order of a session to its first result, from a template."""
FIRST_RESULT_P99: Final = Target(at_most=40)
SHORT_SESSIONS: Final = Target(at_least=100)
"""Sessions a second, created, used for one task and closed."""
IDLE_BYTES: Final = Target(at_most=8192)
"""Memory of broker and scheduler for an open session that has nothing to do."""
IDLE_CONSUMERS: Final = Target(at_most=0)
KILLED_TO_OTHER: Final = Target(at_most=10)
"""Milliseconds from an executor's death to its task on another one of the session."""
KILLED_TO_NEW: Final = Target(at_most=25)
"""The same where a new one has to be started."""
SPREAD: Final = Target(at_most=1.1)
"""Time that blocking tasks take over several executors, against the ideal."""
