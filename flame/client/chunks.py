"""What a task emits while it runs, as a client hears it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker, StoredMessage
from flame.cancel import end_task
from flame.client.home import check_loop
from flame.errors import BrokerUnavailable, ChunksGone, FlameError, InvalidArgument, MalformedMessage, WrongThread
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.chunks import ChunkMessage, ChunkOrder, MissingChunk, RunKey
from flame.protocol.states import TaskState

if TYPE_CHECKING:
    from flame.client.outstanding import Outstanding
    from flame.client.task import Task, TaskHandle

log = get_logger("flame.client")

AHEAD: Final = 256
"""Chunks that are kept for a slow listener; then the broker is held back, and nobody else."""
LOOK_S: Final = 1.0
"""For how long the chunks of a task that has ended are waited for before it is asked whether they exist."""
PAUSE_S: Final = 0.5
"""Before the broker is asked again."""
CHECK_S: Final = 5.0
"""Between two looks whether somebody else of this client listens for the task's end now."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Something that a task emitted."""

    data: bytes
    attempt: int
    """Which run of the task it is of: a later one begins anew."""
    index: int
    """Its place among the chunks of its run. At 0 the output begins, or begins anew: what came before is void."""

    @property
    def text(self) -> str:
        """The data as text in UTF-8; what is none is replaced."""
        return self.data.decode("utf-8", "replace")


class ChunkStream(AsyncIterator[Chunk]):
    """What one task emits, from the start, as it comes. Made by `Session.stream` and others.

    Chunks come in order, each once, whatever happens to connections and executors. If the task is run again its output
    begins anew: the next chunk has the index 0 and another ``attempt``; if that run emits nothing at all while an
    earlier one did, one chunk without data says so. The iteration ends when the task has succeeded and everything was
    handed on; then ``task`` has its output. A failed task's ends with `TaskFailed`, a cancelled one's with
    `TaskCancelled`, after the chunks that there are. Who takes them slowly holds nobody up and loses none, unless they
    are not kept any more: that raises `ChunksGone`.

    The task goes on when the iteration is left; `cancel` gives it up. As an async context manager it ends with its
    block, and the task exists from its beginning on.
    """

    def __init__(
        self,
        tasks: Outstanding,
        find: Callable[[], Awaitable[TaskHandle]],
        release: Callable[[str], None] | None = None,
    ) -> None:
        """Made by a session.

        Args:
            tasks: Those of the session.
            find: Called once, to have the task stored or found.
            release: Called once with the task's id when nobody listens here any more.
        """
        self._tasks = tasks
        self._find = find
        self._release = release
        self._handle: TaskHandle | None = None
        self._kept: _Kept | None = None
        self._order = ChunkOrder()
        self._ready: deque[Chunk] = deque()
        self._ended: Task | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._complete = False
        """Every chunk was found; what is left is to say how the task has ended."""
        self._closed = False

    @property
    def task(self) -> Task:
        """The latest known state. Raises `InvalidArgument` before the iteration, or its block, has begun."""
        return self._begun().task

    async def cancel(self, reason: str = "") -> TaskState:
        """Give the task up and return the state that it then has for good; see `TaskHandle.cancel`."""
        return await self._begun().cancel(reason)

    async def __aenter__(self) -> Self:
        """Have the task stored, or found."""
        handle = await self._begin()
        stored = handle.when_stored()
        if stored is not None:
            await stored
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Listen no more."""
        await self.aclose()

    def __aiter__(self) -> Self:
        """Return the stream."""
        return self

    async def __anext__(self) -> Chunk:
        """Return the next chunk, waiting for it. A wait that is cancelled, as by a time limit, costs no chunk."""
        while not self._ready:
            if self._closed:
                raise StopAsyncIteration
            try:
                await self._go_on(self._handle or await self._begin())
            except WrongThread:
                raise
            except Exception as error:
                if isinstance(error, RuntimeError) and self._handle is not None:
                    self._check_loop(self._handle)  # asyncio has complained of another loop
                await self.aclose()
                raise
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Listen no more: the iteration ends. Idempotent. The task goes on."""
        self._closed = True
        self._ready.clear()
        kept, self._kept = self._kept, None
        await end_task(self._restarting)
        if kept is not None:
            await kept.stop()
        self._let_go()

    def __del__(self) -> None:
        """Listen no more, since nobody iterates any more."""
        kept = getattr(self, "_kept", None)
        if kept is not None:
            release, self._release = self._release, None
            kept.leave(release)

    async def _begin(self) -> TaskHandle:
        if self._handle is None:
            self._handle = await self._find()
        return self._handle

    def _begun(self) -> TaskHandle:
        if self._handle is None:
            raise InvalidArgument("there is no task yet: begin to iterate over the stream, or enter it with async with")
        return self._handle

    def _let_go(self) -> None:
        release, self._release = self._release, None
        if release is not None and self._handle is not None:
            release(self._handle.id)

    async def _go_on(self, handle: TaskHandle) -> None:
        """Do one step towards the next chunk, or the end. Where it waits it may be cancelled, and done again."""
        kept = self._kept
        if kept is None:
            self._check_loop(handle)
            kept = self._kept = _Kept(self._tasks.broker, handle)
        if self._ended is None and handle.done():
            self._ended = handle.future.result()
            if kept.end(self._ended, self._order):
                self._restarting = asyncio.get_running_loop().create_task(kept.restart())
        if self._restarting is not None:
            await asyncio.shield(self._restarting)
            self._restarting = None
        if self._complete:
            (await handle.finished()).check()
            await self.aclose()
        elif self._ended is not None and (self._order.complete or await kept.all_taken()):
            self._complete = True
            if self._order.restarted:
                self._ready.append(Chunk(b"", self._ended.attempt, 0))
        else:
            await self._take(kept, handle)

    async def _take(self, kept: _Kept, handle: TaskHandle) -> None:
        """Take what is here, or wait until there is something to do."""
        message = kept.take()
        if message is not None:
            self._ready.extend(_ordered(self._order, message, handle.id))
        elif self._ended is not None:
            await kept.wait_for_rest(handle.id)
        elif not await kept.wait(handle):
            self._handle = self._tasks.heard(handle)

    def _check_loop(self, handle: TaskHandle) -> None:
        check_loop(f"the stream of task {handle.id}", handle.future.get_loop())


