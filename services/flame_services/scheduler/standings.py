"""What sessions have and lack as they were last looked at, in the order in which places are given and taken.

A session's standing holds until something about it changes. So what a round of planning costs is decided by what
changed since the last one, and by how many places it gives, not by how many sessions are served or wait.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from flame.protocol.resources import Resources

SLACK: Final = 64
"""Entries that are over and still kept, at least."""


class GroupKey(NamedTuple):
    """What makes the executors of two sessions the same to whoever gives places."""

    priority: int
    application: str
    request: Resources


class LaneKey(NamedTuple):
    """What makes two sessions that lack executors the same: where one can't be helped, none after it can."""

    group: GroupKey
    together: int
    """So many executors at once, or none."""


@dataclass(slots=True)
class Standing:
    """What one session has and lacks."""

    session: str
    group: GroupKey
    weight: float
    created: float
    has: int
    """Executors that stay."""
    lacks: int = 0
    """How many more it should have and could use now."""
    together: int = 1
    """The first of them come at once or not at all."""
    spare: tuple[str, ...] = ()
    """Keys of idle executors that it could do without, the one that was idle longest first."""
    avoid: str = ""
    """A node that is only taken if no other will do."""
    current: bool = True
    """Nothing about the session has changed since."""

    @property
    def lane(self) -> LaneKey:
        """Where it waits, while it has got nothing of what it lacks."""
        return LaneKey(self.group, self.together)

    @property
    def rank(self) -> float:
        """Its part of what its group has, by its weight; shares within one group are in the order of ranks."""
        return self.has / self.weight


@dataclass(slots=True)
class Queue:
    """A heap of standings, the first by order on top; those that are over are dropped now and then."""

    heap: list[tuple[Any, ...]] = field(default_factory=list)
    """Each entry ends with its standing."""
    live: int = 0
    waits: str = ""
    """Of a lane: why its sessions lack executors."""

    def add(self, entry: tuple[Any, ...]) -> None:
        """Put one in."""
        heapq.heappush(self.heap, entry)
        self.live += 1

    def drop(self) -> None:
        """Take note that one of the entries is over."""
        self.live -= 1
        if len(self.heap) > 2 * self.live + SLACK:
            self.heap = [entry for entry in self.heap if entry[-1].current]
            heapq.heapify(self.heap)

    def standings(self) -> Iterator[Standing]:
        """Go through those that hold, in no order."""
        return (entry[-1] for entry in self.heap if entry[-1].current)


@dataclass(slots=True)
class Standings:
    """Every standing that holds, indexed."""

    lanes: dict[LaneKey, Queue] = field(default_factory=dict)
    """Sessions that lack executors; on top who has least."""
    groups: dict[GroupKey, Queue] = field(default_factory=dict)
    """Sessions that have executors; on top who has most."""
    spare: dict[str, dict[str, int]] = field(default_factory=dict)
    """By node: idle executors that are not needed, by key, and their sessions' priorities."""

    def adopt(self, standing: Standing) -> None:
        """Index one."""
        rank = standing.rank
        if standing.lacks > 0:
            # No two entries that hold are of one session; older ones must not be compared beyond the serial number.
            entry = (rank, standing.created, standing.session, id(standing), standing)
            _queue(self.lanes, standing.lane).add(entry)
        if standing.has > 0:
            _queue(self.groups, standing.group).add((-rank, standing.session, id(standing), standing))
        for key in standing.spare:
            self.spare.setdefault(key.partition(".")[0], {})[key] = standing.group.priority

    def forget(self, standing: Standing) -> None:
        """Let go of one: what it says doesn't hold any more."""
        standing.current = False
        if standing.lacks > 0:
            _drop(self.lanes, standing.lane)
        if standing.has > 0:
            _drop(self.groups, standing.group)
        for key in standing.spare:
            node = key.partition(".")[0]
            of_node = self.spare[node]
            del of_node[key]
            if not of_node:
                del self.spare[node]


def _queue(queues: dict[Any, Queue], key: Any) -> Queue:
    queue = queues.get(key)
    if queue is None:
        queue = queues[key] = Queue()
    return queue


def _drop(queues: dict[Any, Queue], key: Any) -> None:
    queue = queues[key]
    queue.drop()
    if not queue.live:
        del queues[key]
