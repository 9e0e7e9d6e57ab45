"""On which terms a task runs: what it says itself, and otherwise its application. Functions of their arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

from flame.protocol import defaults
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import TaskFault, TaskOptions
from flame.protocol.supervision import Assignment


@dataclass(frozen=True, slots=True)
class Terms:
    """How one task is to be run."""

    timeout_s: float
    """How long a run may take; 0: as long as it likes."""
    expires_s: float
    """For how long after it was stored it is worth starting; 0: for ever."""
    delay_s: float
    """It is not started before this long after it was stored."""
    max_attempts: int
    """How often it may run if the service raises."""
    timed: bool = field(init=False)
    """It matters when the task was stored."""

    def __post_init__(self) -> None:
        """Find out once what is asked for every task."""
        object.__setattr__(self, "timed", self.expires_s > 0 or self.delay_s > 0)

    @classmethod
    def of(cls, assignment: Assignment, options: TaskOptions | None = None) -> Terms:
        """Return what a task's options say, and its application where they say nothing."""
        application = cls(assignment.timeout_s, assignment.expires_s, assignment.delay_s, assignment.max_attempts)
        if options is None:
            return application
        return cls(
            application.timeout_s if options.timeout_s is None else options.timeout_s,
            application.expires_s if options.expires_s is None else options.expires_s,
            application.delay_s if options.delay_s is None else options.delay_s,
            application.max_attempts if options.max_attempts is None else options.max_attempts,
        )

    def too_early_s(self, stored_at: float, now: float) -> float:
        """Return how much time has to pass before it may start; 0 if it may."""
        return max(0.0, stored_at + self.delay_s - now)

    def expired(self, stored_at: float, now: float) -> bool:
        """Whether it isn't worth starting any more."""
        return 0 < self.expires_s < now - stored_at


def may_retry(assignment: Assignment, terms: Terms, fault: TaskFault, raised: int, *, timeout: bool) -> bool:
    """Whether a task may run again: the service raised, or took too long, and had raised ``raised`` times before."""
    if raised + 1 >= terms.max_attempts or fault.code == ErrorCode.INVALID_ARGUMENT:
        return False  # an input that is refused once is refused each time
    return fault.type in assignment.retry_on or (not assignment.retry_on and not timeout)


def retry_pause_s(first_s: float, raised: int, chance: float) -> float:
    """Return for how long a task waits that the service has raised for ``raised`` times.

    It is doubled each time, up to `flame.protocol.defaults.BACKOFF_MAX_S` or ``first_s`` if that is more. ``chance``,
    from 0 to 1, says how much of its second half is waited: tasks that failed together are not to come back together.
    """
    full_s = min(first_s * 2.0 ** min(raised - 1, 60), max(first_s, defaults.BACKOFF_MAX_S))
    return full_s * (0.5 + chance / 2)
