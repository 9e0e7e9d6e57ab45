"""What the in-memory broker takes for time: the running loop's, or one that a test moves by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Final, Protocol

_TURNS: Final = 32
"""Turns of the loop that follow every timer of a `ManualClock`. A request and its answer take two."""


class Timer(Protocol):
    """Something that will be called."""

    def cancel(self) -> None:
        """Don't call it. Safe to call twice and afterwards."""


class Clock(Protocol):
    """A monotonic clock. An event loop is one."""

    def time(self) -> float:
        """Return the seconds since some moment."""

    def call_later(self, delay_s: float, callback: Callable[[], object], /) -> Timer:
        """Call ``callback`` once ``delay_s`` seconds have passed, never before this returns."""


class LoopClock:
    """The clock of whichever loop runs."""

    def time(self) -> float:
        """See `Clock.time`."""
        return asyncio.get_running_loop().time()

    def call_later(self, delay_s: float, callback: Callable[[], object], /) -> Timer:
        """See `Clock.call_later`."""
        return asyncio.get_running_loop().call_later(delay_s, callback)


class _ManualTimer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class ManualClock:
    """A clock that stands still until `advance` moves it."""

    def __init__(self, start: float = 0.0) -> None:
        """Begin at ``start``."""
        self._now = start
        self._number = itertools.count()
        self._timers: list[tuple[float, int, _ManualTimer]] = []

    def time(self) -> float:
        """See `Clock.time`."""
        return self._now

    def call_later(self, delay_s: float, callback: Callable[[], object], /) -> Timer:
        """See `Clock.call_later`."""
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (self._now + max(delay_s, 0.0), next(self._number), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Let time pass: whatever falls due is called in order, at its time, and what follows from it happens then."""
        end = self._now + seconds
        await self._settle()
        while self._timers and self._timers[0][0] <= end:
            due, _, timer = heapq.heappop(self._timers)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                self._now = max(self._now, due)
                callback()
                await self._settle()
        self._now = end

    async def _settle(self) -> None:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
