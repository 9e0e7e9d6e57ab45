"""Times at which something is due, by name, without looking through those that are not."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Final

SLACK: Final = 64
"""Entries that are over and still kept, at least."""


@dataclass(slots=True)
class Timers:
    """At most one time for each name."""

    at: dict[str, float] = field(default_factory=dict)
    _heap: list[tuple[float, str]] = field(default_factory=list)

    def set(self, name: str, at: float) -> None:
        """Set or move the time of a name; infinity clears it."""
        if at == self.at.get(name, math.inf):
            return
        if at == math.inf:
            del self.at[name]
        else:
            self.at[name] = at
            heapq.heappush(self._heap, (at, name))
        self._tidy()

    def clear(self, name: str) -> None:
        """Forget the time of a name, if it has one."""
        if self.at.pop(name, None) is not None:
            self._tidy()

    def due(self, now: float) -> list[str]:
        """Return the names whose time has come; they stay due until they are cleared or moved."""
        heap, found = self._heap, []
        places = [0]
        while places:  # down the tree of the heap, as far as entries are due
            place = places.pop()
            if place < len(heap) and heap[place][0] <= now:
                at, name = heap[place]
                if self.at.get(name) == at:
                    found.append(name)
                places.extend((2 * place + 1, 2 * place + 2))
        return found

    def first_after(self, now: float) -> float:
        """Return the earliest time that is not due yet, infinity if there is none."""
        heap = self._heap
        first = math.inf
        places = [0]
        while places:
            place = places.pop()
            if place >= len(heap) or heap[place][0] >= first:
                continue
            at, name = heap[place]
            if at > now and self.at.get(name) == at:
                first = at
            else:
                places.extend((2 * place + 1, 2 * place + 2))
        return first

    def _tidy(self) -> None:
        """Drop entries that are over: those on top, and all when they are the most."""
        heap = self._heap
        if len(heap) > 2 * len(self.at) + SLACK:
            heap[:] = [(at, name) for name, at in self.at.items()]
            heapq.heapify(heap)
        while heap and self.at.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
