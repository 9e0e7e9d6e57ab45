"""Telling how far a run is, not more often than anybody can look."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from flame.broker.seam import Broker
from flame.errors import BrokerUnavailable
from flame.protocol import defaults
from flame.protocol.progress import Progress

_NEVER: Final = float("-inf")


class ProgressTeller:
    """Publishes the progress of one run: the first and the last that it is told, and in between what is new then."""

    def __init__(self, broker: Broker, subject: str, loop: asyncio.AbstractEventLoop) -> None:
        """Publish on ``subject``."""
        self._broker = broker
        self._subject = subject
        self._loop = loop
        self._first: Progress | None = None
        self._news: Progress | None = None
        self._begun = False
        self._told_at = _NEVER
        self._called = False
        self._timer: asyncio.TimerHandle | None = None
        self._sending: asyncio.Task[None] | None = None

    def tell(self, progress: Progress) -> None:
        """Have it published, soon. In any thread."""
        if self._begun:
            self._news = progress
        else:
            self._begun = True
            self._first = progress
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._look)

    async def end(self) -> None:
        """Publish what was told last, if it wasn't."""
        if self._timer is not None:
            self._timer.cancel()
        self._called = True  # nothing more is looked at
        if self._sending is not None:
            await asyncio.wait((self._sending,))
        await self._publish()

    def _look(self) -> None:
        wait_s = self._told_at + defaults.PROGRESS_INTERVAL_S - self._loop.time()
        if wait_s > 0:
            self._timer = self._loop.call_later(wait_s, self._look)
            return
        self._timer = None
        self._called = False
        self._told_at = self._loop.time()
        self._sending = self._loop.create_task(self._publish(), name="progress")

    async def _publish(self) -> None:
        waiting = [told for told in (self._first, self._news) if told is not None]
        self._first = self._news = None
        for news in waiting:
            with contextlib.suppress(BrokerUnavailable):  # live only: who misses it hears the next one, or of the end
                await self._broker.publish(self._subject, news.encode())


def progress_of(done: float, total: float | None, message: str, attempt: int, executor: str) -> Progress:
    """Return what is told now."""
    return Progress(done, total, message, attempt, executor, time.time())
