"""What a task emits while it runs, waited for."""

from __future__ import annotations

from collections.abc import Callable

from flame.client.chunks import Chunk
from flame.client.chunks import ChunkStream as AsyncChunkStream
from flame.client.task import Task
from flame.protocol.states import TaskState
from flame.sync.background import Background
from flame.sync.iterators import BlockingIterator


class ChunkStream(BlockingIterator[Chunk]):
    """What one task emits, from the start, as it comes; see `flame.ChunkStream`. Made by a session or a handle."""

    def __init__(self, background: Background, make: Callable[[], AsyncChunkStream]) -> None:
        """Made by a session or a handle: ``make`` is called in the background."""
        self._stream: AsyncChunkStream

        def source() -> AsyncChunkStream:
            self._stream = make()
            return self._stream

        super().__init__(background, source)

    @property
    def task(self) -> Task:
        """The latest known state. Raises `flame.InvalidArgument` before there is a task, see `flame.ChunkStream`."""
        return self._stream.task

    def cancel(self, reason: str = "") -> TaskState:
        """Give the task up and return the state that it then has for good; see `flame.ChunkStream.cancel`."""
        return self._background.run(self._stream.cancel(reason))
