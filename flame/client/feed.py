"""What is put in on one side and iterated over on the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Self, TypeVar

from flame.client.home import check_loop
from flame.errors import FlameError

T = TypeVar("T")


class Feed(AsyncIterator[T]):
    """Items in the order in which they came, for one reader, until there will be no more."""

    def __init__(self, what: str, home: asyncio.AbstractEventLoop) -> None:
        """Be empty. ``what`` it is, is told to whoever takes it into another event loop than ``home``."""
        self._what = what
        self._home = home
        self._items: deque[T] = deque()
        self._news = asyncio.Event()
        """Set when there is an item, or a reason to look again."""
        self._error: FlameError | None = None
        self._ended = False

    def __aiter__(self) -> Self:
        """Return the iterator."""
        return self

    async def __anext__(self) -> T:
        """Return the next item, waiting for it. What has come is handed on before the end, or an error, is told."""
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._check_loop()
            self._news.clear()
            await self._wait()
        return self._items.popleft()

    def fail(self, error: FlameError) -> None:
        """Say that nothing more can be heard."""
        self._error = error
        self._news.set()

    def _put(self, item: T) -> None:
        self._items.append(item)
        self._news.set()

    def _check_loop(self) -> None:
        check_loop(self._what, self._home)

    async def _wait(self) -> None:
        """Wait until it is worth looking again."""
        await self._news.wait()
