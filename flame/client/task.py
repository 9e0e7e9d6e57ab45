"""What a client knows of a task, and how it is told."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flame.client.home import check_loop
from flame.errors import FlameError, TaskCancelled, TaskExpired, TaskFailed, TaskNotFound, TaskTimeout, ValueGone
from flame.logs import get_logger
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord, RunningEvent, TaskFault
from flame.protocol.progress import Progress
from flame.protocol.states import TaskState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from flame.client.chunks import ChunkStream
    from flame.client.outstanding import Outstanding
    from flame.protocol.records import SessionRecord

log = get_logger("flame.client")


@dataclass(slots=True)
class Task:
    """A task as a client last learned of it. A later state is another value; this one is not changed by Flame."""

    id: str
    session_id: str
    application: str
    state: TaskState
    output: bytes = b""
    """What the service returned; empty unless it succeeded."""
    error: TaskFault | None = None
    """Why it failed or was cancelled; of one that succeeded, why its large output can't be had (``value_gone``)."""
    executor: str = ""
    """Who runs or ran it."""
    attempt: int = 1
    started: float = 0.0
    """When its run began, Unix seconds by the executor's clock; 0 if it has not."""
    finished: float = 0.0
    """When its record was made, Unix seconds; 0 if there is none."""
    chunks: int = 0
    """How many chunks its last run emitted, once it has ended."""
    output_size: int = 0
    """How many bytes an output has that is too large for a message, over 256 KiB; 0: it isn't.

    ``output`` has them where the task was created or looked up here. Of tasks that were listed, or are others' and were
    watched, it stays empty: `Session.get_task` brings it.
    """

    def started_by(self, event: RunningEvent) -> Task:
        """Return the task once it runs."""
        return replace(self, state=TaskState.RUNNING, executor=event.executor, attempt=event.attempt, started=event.at)

    def check(self) -> Task:
        """Return the task if it succeeded; otherwise raise what its state means."""
        if (self.state is TaskState.SUCCEED and self.error is None) or not self.state.terminal:
            return self
        me = f"task {self.id} of session {self.session_id}"
        fault = self.error or TaskFault(ErrorCode.TASK_FAILED, "no reason was recorded")
        if self.state is TaskState.CANCELLED:
            raise TaskCancelled(f"{me} was cancelled: {fault.message}", self)
        if self.state is TaskState.SUCCEED:
            raise ValueGone(f"{me} succeeded, but its output is gone: {fault.message}", self)
        if fault.code == ErrorCode.TASK_EXPIRED:
            raise TaskExpired(f"{me}: {fault.message}", self)
        if fault.code == ErrorCode.TASK_TIMEOUT:
            raise TaskTimeout(f"{me} took too long: {fault.message}", self)
        kind = f"{fault.type}: " if fault.type else ""
        raise TaskFailed(f"{me} failed: {kind}{fault.message}", self)


class TaskInformer:
    """Hears of one task's changes. Override what you need; methods may be ``async``.

    A method that raises is logged and does no harm.
    """

    def on_update(self, task: Task) -> Awaitable[None] | None:
        """Hear of a state that the client learned of; of the terminal one exactly once."""

    def on_progress(self, task: Task, progress: Progress) -> Awaitable[None] | None:
        """Hear how far its run is, if the service tells; steps in between may be left out."""

    def on_error(self) -> Awaitable[None] | None:
        """Hear that the task failed or that its watch was lost; ``task.error`` of the last update says why."""


class Informing:
    """Calls an informer's methods in order, waiting for those that are ``async``."""

    def __init__(self, informer: TaskInformer) -> None:
        """Wrap an informer."""
        self._informer = informer
        self._queue: list[Callable[[], Awaitable[None] | None]] = []
        self._task: asyncio.Task[None] | None = None

    def update(self, task: Task) -> None:
        """Pass a state on; after a failure also the error."""
        self._put(lambda: self._informer.on_update(task))
        if task.state is TaskState.FAILED or (task.state is TaskState.SUCCEED and task.error is not None):
            self._put(self._informer.on_error)

    def progress(self, task: Task, progress: Progress) -> None:
        """Pass on how far the task is."""
        self._put(lambda: self._informer.on_progress(task, progress))

    def lost(self, task: Task) -> None:
        """Pass on that nothing more can be learned; ``task.error`` says why."""
        self._put(lambda: self._informer.on_update(task))
        self._put(self._informer.on_error)

    async def settled(self) -> None:
        """Wait until every call made so far has ended."""
        if self._task is not None:
            await asyncio.shield(self._task)

    def _put(self, call: Callable[[], Awaitable[None] | None]) -> None:
        self._queue.append(call)
        if self._task is None:
            pending = self._drain()
            if pending is not None:
                self._task = asyncio.get_running_loop().create_task(self._finish(pending))

    def _drain(self) -> Awaitable[None] | None:
        """Make the calls that are not ``async``; return the first one that is."""
        while self._queue:
            call = self._queue.pop(0)
            try:
                result = call()
            except Exception:
                log.exception("an informer raised")
                continue
            if inspect.isawaitable(result):
                return result
        return None

    async def _finish(self, pending: Awaitable[None] | None) -> None:
        try:
            while pending is not None:
                try:
                    await pending
                except Exception:
                    log.exception("an informer raised")
                pending = self._drain()
        finally:
            self._task = None


