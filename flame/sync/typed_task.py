"""What a synchronous typed session makes: the future of a task, and what a task emits, with values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Generic, Self

from flame.client.task import Task
from flame.client.typed import TypedChunk, TypedTask
from flame.client.typed import TypedSession as AsyncTypedSession
from flame.errors import SchemaMismatch
from flame.sync.chunks import ChunkStream
from flame.sync.task import TaskHandle
from flame.typed.codec import I, O


class TypedHandle(Future[TypedTask[O]], Generic[O]):
    """A task that was created: a `concurrent.futures.Future` of the finished `flame.TypedTask`.

    `concurrent.futures.wait` and `concurrent.futures.as_completed` take it as any other. Its methods are those of
    `TaskHandle`. An output is read where it is asked for, never in the background.
    """

    def __init__(self, handle: TaskHandle, typed: AsyncTypedSession[I, O]) -> None:
        """Made by a typed session."""
        super().__init__()
        self.handle = handle
        """The same with bytes."""
        self._read: Callable[[Task], TypedTask[O]] = typed.read
        Future.add_done_callback(handle, self._on_end)

    @property
    def id(self) -> str:
        """The task's id."""
        return self.handle.id

    def result(self, timeout: float | None = None) -> TypedTask[O]:
        """Wait for the end and return the task with its ``output``; raises as `TaskHandle.result` does.

        Raises `SchemaMismatch` if the output is of another type.
        """
        return self._read(self.handle.result(timeout)).check()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return what `result` would raise; ``None`` if it would return the task."""
        error = self.handle.exception(timeout)
        if error is None:
            try:
                self.result()
            except SchemaMismatch as mismatch:
                return mismatch
        return error

    def finished(self, timeout: float | None = None) -> TypedTask[O]:
        """Wait for the end and return the task, however it ended. Raises only if nothing can be learned of it."""
        return self._read(self.handle.finished(timeout))

    def done(self) -> bool:
        """Whether the task has ended, or can't be waited for any more."""
        return self.handle.done()

    def cancel(self, reason: str = "") -> bool:
        """Give the task up, and tell whether it is cancelled for good; see `TaskHandle.cancel`."""
        return self.handle.cancel(reason)

    def cancelled(self) -> bool:
        """Whether the task ended by being cancelled."""
        return self.handle.cancelled()

    def running(self) -> bool:
        """Whether the task is known to run."""
        return self.handle.running()

    def add_done_callback(self, fn: Callable[[Future[TypedTask[O]]], object]) -> None:
        """Have a function called with this handle at the task's end; see `TaskHandle.add_done_callback`."""
        self.handle.add_done_callback(lambda _: fn(self))

    def __repr__(self) -> str:
        """Name the task and its state."""
        return f"<flame.sync.TypedHandle {self.handle.session_id}/{self.id} {self.handle.task.state.value}>"

    def _on_end(self, _: Future[Task]) -> None:
        """Be done, for those who wait for several futures: what comes of it is always asked of the other handle."""
        error = Future.exception(self.handle)
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(self._read(Future.result(self.handle)))


class TypedStream(Iterator[TypedChunk[O]]):
    """What one task emits, as it comes, with values; see `ChunkStream`. Made by `TypedSession.stream`."""

    def __init__(self, stream: ChunkStream, typed: AsyncTypedSession[I, O]) -> None:
        """Made by a typed session."""
        self.stream = stream
        """The same with bytes: it has the task, and cancels it."""
        self._typed = typed

    def __iter__(self) -> Self:
        """Return the iterator."""
        return self

    def __next__(self) -> TypedChunk[O]:
        """Return the next chunk, waiting for it."""
        return self.next()

    def next(self, timeout_s: float | None = None) -> TypedChunk[O]:
        """Return the next chunk, waiting for it no longer than ``timeout_s``; see `BlockingIterator.next`."""
        return self._typed.read_chunk(self.stream.next(timeout_s), self.stream)

    def close(self) -> None:
        """End the iteration; the task goes on. Idempotent."""
        self.stream.close()

    def __enter__(self) -> Self:
        """Have the task stored."""
        self.stream.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the iteration; the task goes on."""
        self.stream.__exit__(kind, error, traceback)
