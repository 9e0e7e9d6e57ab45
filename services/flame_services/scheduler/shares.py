"""Who has how much of the cluster, while a round of planning changes that.

A session's share is its part of the cluster of the resource of which it has most, by its weight: weighted dominant
resource fairness.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any, Final

from flame.protocol.resources import Resources
from flame.protocol.states import NodeState
from flame_services.scheduler.parts import NOTHING
from flame_services.scheduler.standings import GroupKey, Queue, Standing, Standings
from flame_services.scheduler.view import View

LEAST_PART: Final = 1e-12
"""Of the cluster, for a request of nothing: sessions with such requests have shares by how many executors they have."""
ROUNDING: Final = 1e-9


class Shares:
    """Sessions' standings as they are in one round, and what the round has given to and taken from them."""

    def __init__(self, view: View, looked_at: set[str], fresh: Iterable[Standing]) -> None:
        """Take what ``view`` has for sessions that weren't looked at, and ``fresh`` for those that were."""
        self._view = view
        self._looked_at = looked_at
        self._fresh = Standings()
        self._fresh_of: dict[str, Standing] = {}
        for standing in fresh:
            self._fresh.adopt(standing)
            self._fresh_of[standing.session] = standing
        self.given: dict[str, int] = {}
        """By session: places, and room that is coming."""
        self.taken: dict[str, int] = {}
        self._parts: dict[Resources, float] = {}
        self._capacity: Resources | None = None

    def lanes(self) -> Iterator[tuple[Any, Queue]]:
        """Return every lane, that of each kind twice where old and new sessions wait in it."""
        yield from self._view.standings.lanes.items()
        yield from self._fresh.lanes.items()

    def groups(self) -> Iterator[tuple[GroupKey, Queue]]:
        """Return every group, that of each kind twice where it has old and new standings."""
        yield from self._view.standings.groups.items()
        yield from self._fresh.groups.items()

    def spare(self, node: str) -> Iterator[tuple[str, int]]:
        """Return keys of idle executors on a node that are not needed, and their sessions' priorities."""
        fresh = self._fresh.spare.get(node, {})
        yield from fresh.items()
        for key, priority in self._view.standings.spare.get(node, {}).items():
            if key not in fresh:
                yield key, priority

    def least_spare(self) -> float:
        """Return the lowest priority that has a spare executor."""
        found = (
            priority
            for store in (self._view.standings, self._fresh)
            for of_node in store.spare.values()
            for priority in of_node.values()
        )
        return min(found, default=float("inf"))

    def holds(self, standing: Standing) -> bool:
        """Whether a standing is the one of its session in this round."""
        if standing.session in self._looked_at:
            return self._fresh_of.get(standing.session) is standing
        return standing.current

    def of(self, session: str) -> Standing | None:
        """Return a session's standing, if it has one."""
        if session in self._looked_at:
            return self._fresh_of.get(session)
        return self._view.sessions[session].standing

    def is_fresh(self, session: str) -> bool:
        """Whether a session was looked at in this round."""
        return session in self._looked_at

    def count(self, standing: Standing) -> int:
        """Return how many executors a session has by now."""
        name = standing.session
        return standing.has + self.given.get(name, 0) - self.taken.get(name, 0)

    def share(self, standing: Standing, more: int = 0) -> float:
        """Return a session's share, if it had ``more`` executors than it has by now."""
        return (self.count(standing) + more) / standing.weight * self.part(standing.group.request)

    def may_take(self, poor: Standing, rich: Standing, losses: int) -> bool:
        """Whether one more executor of a session of the same priority is over its share, seen from another one.

        It is if it has at least as much after ``losses`` and this one as the other will have with one more: so what
        was taken once is never taken back while nothing else changes.
        """
        return self.share(rich, -losses - 1) >= self.share(poor, 1) * (1 - ROUNDING)

    def part(self, request: Resources) -> float:
        """Return the part of the cluster that a request is, of the resource of which it is most."""
        part = self._parts.get(request)
        if part is None:
            if self._capacity is None:
                self._capacity = _capacity(self._view)
            parts = [ask / have for ask, have in zip(request, self._capacity, strict=True) if have]
            part = self._parts[request] = max([LEAST_PART, *parts])
        return part


class Richest:
    """Sessions of some groups by their shares, the largest first; shares may fall meanwhile."""

    def __init__(self, shares: Shares, groups: Iterable[Queue]) -> None:
        """Begin with the tops of the groups."""
        self._shares = shares
        self._heap: list[tuple[float, str, int, Standing, Queue | None, int]] = []
        for group in groups:
            self._push(group, 0)

    def walk(self) -> Iterator[Standing]:
        """Go through them; each walk begins with the largest share."""
        passed = []
        try:
            while self._heap:
                share, name, serial, standing, group, place = self._heap[0]
                if group is not None:
                    heapq.heapreplace(self._heap, (share, name, serial, standing, None, 0))
                    self._push(group, 2 * place + 1)
                    self._push(group, 2 * place + 2)
                    continue
                now = -self._shares.share(standing)
                if now != share and now < 0:
                    heapq.heapreplace(self._heap, (now, name, serial, standing, None, 0))
                    continue
                entry = heapq.heappop(self._heap)
                if now < 0 and self._shares.holds(standing):
                    passed.append(entry)
                    yield standing
        finally:
            for entry in passed:
                heapq.heappush(self._heap, entry)

    def _push(self, group: Queue, place: int) -> None:
        if place < len(group.heap):
            *_, standing = group.heap[place]
            share = standing.has / standing.weight * self._shares.part(standing.group.request)
            heapq.heappush(self._heap, (-share, standing.session, id(standing), standing, group, place))


def _capacity(view: View) -> Resources:
    total = NOTHING
    for node in view.nodes.values():
        if node.state is not NodeState.NOT_READY and not node.record.application:
            total = total.plus(node.record.capacity)
    return total