class TaskHandle:
    """A task that was created. Await it for the finished `Task`; a failed one raises `flame.TaskFailed`."""

    __slots__ = (
        "_informing",
        "_owner",
        "_storing",
        "_task",
        "application",
        "created",
        "future",
        "id",
        "payload",
        "session_id",
        "stored",
    )

    digest = b""
    """Of the input of one that was created under a key."""

    def __init__(
        self,
        task_id: str,
        record: SessionRecord,
        payload: bytes,
        loop: asyncio.AbstractEventLoop,
        informer: TaskInformer | None,
        owner: Outstanding,
    ) -> None:
        """Made by a session."""
        self.id = task_id
        self.session_id = record.id
        self.application = record.application
        self._task: Task | None = None
        self.payload = payload
        """The encoded task, until it is stored: what to send again."""
        self.created = loop.time()
        """The loop's time of creation."""
        self.stored = False
        """The broker has acknowledged it."""
        self.future: asyncio.Future[Task] = loop.create_future()
        self._storing: asyncio.Future[None] | None = None
        self._informing = None if informer is None else Informing(informer)
        self._owner = owner

    @property
    def task(self) -> Task:
        """The latest known state."""
        if self._task is None:
            self._task = Task(self.id, self.session_id, self.application, TaskState.PENDING)
        return self._task

    def done(self) -> bool:
        """Whether the task has ended, or can't be waited for any more."""
        return self.future.done()

    def __await__(self) -> Generator[Any, None, Task]:
        """Wait for the end; cancelling the wait leaves the task alone."""
        return self._wait().__await__()

    async def cancel(self, reason: str = "") -> TaskState:
        """Give the task up, whether it waits or runs, and return the state that it then has for good.

        That is another than `TaskState.CANCELLED` if it had ended before. A waiting task never runs; a running one is
        stopped, see `Session.cancel_tasks`. Whoever awaits a task that was cancelled gets `TaskCancelled`.

        Args:
            reason: For people; in the task's ``error.message``.

        Raises:
            TaskNotFound: The task's record has aged out.
            SchedulerUnavailable: No scheduler answers; it may have been cancelled.
        """
        if self.task.state.terminal:
            return self.task.state
        states = await self._owner.cancel([self.id], reason)
        if self.id not in states:
            raise TaskNotFound(f"session {self.session_id} has no task {self.id!r}, or its result has aged out")
        return states[self.id]

    def stream(self) -> ChunkStream:
        """Return what the task emits, from the start, whenever this is called; see `ChunkStream`."""
        return self._owner.stream(self)

    async def finished(self) -> Task:
        """Wait for the end and return the task, however it ended. Raises only if nothing can be learned of it."""
        try:
            task = self.future.result() if self.future.done() else await asyncio.shield(self.future)
        except RuntimeError:
            check_loop(f"the handle of task {self.id}", self.future.get_loop())
            raise
        if self._informing is not None:
            await self._informing.settled()
        return task

    async def _wait(self) -> Task:
        return (await self.finished()).check()

    def __repr__(self) -> str:
        """Name the task and its state."""
        return f"<TaskHandle {self.task.session_id}/{self.task.id} {self.task.state.value}>"

    # ---- for the session

    def when_stored(self) -> asyncio.Future[None] | None:
        """Return what is done when the task is stored and fails if it isn't; ``None`` if it is stored already."""
        if self.stored:
            return None
        self._storing = asyncio.get_running_loop().create_future()
        if self.future.done():
            self._settle_storing(self.future.exception())
        return self._storing

    def mark_stored(self, error: FlameError | None) -> None:
        """Note that the task is stored, or could not be."""
        if error is not None:
            self.lose(error)
        elif not self.stored:
            self.stored = True
            self.payload = b""
            if self._informing is not None:
                self._informing.update(self.task)
        self._settle_storing(error)

    def finish(self, record: ResultRecord) -> None:
        """Take the terminal record over, once."""
        self.learn(
            Task(
                self.id,
                self.session_id,
                self.application,
                record.state,
                record.output,
                record.error,
                record.executor,
                record.attempt,
                record.started,
                record.finished,
                record.chunks,
            )
        )

    def learn(self, task: Task) -> None:
        """Take a newer state over, once."""
        if self.future.done():
            return
        if not self.stored:
            self.mark_stored(None)  # what runs or has ended was stored, whether or not that was heard
        self._task = task
        if self._informing is not None:
            self._informing.update(task)
        if task.state.terminal:
            self.future.set_result(task)

    def note_progress(self, progress: Progress) -> None:
        """Pass on how far the task is, unless it has ended."""
        if self._informing is not None and not self.future.done():
            self._informing.progress(self.task, progress)

    def lose(self, error: FlameError) -> None:
        """Give the task up: nothing more can be learned of it."""
        if self.future.done():
            return
        self._task = replace(self.task, error=TaskFault(error.code, str(error), type(error).__name__))
        if self._informing is not None:
            self._informing.lost(self.task)
        self.future.set_exception(error)
        self.future.exception()  # whoever asked may be gone: no warning for that
        self._settle_storing(error)

    def _settle_storing(self, error: BaseException | None) -> None:
        if self._storing is None or self._storing.done():
            return
        if error is None:
            self._storing.set_result(None)
        else:
            self._storing.set_exception(error)
            self._storing.exception()
