"""A task that was created, as a `concurrent.futures.Future`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial

from flame.client.task import Task
from flame.client.task import TaskHandle as AsyncTaskHandle
from flame.errors import FlameError, TaskError, TimedOut
from flame.protocol.states import TaskState
from flame.sync.background import Background
from flame.sync.chunks import ChunkStream


class TaskHandle(Future[Task]):
    """A task that was created: a `concurrent.futures.Future` of the finished `flame.Task`.

    `concurrent.futures.wait` and `concurrent.futures.as_completed` take it as any other.
    """

    def __init__(self, background: Background, handle: AsyncTaskHandle, *, informed: bool) -> None:
        """Made by a session, in the background."""
        super().__init__()
        self._background = background
        self._handle = handle
        self._informed = informed
        background.outstanding.add(self)
        if handle.future.done():
            self._on_end(handle.future)
        else:
            handle.future.add_done_callback(self._on_end)

    @property
    def id(self) -> str:
        """The task's id."""
        return self._handle.id

    @property
    def session_id(self) -> str:
        """The id of its session."""
        return self._handle.session_id

    @property
    def application(self) -> str:
        """The name of its application."""
        return self._handle.application

    @property
    def task(self) -> Task:
        """The latest known state."""
        return self._handle.task

    def result(self, timeout: float | None = None) -> Task:
        """Wait for the end and return the task with its ``output``. What was given to an informer was heard by then.

        Args:
            timeout: How long to wait, in seconds. The task goes on after that.

        Raises:
            TaskFailed: The service raised, or the task was given up; `TaskTimeout` if it ran for too long.
            TaskCancelled: The task was cancelled.
            TaskExpired: It was not started in the time that it was worth starting in.
            TimedOut: ``timeout`` passed: a `TimeoutError`.
            BrokerUnavailable: The connection was closed: nothing more can be heard. The task goes on.
            WrongThread: This thread is needed for it to end.
        """
        self._check_may_wait()
        try:
            return super().result(timeout)
        except TimeoutError as error:
            raise self._timed_out(error, timeout) from None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return what `result` would raise; ``None`` if the task succeeded."""
        self._check_may_wait()
        try:
            return super().exception(timeout)
        except TimeoutError as error:
            raise self._timed_out(error, timeout) from None

    def finished(self, timeout: float | None = None) -> Task:
        """Wait for the end and return the task, however it ended. Raises only if nothing can be learned of it."""
        error = self.exception(timeout)
        if error is None:
            return self.result()
        if isinstance(error, TaskError):
            return error.task
        raise error

    def cancel(self, reason: str = "") -> bool:
        """Give the task up, whether it waits or runs, and tell whether it is cancelled for good.

        It is not if it had ended before. Raises as `flame.TaskHandle.cancel` does; whoever waits for a task that was
        cancelled gets `TaskCancelled`. What `asyncio.wrap_future` makes of a handle calls this when it is cancelled
        itself: shield that to leave the task alone.
        """
        return self._background.run(self._handle.cancel(reason)) is TaskState.CANCELLED

    def cancelled(self) -> bool:
        """Whether the task ended by being cancelled."""
        return self.done() and self.task.state is TaskState.CANCELLED

    def stream(self) -> ChunkStream:
        """Return what the task emits, from the start, whenever this is called; see `flame.TaskHandle.stream`."""
        return ChunkStream(self._background, self._handle.stream)

    def running(self) -> bool:
        """Whether the task is known to run."""
        return not self.done() and self.task.state is TaskState.RUNNING

    def add_done_callback(self, fn: Callable[[Future[Task]], object]) -> None:
        """Have a function called with this handle at the task's end, or now if that was.

        It is called on the thread on which informers are, never in the background: it may use the API.
        """
        super().add_done_callback(partial(self._call_back, fn))

    def __repr__(self) -> str:
        """Name the task and its state."""
        return f"<flame.sync.TaskHandle {self.session_id}/{self.id} {self.task.state.value}>"

    # ---- for the background

    def lose(self, error: FlameError) -> None:
        """Give the task up, if it has not ended: nothing more can be learned of it."""
        self._background.outstanding.discard(self)
        if not self.done():
            with suppress(InvalidStateError):  # it ends at this moment
                self.set_exception(error)

    def lose_by_fork(self, error: FlameError) -> None:
        """Give the task up in a process that was forked: whoever held its lock is not here."""
        super().__init__()
        self.set_exception(error)

    def _on_end(self, future: asyncio.Future[Task]) -> None:
        if self._informed:  # after everything that the informer is to hear
            self._background.callbacks.put(partial(self._settle, future))
        else:
            self._settle(future)

    def _settle(self, future: asyncio.Future[Task]) -> None:
        self._background.outstanding.discard(self)
        error = future.exception()
        if self._background.silent:
            return
        try:
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(future.result().check())
        except TaskError as failure:
            with suppress(InvalidStateError):
                self.set_exception(failure)
        except InvalidStateError:  # it was given up
            pass

    def _call_back(self, fn: Callable[[Future[Task]], object], _: Future[Task]) -> None:
        if self._background.is_here():
            self._background.callbacks.put(partial(fn, self))
        else:
            fn(self)

    def _check_may_wait(self) -> None:
        if self.done():
            return
        self._background.check()
        if self._informed:
            self._background.callbacks.check_elsewhere(f"task {self.id}")

    def _timed_out(self, error: TimeoutError, timeout: float | None) -> TimeoutError:
        if isinstance(error, FlameError) or timeout is None:
            return error
        return TimedOut(
            f"task {self.id} of session {self.session_id} has not ended after {timeout:g} s; it goes on: see get_task"
        )
