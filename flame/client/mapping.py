"""Running a task for each of many inputs, with no more under way than wanted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Collection, Iterable, Sized
from dataclasses import dataclass
from functools import partial
from typing import Final, Generic, TypeVar

from flame.client.home import check_loop
from flame.client.task import Task, TaskHandle
from flame.errors import FlameError, InvalidArgument
from flame.logs import get_logger
from flame.protocol.states import TaskState

log = get_logger("flame.client")

Inputs = Iterable[bytes | str] | AsyncIterable[bytes | str]
Progress = Callable[[int, int | None], None]
T = TypeVar("T")

CANCEL_S: Final = 10.0
"""How long leaving a map waits until what it leaves is cancelled."""
REASON: Final = "the map that created it was left"


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """How a map goes on, and how it ends; see `flame.Session.map`."""

    ordered: bool
    in_flight: int
    raise_failed: bool
    cancel_on_exit: bool
    on_progress: Progress | None

    def __post_init__(self) -> None:
        """Refuse what lets nothing be done."""
        if self.in_flight < 1:
            raise InvalidArgument(f"in_flight: expected at least 1, got {self.in_flight}")


async def mapped(
    submit: Callable[[bytes | str], Awaitable[TaskHandle]],
    cancel: Callable[[list[str], str], Awaitable[dict[str, TaskState]]],
    inputs: Inputs,
    options: MapOptions,
) -> AsyncGenerator[Task, None]:
    """Submit inputs and yield finished tasks; cancel what is outstanding when it is left before its end."""
    source = _each(inputs)
    total = total_of(inputs)
    under_way: _InOrder | _AsFinished = _InOrder() if options.ordered else _AsFinished()
    in_flight, raise_failed, on_progress = options.in_flight, options.raise_failed, options.on_progress
    more = True
    done = 0
    try:
        while True:
            while more and len(under_way) < in_flight:
                try:
                    data = await anext(source)
                except StopAsyncIteration:
                    more = False
                else:
                    under_way.add(await submit(data))
            if not under_way:
                return
            task = await under_way.next()
            if raise_failed:
                task.check()
            if on_progress is not None:
                done += 1
                on_progress(done, total)
            yield task
    finally:
        await source.aclose()
        if options.cancel_on_exit and under_way:
            await _give_up(under_way.handles, cancel)


class KeysAhead(Generic[T]):
    """The keys of inputs, for a map that is given something made of these: it asks for each once, in their order."""

    def __init__(self, key: Callable[[T], str | None]) -> None:
        """Take what names an input."""
        self._key = key
        self._keys: deque[str | None] = deque()

    def note(self, data: T) -> T:
        """Find the key of an input, and return the input."""
        self._keys.append(self._key(data))
        return data

    def take(self, _: bytes | str) -> str | None:
        """Return the next key."""
        return self._keys.popleft()


def total_of(inputs: object) -> int | None:
    """Return how many inputs there are, if that can be told without taking them."""
    return len(inputs) if isinstance(inputs, Sized) else None


class _InOrder:
    """Tasks under way, of which the oldest is next."""

    def __init__(self) -> None:
        self.handles: deque[TaskHandle] = deque()

    def __len__(self) -> int:
        return len(self.handles)

    def add(self, handle: TaskHandle) -> None:
        self.handles.append(handle)

    async def next(self) -> Task:
        task = await self.handles[0].finished()
        self.handles.popleft()
        return task


class _AsFinished:
    """Tasks under way, of which the one is next that ends next."""

    def __init__(self) -> None:
        self.handles: set[TaskHandle] = set()
        self._count = 0
        """Of the inputs whose tasks are under way: several may have one task, by its key."""
        self._loop = asyncio.get_running_loop()
        self._ended: deque[TaskHandle] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return self._count

    def add(self, handle: TaskHandle) -> None:
        self._count += 1
        self.handles.add(handle)
        handle.future.add_done_callback(partial(self._note, handle))

    async def next(self) -> Task:
        if not self._ended:
            check_loop("the iterator of a map", self._loop)
            self._waiter = self._loop.create_future()
            await self._waiter
        handle = self._ended.popleft()
        self._count -= 1
        self.handles.discard(handle)
        return await handle.finished()

    def _note(self, handle: TaskHandle, _: object) -> None:
        self._ended.append(handle)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def _give_up(
    handles: Collection[TaskHandle], cancel: Callable[[list[str], str], Awaitable[dict[str, TaskState]]]
) -> None:
    """Cancel tasks that nobody waits for any more; what keeps that from being done is logged, and does no harm."""
    left = [handle for handle in handles if not handle.done()]
    try:
        async with asyncio.timeout(CANCEL_S):
            # The cluster knows nothing yet of one that is on its way, and would run it all the same.
            storing = [stored for handle in left if (stored := handle.when_stored()) is not None]
            if storing:
                await asyncio.wait(storing)
            ids = [handle.id for handle in left if not handle.done()]
            if ids:
                await cancel(ids, REASON)
    except (FlameError, TimeoutError) as error:
        log.warning("tasks of a map that was left go on", tasks=len(left), error=str(error) or type(error).__name__)


async def _each(inputs: Inputs) -> AsyncGenerator[bytes | str, None]:
    if isinstance(inputs, AsyncIterable):
        async for data in inputs:
            yield data
    else:
        for data in inputs:
            yield data
