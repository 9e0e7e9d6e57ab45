"""What a service is, and what it is told about its session and its tasks."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flame.credentials import NO_SECRETS, Secrets
from flame.errors import ConfigurationError, InvalidArgument, TaskEnded

if TYPE_CHECKING:
    from flame.service.outlet import Outlet, RunOutlet
    from flame.service.state import State


def _none() -> Secrets:
    """Return one empty mapping for all: most tasks bring none."""
    return NO_SECRETS


@dataclass(frozen=True, slots=True)
class SessionContext:
    """The session that an executor serves."""

    session_id: str
    application: str
    common_data: bytes = b""
    """What the session was created with, or given since; ``b""`` if nothing. In a context that was kept this changes
    before `FlameService.on_common_data_update` is called."""
    common_data_version: int = 0
    """How often that was changed since the session was created."""
    credentials: Secrets = field(default_factory=_none, repr=False)
    """Secrets handed to the session's executors only: ``context.credentials["name"].reveal()``."""
    delegations: Secrets = field(default_factory=_none, repr=False)
    """On whose behalf the session acts: secrets, too."""
    _state: State | None = field(default=None, repr=False, compare=False)

    @property
    def state(self) -> State:
        """Values by key that the session's executors share, and that end with it."""
        if self._state is None:
            raise ConfigurationError("state: this context was not made by an executor, so it has none")
        return self._state

    def renew(self, common_data: bytes, version: int) -> None:
        """Take newer common data over. For executors; to services a context doesn't change otherwise."""
        object.__setattr__(self, "common_data", common_data)
        object.__setattr__(self, "common_data_version", version)


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
    credentials: Secrets = field(default_factory=_none, repr=False)
    """Secrets handed with this task: ``context.credentials["name"].reveal()``. The session's are in its own context."""
    delegations: Secrets = field(default_factory=_none, repr=False)
    """On whose behalf the task acts: secrets, too."""
    session: SessionContext | None = field(default=None, repr=False, compare=False)
    """The session, as `FlameService.on_session_enter` got it; ``None`` only in a context that was made by hand."""

    @property
    def state(self) -> State:
        """Values by key that the session's executors share, and that end with it."""
        if self.session is None:
            raise ConfigurationError("state: this context was not made by an executor, so it has none")
        return self.session.state

    outlet: Outlet | RunOutlet | None = field(default=None, repr=False, compare=False)
    """Set by the executor, for `emit` and `progress`."""

    def emit(self, chunk: bytes | str) -> Awaitable[None]:
        """Give those who listen a chunk of output now: ``await context.emit(chunk)``.

        Chunks are kept for as long as results (and up to 1 GiB of an application), so that who listens later gets them
        from the start. They are sent without waiting for one another, 256 at most: it waits only while the broker falls
        behind, never for those who listen. All are stored before the task's record is. A run after this one begins anew
        with its chunks. In a handler that is not ``async``, ``context.emit(chunk)`` does the same by itself.

        Args:
            chunk: Text is sent as UTF-8. At most 262,016 bytes.

        Raises:
            InvalidArgument: It is neither bytes nor text; `PayloadTooLarge` if it is too large.
            TaskEnded: The run has ended, or is to end now.
            BrokerUnavailable: A chunk could not be stored within 30 s.
        """
        return self._told("emit").of(self).emit(chunk)

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Tell how far the run is: informers and watches of the session hear of it.

        May be called as often as you like, in any handler: the first and the last are always sent, others ten times a
        second at most. Nothing waits for it, and nobody keeps it.

        Args:
            done: How much is done, in a unit of your own; from 0.
            total: How much there is to do, if you know.
            message: For people, at most 1000 characters.

        Raises:
            InvalidArgument: One of them can't be.
            TaskEnded: The run has ended, or is to end now.
        """
        self._told("progress").of(self).progress(done, total, message)

    async def output_of(self, task_id: str) -> bytes:
        """Return what another task of this session has returned: a task may be given the id of one instead of a value.

        It must have succeeded before: nothing waits for a task here, since that one might wait for this executor. No
        task of another session is found.

        Raises:
            TaskNotFound: There is no such task, it has not ended, or its result has aged out.
            TaskFailed: It failed; `TaskCancelled`, `TaskExpired` or `TaskTimeout` likewise.
            ValueGone: Its large output is not kept any more.
            InvalidName: ``task_id`` can be no id.
            BrokerUnavailable: It could not be read within 30 s.
        """
        return await self._told("output_of").output_of(task_id)

    def _told(self, what: str) -> Outlet | RunOutlet:
        if self.outlet is None:
            raise TaskEnded(f"{what}: task {self.task_id} does not run in an executor")
        return self.outlet


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

        It may be a generator, ``async`` or not: what it yields is emitted, see `TaskContext.emit`. Its output is what
        it returns; an ``async`` one can return nothing, so its output is empty. Nothing is kept twice.

        If it raises, this task fails with the exception's text; other tasks are not affected. An exception may have an
        attribute ``details`` of bytes, about as many as an output may hold: the client finds them in
        ``task.error.details``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no on_task_invoke")

    def on_common_data_update(self, context: SessionContext) -> Awaitable[None] | None:
        """Hear that the session's common data was changed: ``context.common_data`` is the new one.

        Called before the next task is begun, or at once where none runs; of changes that follow each other the last one
        may be all that is heard. With ``concurrency`` over 1 others may be running meanwhile. Executors that come later
        find it in `on_session_enter`. If it raises, this executor leaves the session, and another one enters it.
        """

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
