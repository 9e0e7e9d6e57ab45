"""Hearing what is announced of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import flame
from flame.protocol.events import ClusterEvent, Noun
from tests.support.cluster import PATIENCE_S


class Ear:
    """Hears every event of a cluster, tasks' among them."""

    def __init__(self) -> None:
        self.events: list[ClusterEvent] = []
        self._news = asyncio.Event()

    async def listen(self, events: AsyncIterator[ClusterEvent]) -> None:
        async for event in events:
            self.events.append(event)
            self._news.set()

    async def until(
        self, wanted: Callable[[ClusterEvent], bool], what: str, timeout_s: float = PATIENCE_S, *, since: int = 0
    ) -> ClusterEvent:
        """Return the first event for which this is true, of those behind the first ``since``."""
        looked_at = since
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    for event in self.events[looked_at:]:
                        looked_at += 1
                        if wanted(event):
                            return event
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"not heard within {timeout_s:g} s: {what}; but {self.events}") from None

    async def nothing(self, unwanted: Callable[[ClusterEvent], bool], for_s: float) -> None:
        """Return when no event for which this is true was heard for so long."""
        begin = len(self.events)
        await asyncio.sleep(for_s)
        assert [event for event in self.events[begin:] if unwanted(event)] == []

    def of(self, noun: Noun, thing: str) -> list[tuple[str, str]]:
        """Return what was told of something: what it was before, and what happened."""
        return [(e.before, e.event) for e in self.events if e.noun is noun and e.id == thing]


@asynccontextmanager
async def listening(connection: flame.Connection) -> AsyncIterator[Ear]:
    """Hear what happens in the block."""
    ear = Ear()
    async with connection.events(tasks=True) as events:
        listener = asyncio.create_task(ear.listen(events))
        yield ear
    await listener