def _ordered(order: ChunkOrder, message: StoredMessage, task_id: str) -> list[Chunk]:
    try:
        found = order.take(ChunkMessage.decode(message.data))
    except MalformedMessage as error:
        log.warning("an unreadable chunk is left out", subject=message.subject, error=str(error))
        return []
    except MissingChunk as error:
        raise _gone(task_id, str(error)) from None
    return [Chunk(chunk.data, chunk.attempt, chunk.index) for chunk in found]


def _gone(task_id: str, what: str) -> ChunksGone:
    return ChunksGone(f"task {task_id}: {what} is not kept any more; its output, once it has ended, is not affected")


_stopping: set[asyncio.Task[None]] = set()
"""What ends the reading for streams that were dropped."""


class _Kept:
    """What is stored of one task's chunks, read ahead in the background."""

    def __init__(self, broker: Broker, handle: TaskHandle) -> None:
        self._broker = broker
        self._loop = handle.future.get_loop()
        self._id = handle.id
        self._stream = subjects.chunk_stream(handle.application)
        self._subject = subjects.chunk(handle.application, handle.session_id, handle.id)
        self._arrived: deque[StoredMessage] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._taken = 0
        """The sequence of the last message that was taken."""
        self._failed = False
        """The task has ended without an output: whatever is stored now is all."""
        self._until: int | None = None
        """Where that ends, once it is known."""
        self._error: FlameError | None = None
        self._reading: asyncio.Task[None] | None = None
        self._woken: asyncio.Future[Task] | None = None

    async def all_taken(self) -> bool:
        """Whether everything was taken of a task that has ended without an output."""
        if self._failed and self._until is None:
            self._until = await self._last()
        return self._until is not None and self._taken >= self._until

    def take(self) -> StoredMessage | None:
        """Return the next message, if it is here; raise why there will be none."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read(0), name=f"chunks of {self._subject}")
        if not self._arrived:
            if self._error is not None and not isinstance(self._error, StreamMissing):
                raise self._error
            return None
        self._room.set()
        message = self._arrived.popleft()
        self._taken = message.sequence
        return message

    async def wait(self, handle: TaskHandle) -> bool:
        """Wait for a message or the task's end; return whether either came soon."""
        if self._woken is not handle.future:
            self._woken = handle.future
            handle.future.add_done_callback(self._wake)
        return await self._told(CHECK_S)

    def end(self, task: Task, order: ChunkOrder) -> bool:
        """Take over how the task has ended; tell whether everything is to be read again: see `restart`."""
        if task.state is TaskState.SUCCEED:
            return order.end(RunKey(task.attempt, task.started), task.chunks)
        self._failed = True
        return False

    async def restart(self) -> None:
        """Begin anew."""
        await self.stop()
        self._arrived.clear()
        self._taken = 0

    async def wait_for_rest(self, task_id: str) -> None:
        """Wait for a message of a task that has ended: it is stored, unless it is not kept any more."""
        if await self._told(LOOK_S):
            return
        last = await self._last()
        if last is None or self._arrived:
            return
        if self._failed:
            self._until = min(self._until or 0, last)
        elif last <= self._taken:
            raise _gone(task_id, "some or all of what it emitted")

    async def stop(self) -> None:
        """Read no more."""
        reading, self._reading = self._reading, None
        await end_task(reading)
        if self._woken is not None:
            self._woken.remove_done_callback(self._wake)

    def leave(self, release: Callable[[str], None] | None) -> None:
        """Read no more, and release the task; called on any thread, by whoever does not wait for that."""
        with suppress(RuntimeError):  # the loop is closed, and with it everything
            self._loop.call_soon_threadsafe(self._leave, release)

    def _leave(self, release: Callable[[str], None] | None) -> None:
        if release is not None:
            release(self._id)
        stopping = self._loop.create_task(self.stop())
        _stopping.add(stopping)
        stopping.add_done_callback(_stopping.discard)

    async def _told(self, limit_s: float) -> bool:
        self._news.clear()
        if self._arrived:
            return True
        try:
            async with asyncio.timeout(limit_s):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def _last(self) -> int | None:
        """Return the sequence of the last message, 0 if there is none, ``None`` if the broker doesn't say now."""
        try:
            found = await self._broker.last(self._stream, self._subject)
        except StreamMissing:
            return 0
        except BrokerUnavailable:
            await asyncio.sleep(PAUSE_S)  # where it is closed for good, reading tells
            return None
        return 0 if found is None else found.sequence

    async def _read(self, after: int) -> None:
        reader = self._broker.read(self._stream, self._subject, after=after, follow=True)
        try:
            async with aclosing(reader):
                async for message in reader:
                    self._arrived.append(message)
                    self._news.set()
                    while len(self._arrived) >= AHEAD:
                        self._room.clear()
                        await self._room.wait()
        except FlameError as error:
            self._error = error
            self._news.set()

    def _wake(self, _: asyncio.Future[Task]) -> None:
        self._news.set()
