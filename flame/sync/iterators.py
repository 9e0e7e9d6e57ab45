"""What comes one after another, waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from flame.cancel import end_task
from flame.errors import FlameError, TimedOut
from flame.sync.background import Background

T = TypeVar("T")

AHEAD: Final = 1000
"""How many items are taken from an asynchronous iterator before they are asked for, at most."""


class _End:
    """The last thing that comes: why nothing more does."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Pump(Generic[T]):
    """Takes items from an asynchronous iterator in the background, so that whoever wants them crosses no thread."""

    def __init__(self, background: Background, source: AsyncIterator[T]) -> None:
        """Begin with `start`."""
        self.items: SimpleQueue[T | _End] = SimpleQueue()
        self.taken = 0
        """How many the reader has taken."""
        self.stalled = False
        """The reader is far behind, and says by `go_on` when it isn't any more."""
        self._background = background
        self._source = source
        self._room = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._over = False

    # ---- on any thread

    def stop(self) -> None:
        """Take no more; don't wait for that."""
        self._background.post(self._stop)

    def go_on(self) -> None:
        """Take more."""
        self.stalled = False
        self._background.post(self._room.set)

    # ---- in the background

    async def enter(self) -> None:
        """Enter the iterator's context, if it has one."""
        if isinstance(self._source, AbstractAsyncContextManager):
            await self._source.__aenter__()

    def start(self) -> None:
        """Begin to take items."""
        if self._task is None and not self._over:
            self._task = self._background.spawn(self._pump())

    async def close(self) -> None:
        """Take no more, and leave the iterator."""
        self._over = True
        await end_task(self._task)
        await self._leave()

    def _stop(self) -> None:
        if not (self._over or self._background.stopping):
            self._background.spawn(self._close_unheard())

    async def _close_unheard(self) -> None:
        with suppress(FlameError):
            await self.close()

    async def _leave(self) -> None:
        aclose: Callable[[], Any] | None = getattr(self._source, "aclose", None)
        if aclose is not None:
            await aclose()

    async def _pump(self) -> None:
        error: BaseException | None = None
        put = self.items.put
        count = 0
        try:
            async for item in self._source:
                put(item)
                count += 1
                if count - self.taken >= AHEAD:
                    await self._wait_for_room(count)
        except asyncio.CancelledError:
            if self._background.stopping:
                error = self._background.gone()
            raise
        except Exception as failure:  # noqa: BLE001  # raised where items are asked for
            error = failure
        finally:
            if not self._background.silent:
                put(_End(error))

    async def _wait_for_room(self, count: int) -> None:
        self._room.clear()
        self.stalled = True
        if count - self.taken >= AHEAD:
            await self._room.wait()
        self.stalled = False


class BlockingIterator(Iterator[T]):
    """An iterator over what comes from the cluster, which waits for the next item.

    It is a context manager, too: its block's end stops what brings the items, as `close` does. Use it in one thread at
    a time; `close` may be called from any. Ctrl-C interrupts the waiting and costs no item.
    """

    def __init__(self, background: Background, source: Callable[[], AsyncIterator[T]]) -> None:
        """Made by a session or a connection: ``source`` is called in the background."""
        self._background = background
        self._pump = background.call(lambda: _Pump(background, source()))
        self._started = False
        self._closed = False

    def __iter__(self) -> Self:
        """Return the iterator."""
        return self

    def __next__(self) -> T:
        """Return the next item, waiting for it."""
        return self.next()

    def next(self, timeout_s: float | None = None) -> T:
        """Return the next item, waiting for it no longer than ``timeout_s``.

        Raises:
            TimedOut: Nothing came in time; the item that comes next is not lost.
            StopIteration: There will be no more.
            WrongThread: This is the background, where the items come from.
        """
        if self._closed:
            raise StopIteration
        self._start()
        try:
            return self._take(timeout_s)
        except Empty:
            raise TimedOut(f"nothing came within {timeout_s:g} s") from None

    def close(self) -> None:
        """Stop what brings the items: the iteration ends. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if not self._background.ended:
            self._background.run(self._pump.close())
        self._pump.items.put(_End(None))

    def __enter__(self) -> Self:
        """Begin, so that nothing that happens from now on is missed."""
        self._background.run(self._pump.enter())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop what brings the items."""
        self.close()

    def __del__(self) -> None:
        """Stop what brings the items to nobody."""
        if hasattr(self, "_pump"):
            self._pump.stop()

    def _start(self) -> None:
        self._background.check()
        if not self._started:
            self._started = True
            self._background.post(self._pump.start)

    def _take(self, timeout_s: float | None = None) -> T:
        pump = self._pump
        item = pump.items.get(timeout=timeout_s)
        if isinstance(item, _End):
            pump.items.put(_End(None))  # for whoever asks again
            if item.error is not None:
                raise item.error
            raise StopIteration
        pump.taken += 1
        if pump.stalled:
            pump.go_on()
        return item
