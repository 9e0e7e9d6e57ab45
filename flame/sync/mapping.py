"""Running a task for each of many inputs that the calling thread has."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Final

from flame.client.mapping import KeysAhead, Progress, total_of
from flame.client.task import Task
from flame.errors import InvalidArgument
from flame.sync.background import Background
from flame.sync.iterators import BlockingIterator

Input = bytes | str


class _NoMore:
    """Comes after the last input."""


_NO_MORE: Final = _NoMore()


class _Feed(AsyncIterator[Input]):
    """Inputs on their way from the calling thread into the background, which is woken only where it waits."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._inputs: deque[Input | _NoMore] = deque()
        self._news = asyncio.Event()
        self._asleep = False

    def put(self, data: Input | _NoMore) -> None:
        """Hand an input over, on the one thread that has them."""
        self._inputs.append(data)
        if self._asleep:
            self._asleep = False
            self._background.post(self._news.set)

    async def __anext__(self) -> Input:
        while not self._inputs:
            self._news.clear()
            self._asleep = True
            if not self._inputs:
                await self._news.wait()
            self._asleep = False
        data = self._inputs.popleft()
        if isinstance(data, _NoMore):
            self._inputs.append(data)
            raise StopAsyncIteration
        return data


class Mapping(BlockingIterator[Task]):
    """The finished tasks of inputs, which are taken on the thread that asks for the results, as it does."""

    def __init__(
        self,
        background: Background,
        run: Callable[..., AsyncIterator[Task]],
        inputs: Iterable[Input],
        in_flight: int,
        on_progress: Progress | None,
        key: Callable[[Input], str | None] | None,
    ) -> None:
        """Run inputs with what makes tasks of them and names those by ``key``, no more than ``in_flight`` at once."""
        try:
            self._inputs = iter(inputs)
        except TypeError:
            raise InvalidArgument(
                f"inputs: expected an iterable, got {type(inputs).__name__}: an asynchronous one is for flame.Session"
            ) from None
        self._feed = feed = _Feed(background)
        self._ahead = 2 * in_flight  # half of them at work: so neither thread waits for the other at each item
        self._given = 0
        self._more = True
        self._done = 0
        self._total = total_of(inputs)
        self._on_progress = on_progress
        keys = self._keys = None if key is None else KeysAhead(key)
        super().__init__(background, lambda: run(feed, key=None if keys is None else keys.take))

    def next(self, timeout_s: float | None = None) -> Task:
        """Return the next finished task; see `BlockingIterator.next`. ``timeout_s`` does not limit what inputs take."""
        if not self._closed:
            self._start()
            items = self._pump.items
            # One for each result keeps as many at work as there may be; more of them only while nothing has come.
            self._give()
            while items.empty() and self._give():
                pass
        task = super().next(timeout_s)
        if self._on_progress is not None:
            self._done += 1
            try:
                self._on_progress(self._done, self._total)
            except BaseException:
                self.close()
                raise
        return task

    def _give(self) -> bool:
        if not self._more or self._given - self._pump.taken >= self._ahead:
            return False
        try:
            data = next(self._inputs, _NO_MORE)
            if self._keys is not None and not isinstance(data, _NoMore):
                self._keys.note(data)
        except BaseException:
            self.close()  # the inputs' error is what the caller hears; nothing more will be taken
            raise
        self._feed.put(data)
        if isinstance(data, _NoMore):
            self._more = False
            return False
        self._given += 1
        return True
