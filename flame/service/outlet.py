"""Where a run tells of itself before it ends: what it emits, and how far it is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Generator, Mapping
from typing import TYPE_CHECKING, Any, Final

from flame.broker.seam import Broker
from flame.errors import TaskEnded
from flame.protocol import subjects
from flame.protocol.progress import check_progress
from flame.protocol.supervision import Assignment
from flame.service.chunks import ChunkWriter, chunk_bytes
from flame.service.outputs import output_of
from flame.service.progress import ProgressTeller, progress_of
from flame.service.running import Run

if TYPE_CHECKING:
    from flame.service.contexts import TaskContext


class Outlet:
    """What every context of an executor is given. A run that uses it gets one of its own."""

    def __init__(self, broker: Broker, assignment: Assignment, executor: str, runs: Mapping[str, Run]) -> None:
        """Serve the ``runs`` of one executor. Made in its loop."""
        self.broker = broker
        self.assignment = assignment
        self.executor = executor
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self._runs = runs
        self._opening = threading.Lock()

    async def output_of(self, task_id: str) -> bytes:
        """See `TaskContext.output_of`."""
        return await output_of(self.broker, self.assignment, task_id)

    def of(self, context: TaskContext) -> RunOutlet:
        """Return the one of a context's run. Raises `TaskEnded`."""
        with self._opening:  # two threads of a handler may come at once
            if context.outlet is not self and context.outlet is not None:
                return context.outlet.of(context)
            for run in tuple(self._runs.values()):
                if run.context is context and run.worker is not None:
                    opened = context.outlet = RunOutlet(self, run)
                    return opened
        raise TaskEnded(f"task {context.task_id} has ended: nothing can be told of it any more")


class RunOutlet:
    """What one run emits, and how far it is."""

    def __init__(self, outlet: Outlet, run: Run) -> None:
        """Made when the run uses it first, in any thread."""
        self._outlet = outlet
        self._run = run
        self.output_of = outlet.output_of
        application, session = outlet.assignment.application, outlet.assignment.session
        self._chunks = ChunkWriter(outlet.broker, subjects.chunk(application, session, run.task), run)
        event = subjects.event(application, session, run.task, "progress")
        self._progress = ProgressTeller(outlet.broker, event, outlet.loop)

    def of(self, _: TaskContext) -> RunOutlet:
        """Return this."""
        return self

    def emit(self, chunk: object) -> Awaitable[None]:
        """See `TaskContext.emit`."""
        data = chunk_bytes(chunk)
        if threading.get_ident() == self._outlet.thread:
            return self._chunks.write(data)
        self._chunks.write_from_thread(data, self._outlet.loop)
        return _DONE

    def progress(self, done: float, total: float | None, message: str) -> None:
        """See `TaskContext.progress`."""
        check_progress(done, total, message)
        self._chunks.check()
        self._progress.tell(progress_of(done, total, message, self._run.attempt, self._outlet.executor))

    async def finish(self) -> None:
        """Return when everything that was emitted is stored; raise why that can't be."""
        await self._chunks.finish()

    async def end(self) -> int:
        """Take no more, and return how many chunks were emitted."""
        count = await self._chunks.end()
        await self._progress.end()
        return count


class _Done:
    """Awaited, it is done: for handlers that are not ``async`` and await nothing."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


_DONE: Final = _Done()
