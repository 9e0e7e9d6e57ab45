"""Holding executors to their memory where no control group does it: by looking, a few times a second.

Whoever grows faster than that can use more for a moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from flame_services.executor_manager.footprint import footprint, members, resident

PERIOD_S: Final = 0.25
_MEASURE_S: Final = 2.0
"""One whose pages, shared ones included, are over its limit is measured as often, even if it does not grow."""


@dataclass(slots=True, eq=False)
class Watched:
    """One executor that is held to its memory."""

    leader: int
    """Of its process group."""
    limit: int
    """In bytes."""
    forked: bool
    """It shares what its template had loaded."""
    on_exceeded: Callable[[int], None]
    """Called once, with what it uses."""
    inherited: int = 0
    measured_at: float = 0.0
    measured_resident: int = 0
    room: int = 0
    """How much more it might have used at the last measurement."""


class MemoryWatch:
    """Looks after the memory of a node's executors."""

    def __init__(self) -> None:
        """Begin with none; `run` does the work."""
        self._watched: set[Watched] = set()

    def add(self, watched: Watched) -> None:
        """Begin to watch an executor."""
        self._watched.add(watched)

    def remove(self, watched: Watched) -> None:
        """Watch it no more. Safe to call again."""
        self._watched.discard(watched)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            if self._watched:
                await self.look()

    async def look(self) -> None:
        """Look at each once."""
        groups = members({watched.leader for watched in self._watched})
        for watched in tuple(self._watched):
            await self._look(watched, groups.get(watched.leader, []))

    async def _look(self, watched: Watched, pids: list[int]) -> None:
        now, size = time.monotonic(), resident(pids)
        first = watched.measured_at == 0.0 and watched.forked
        if not first and not _is_suspect(watched, size, now):
            return
        found = await asyncio.to_thread(footprint, pids)
        if first:
            watched.inherited = found.shared
        used = found.used(watched.inherited)
        watched.measured_at, watched.measured_resident, watched.room = now, size, watched.limit - used
        if used > watched.limit and watched in self._watched:
            self._watched.discard(watched)
            watched.on_exceeded(used)


def _is_suspect(watched: Watched, size: int, now: float) -> bool:
    """Whether it may use more than its limit. Nobody uses more than is resident."""
    if size <= watched.limit:
        return False
    return now - watched.measured_at >= _MEASURE_S or size - watched.measured_resident > watched.room
