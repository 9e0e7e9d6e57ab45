"""What a service is, and what it is told about its session and its tasks."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from flame.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class SessionContext:
    """The session that an executor serves."""

    session_id: str
    application: str
    common_data: bytes = b""
    """What the session was created with; ``b""`` if nothing."""
    credentials: dict[str, str] = field(default_factory=dict, repr=False)
    """Secrets handed to the session's executors only."""


_NONE: Final[Mapping[str, str]] = MappingProxyType({})


def _none() -> Mapping[str, str]:
    """Return one empty mapping for all: most tasks bring none."""
    return _NONE


@dataclass(slots=True)
class TaskContext:
    """One task."""

    session_id: str
    task_id: str
    input: bytes
    attempt: int = 1
    """1 for the first run; higher where the service raised before, or an executor was lost while running it."""
    deadline: float = 0.0
    """When the run is stopped if it has not ended, Unix seconds; 0: never."""
    cancelled: bool = False
    """Whether the run is to end now: its task was cancelled, its time is over, or its session is closed by force.

    For handlers that are not ``async``: nothing can interrupt them, so those that take long look at this now and then.
    In others the ``await`` raises `asyncio.CancelledError`. What either returns or raises then counts for nothing, and
    one that has not ended after a few seconds has its process ended.
    """
    credentials: Mapping[str, str] = field(default_factory=_none, repr=False)
    """Secrets handed with this task."""
    delegations: Mapping[str, str] = field(default_factory=_none, repr=False)
    """On whose behalf the task acts."""


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """What a task produced."""

    data: bytes = b""


class FlameService:
    """A service: override what you need. Methods may be ``async`` or not; those that are not run in a thread.

    One instance serves one session, in a process of its own.
    """

    def on_fork(self) -> None:
        """Renew what a copy of a process must not share with it: not ``async``, and quick.

        Called first of all in an executor that was forked from a template, which has loaded the service and made this
        instance once for all sessions; never in a process that was started for one. By itself Flame renews what the
        standard library and ``numpy.random`` draw random numbers from. Left to you are generators of your own (such
        as a ``numpy.random.Generator``), and ids and caches that should differ from session to session.
        If it raises, that counts as a failure of `on_session_enter`.
        """

    def on_session_enter(self, context: SessionContext) -> Awaitable[None] | None:
        """Prepare for a session, once, before its first task.

        If it raises it is tried again in a new executor, and in the end the session fails.
        """

    def on_task_invoke(self, context: TaskContext) -> Any:
        """Run one task and return its output: `TaskOutput`, ``bytes``, ``str`` (sent as UTF-8) or ``None``.

        If it raises, this task fails with the exception's text; other tasks are not affected. An exception may have an
        attribute ``details`` of bytes, about as many as an output may hold: the client finds them in
        ``task.error.details``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no on_task_invoke")

    def on_session_leave(self) -> Awaitable[None] | None:
        """Clean up after the last task. Bounded in time; a failure is logged."""


def output_bytes(output: object) -> bytes:
    """Return what a handler's return value means, or raise `InvalidArgument`."""
    if isinstance(output, TaskOutput):
        output = output.data
    if isinstance(output, bytes):
        return output
    if output is None:
        return b""
    if isinstance(output, str):
        return output.encode()
    if isinstance(output, bytearray | memoryview):
        return bytes(output)
    raise InvalidArgument(f"on_task_invoke returned {type(output).__name__}: expected TaskOutput, bytes, str or None")
