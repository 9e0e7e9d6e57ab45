"""Where executors can be placed, while a round of planning gives places away."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from flame.protocol.resources import Resources
from flame.protocol.states import Placement
from flame_services.scheduler.parts import COMING, NOTHING, Node

ENDLESS: Final = 2**31
"""So many executors that ask for nothing fit anywhere."""


@dataclass(slots=True)
class Room:
    """What is left of one node."""

    name: str
    node: Node
    free: Resources
    """What nobody uses."""
    later: Resources
    """What nobody will use once those that leave are gone, less what is kept for others."""
    count: int
    """Its executors."""

    def fits(self, request: Resources) -> bool:
        """Whether a request can be placed now, without taking what is kept for others."""
        return request.fits_in(self.free) and request.fits_in(self.later)

    @property
    def part(self) -> float:
        """The part of it that is free, of the resource of which least is."""
        capacity, free = self.node.record.capacity, self.free
        part = free.cpu / capacity.cpu if capacity.cpu else 1.0
        return min(part, free.memory / capacity.memory) if capacity.memory else part

    def take(self, request: Resources) -> None:
        """Place a request here."""
        self.free = self.free.minus(request)
        self.later = self.later.minus(request)
        self.count += 1

    def keep(self, request: Resources) -> None:
        """Keep room for a request that is placed here later."""
        self.later = self.later.minus(request)


@dataclass(slots=True)
class Seats:
    """What is left of a node that serves one application only: it has places for executors, whatever they ask for."""

    name: str
    left: float

    def take(self, _: Resources) -> None:
        """Place an executor here."""
        self.left -= 1

    keep = take


class Places:
    """The nodes that take executors.

    Those that serve one application only are taken first by its sessions, and `rooms` has none of them.

    Within a round a node's free room only shrinks. So a node that is too small for a request once stays so, and nobody
    goes through all nodes for each executor.
    """

    def __init__(self, nodes: dict[str, Node], promised: dict[str, list[Resources]]) -> None:
        """Begin with what each node has free, less what executors will use that are just being bound."""
        self.rooms: dict[str, Room] = {}
        self._seats: dict[str, list[Seats]] = {}
        for name, node in nodes.items():
            if not node.takes:
                continue
            if node.record.application:
                left = (node.record.max_executors or ENDLESS) - len(node.bindings) - len(promised.get(name, ()))
                self._seats.setdefault(node.record.application, []).append(Seats(name, left))
                continue
            free = node.free
            for uses in promised.get(name, ()):
                free = free.minus(uses)
            _, coming = node.piles.get(COMING, (0, NOTHING))
            self.rooms[name] = Room(name, node, free, free.plus(coming), len(node.bindings))
        self.largest_free = most_of(room.free for room in self.rooms.values())
        self._spread: dict[Resources, list[tuple[float, int, str]]] = {}
        self._packed: dict[Resources, list[str]] = {}
        self._order: list[str] = []

    def find(self, application: str, request: Resources, placement: Placement, avoid: str) -> Room | Seats | None:
        """Return the best room for a request, on the node to avoid only if no other will do."""
        seats = self._seat(application, avoid)
        if seats is not None and seats.name != avoid:
            return seats
        if not request.fits_in(self.largest_free):
            return seats
        find = self._tightest if placement is Placement.PACK else self._roomiest
        return find(request, avoid) or seats

    def _seat(self, application: str, avoid: str) -> Seats | None:
        """Return a place on a node that serves this application only."""
        free = [seats for seats in self._seats.get(application, ()) if seats.left > 0]
        return min(free, key=lambda seats: (seats.name == avoid, seats.name), default=None)

    def seats(self, application: str) -> float:
        """Return how many places are left on nodes that serve this application only."""
        return sum(max(0.0, seats.left) for seats in self._seats.get(application, ()))

    def keep_seats(self, application: str) -> None:
        """Keep these for who waits for room elsewhere besides."""
        for seats in self._seats.get(application, ()):
            seats.left = 0

    @property
    def any_seats(self) -> bool:
        """Whether a node serves one application only, be it free or taken."""
        return bool(self._seats)

    def count(self, application: str, request: Resources, enough: int) -> int:
        """Return for how many executors there is room; ``enough`` if it is for as many or more."""
        total = int(min(enough, self.seats(application)))
        if total >= enough or not request.fits_in(self.largest_free):
            return total
        for room in self.rooms.values():
            total += how_often(request, least_of(room.free, room.later))
            if total >= enough:
                return enough
        return total

    def _roomiest(self, request: Resources, avoid: str) -> Room | None:
        """Return the node with the largest part free."""
        heap = self._spread.get(request)
        if heap is None:
            heap = self._spread[request] = [
                (-room.part, room.count, name) for name, room in self.rooms.items() if room.fits(request)
            ]
            heapq.heapify(heap)
        first = self._top(heap, request)
        if first is None or first.name != avoid:
            return first
        entry = heapq.heappop(heap)
        other = self._top(heap, request)
        heapq.heappush(heap, entry)
        return other or first

    def _top(self, heap: list[tuple[float, int, str]], request: Resources) -> Room | None:
        while heap:
            room = self.rooms[heap[0][2]]
            entry = (-room.part, room.count, room.name)
            if not room.fits(request):
                heapq.heappop(heap)
            elif entry != heap[0]:  # something was placed there since
                heapq.heapreplace(heap, entry)
            else:
                return room
        return None

    def _tightest(self, request: Resources, avoid: str) -> Room | None:
        """Return the node with the least part free, by what was free when the round began."""
        if not self._order:
            self._order = sorted(self.rooms, key=lambda name: (self.rooms[name].part, name), reverse=True)
        left = self._packed.setdefault(request, list(self._order))  # the best is last
        while left and not self.rooms[left[-1]].fits(request):
            left.pop()
        if not left:
            return None
        if left[-1] == avoid:
            for name in reversed(left[:-1]):
                if self.rooms[name].fits(request):
                    return self.rooms[name]
        return self.rooms[left[-1]]


def how_often(request: Resources, room: Resources) -> int:
    """Return how many executors that each ask for so much have room there."""
    times = [math.floor(have / ask + 1e-9) for ask, have in zip(request, room, strict=True) if ask]
    return max(0, min(times, default=ENDLESS))


def most_of(amounts: Iterable[Resources]) -> Resources:
    """Return the most of each resource that any has."""
    cpu, memory, gpu = 0.0, 0, 0
    for amount in amounts:
        cpu, memory, gpu = max(cpu, amount.cpu), max(memory, amount.memory), max(gpu, amount.gpu)
    return Resources(cpu, memory, gpu)


def least_of(one: Resources, other: Resources) -> Resources:
    """Return what both have of each resource."""
    return Resources(min(one.cpu, other.cpu), min(one.memory, other.memory), min(one.gpu, other.gpu))
