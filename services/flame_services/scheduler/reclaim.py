"""Making room for sessions that found none: by what is coming anyway, else by telling executors of others to leave.

Those of lower priorities may be told, and of the same one those that are idle and not needed, or over their session's
share. They finish what they run. Room is kept for whom it is made, so nobody is told to leave twice for the same need.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from flame.protocol.resources import Resources
from flame_services.scheduler.parts import COMING, NOTHING
from flame_services.scheduler.places import Places, Room, Seats, how_often, most_of
from flame_services.scheduler.shares import Richest, Shares
from flame_services.scheduler.standings import Standing
from flame_services.scheduler.view import View

ALREADY: Final = -2
"""Instead of a priority: the room is coming anyway."""
IDLE: Final = -1
"""Instead of a priority: idle executors are enough."""
RICH: Final = 32
"""So many sessions with the largest shares are considered."""
NODES: Final = 16
"""So many nodes of each of these are considered."""


@dataclass(slots=True)
class Victim:
    """An executor that may be told to leave."""

    order: tuple[bool, int, float, str]
    """Idle ones first, then those of lower priorities, then those with larger shares."""
    uses: Resources
    standing: Standing
    spare: bool

    @property
    def key(self) -> str:
        """The key of its binding."""
        return self.order[-1]


@dataclass(slots=True)
class Limit:
    """Executors of an application, or of all, that may be at their limit."""

    left: float
    """So many more may be bound."""
    coming: int
    """So many leave already, and nobody waits for these."""
    most: int = 0


class Reclaim:
    """What is made free in one round."""

    def __init__(
        self, view: View, places: Places, shares: Shares, leaving: dict[str, str], tell: Callable[[str, str], None]
    ) -> None:
        """Begin with executors that leave in this round anyway; ``tell`` is called with a session and a key of it."""
        self._view = view
        self._places = places
        self._shares = shares
        self._tell = tell
        self._gone: set[str] = set()
        self._by_depth: dict[tuple[Resources, int, str], list[tuple[int, str]]] = {}
        self._on_node: dict[str, list[Victim]] = {}
        self._richest: dict[tuple[int, str], Richest] = {}
        for key in leaving:
            self._let_go(key)
        self._largest_later = most_of(room.later for room in places.rooms.values())
        self._lowest = min((key.priority for key, queue in shares.groups() if queue.live), default=math.inf)
        self._lowest_spare = shares.least_spare()

    # ---- on a node

    def make_room(self, standing: Standing, within: str = "") -> bool:
        """Keep room for one more executor of a session, telling as few others to leave as that needs.

        With ``within`` only those of that application are told.
        """
        request, priority = standing.group.request, standing.group.priority
        heap = self._by_depth.get((request, priority, within))
        if heap is None:
            heap = self._by_depth[request, priority, within] = self._nodes_by_depth(request, priority)
        while heap:
            depth, name = heap[0]
            room = self._places.rooms[name]
            now = self._depth(room, request, priority)
            if now is not None and now != depth:
                heapq.heapreplace(heap, (now, name))
            elif now is not None and self._take(room, standing, within):
                return True
            else:
                heapq.heappop(heap)
        return self._take_from_rich(standing, within)

    def count(self, standing: Standing, enough: int) -> int:
        """Return for how many executors room can be made; sessions over their share are spared here."""
        request, priority = standing.group.request, standing.group.priority
        total = 0
        for room in self._places.rooms.values():
            there = room.later
            if how_often(request, self._most_there(room, priority)) > how_often(request, there):
                for victim in self._victims(room):
                    of = victim.standing.group.priority
                    if victim.key not in self._gone and (of < priority or (victim.spare and of == priority)):
                        there = there.plus(victim.uses)
            total += how_often(request, there)
            if total >= enough:
                return enough
        return total

    def _nodes_by_depth(self, request: Resources, priority: int) -> list[tuple[int, str]]:
        if not (request.fits_in(self._largest_later) or self._lowest < priority or self._lowest_spare <= priority):
            return []
        depths = ((self._depth(room, request, priority), name) for name, room in self._places.rooms.items())
        heap = [(depth, name) for depth, name in depths if depth is not None]
        heapq.heapify(heap)
        return heap

    def _depth(self, room: Room, request: Resources, priority: int) -> int | None:
        """Return the highest priority that would be told to leave here; ``None`` if even that is not enough."""
        there = room.later
        if request.fits_in(there):
            return ALREADY
        for key, of in self._shares.spare(room.name):
            if of <= priority and key not in self._gone:
                there = there.plus(room.node.bindings.get(key, NOTHING))
        if request.fits_in(there):
            return IDLE
        for of in sorted(room.node.piles):
            if COMING < of < priority:
                there = there.plus(room.node.piles[of][1])
                if request.fits_in(there):
                    return of
        return None

    def _most_there(self, room: Room, priority: int) -> Resources:
        there = room.later
        for of, (_, amount) in room.node.piles.items():
            if COMING < of <= priority:
                there = there.plus(amount)
        return there

    def _take_from_rich(self, standing: Standing, within: str) -> bool:
        for rich in itertools.islice(self._rich(standing.group.priority, within).walk(), RICH):
            if not self._shares.may_take(standing, rich, 0):
                return False
            if rich.session == standing.session:
                continue
            bindings = self._view.sessions[rich.session].bindings.values()
            for name in itertools.islice(sorted({binding.node for binding in bindings if not binding.leave}), NODES):
                room = self._places.rooms.get(name)
                if room is not None and self._take(room, standing, within):
                    return True
        return False

    def _take(self, room: Room, standing: Standing, within: str) -> bool:
        """Make room on one node, if that is possible."""
        chosen = self._choose(room, standing, within)
        if chosen is None:
            return False
        for victim in chosen:
            self._send_away(victim)
        room.keep(standing.group.request)
        return True

    def _choose(self, room: Room, standing: Standing, within: str) -> list[Victim] | None:
        """Return whom to tell on one node; ``None`` if all that may be told are not enough."""
        request, priority = standing.group.request, standing.group.priority
        there, chosen = room.later, list[Victim]()
        losses: dict[str, int] = {}
        for victim in self._victims(room):
            if request.fits_in(there):
                break
            other = victim.standing
            if other.group.priority > priority or other.session == standing.session or victim.key in self._gone:
                continue
            if within not in ("", other.group.application):
                continue
            below = victim.spare or other.group.priority < priority
            if below or self._shares.may_take(standing, other, losses.get(other.session, 0)):
                chosen.append(victim)
                losses[other.session] = losses.get(other.session, 0) + 1
                there = there.plus(victim.uses)
        if not request.fits_in(there):
            return None
        for victim in reversed(chosen[:-1]):  # smaller ones were passed before a larger one made up for them
            if request.fits_in(there.minus(victim.uses)):
                there = there.minus(victim.uses)
                chosen.remove(victim)
        return chosen

    def _victims(self, room: Room) -> list[Victim]:
        """Return who might be told to leave a node, by order."""
        found = self._on_node.get(room.name)
        if found is None:
            found = []
            for key, uses in room.node.bindings.items():
                priority = room.node.pile_of[key]
                standing = None if priority == COMING else self._standing(self._view.bindings[key].session)
                if standing is not None:
                    spare = key in standing.spare
                    order = (not spare, priority, -self._shares.share(standing), key)
                    found.append(Victim(order, uses, standing, spare))
            found.sort(key=lambda victim: victim.order)
        elif found and found[0].key in self._gone:
            found = [victim for victim in found if victim.key not in self._gone]
        self._on_node[room.name] = found
        return found

    def _standing(self, session: str) -> Standing | None:
        """Return the standing of a session that may lose executors now."""
        return None if self._view.sessions[session].busy else self._shares.of(session)

    def _send_away(self, victim: Victim) -> None:
        name = victim.standing.session
        self._shares.taken[name] = self._shares.taken.get(name, 0) + 1
        self._let_go(victim.key)
        self._tell(name, victim.key)

    def _let_go(self, key: str) -> None:
        binding = self._view.bindings[key]
        self._gone.add(key)
        room = self._places.rooms.get(binding.node)
        if room is not None and room.node.pile_of[key] != COMING:
            room.later = room.later.plus(room.node.bindings[key])

    # ---- under a limit

    def make_place(self, standing: Standing, limit: Limit, application: str, free: Room | Seats | None) -> bool:
        """Keep one of the places of a limit that is reached, and room on a node for it: ``free`` if there is some.

        ``application`` is empty if the limit is that of the cluster.
        """
        room = free or self._coming_room(standing.group.request)
        if room is None:
            return self.make_room(standing, application)
        if not self._take_place(standing, limit, application):
            return False
        room.keep(standing.group.request)
        return True

    def _coming_room(self, request: Resources) -> Room | None:
        return next((room for room in self._places.rooms.values() if request.fits_in(room.later)), None)

    def _take_place(self, standing: Standing, limit: Limit, application: str) -> bool:
        if limit.coming > 0:
            limit.coming -= 1
            return True
        own = standing.group.priority
        kinds = {key.priority for key, _ in self._shares.groups() if application in ("", key.application)}
        for priority in sorted(kind for kind in kinds if kind <= own):
            for rich in itertools.islice(self._rich(priority, application).walk(), RICH):
                if priority == own and not self._shares.may_take(standing, rich, 0):
                    break
                if rich.session == standing.session or self._standing(rich.session) is None:
                    continue
                session = self._view.sessions[rich.session]
                staying = [
                    key
                    for key, binding in session.bindings.items()
                    if not binding.leave and key not in self._gone and not self._view.is_attached(binding.node)
                ]
                if staying:
                    key = min(staying, key=lambda key: (key not in rich.spare, key))
                    uses = session.record.options.resources
                    self._send_away(Victim((False, priority, 0.0, key), uses, rich, spare=key in rich.spare))
                    return True
        return False

    def _rich(self, priority: int, application: str) -> Richest:
        found = self._richest.get((priority, application))
        if found is None:
            groups = (
                queue
                for key, queue in self._shares.groups()
                if key.priority == priority and application in ("", key.application)
            )
            found = self._richest[priority, application] = Richest(self._shares, groups)
        return found
