"""What should be done next: a pure function of the view and the time.

Decisions about one session come together in one `Step`, are carried out in its order, and the session is not looked
at again until that is done. So whoever plans says to the view what it does::

    decided = plan(view, now)
    for session in view.planned(decided):
        ...  # its `waits_for` is another one now
    ...  # carry the steps out, and when one is finished or given up:
    view.done(step.session)

Only sessions about which something changed since the last plan are looked at, and those for which it is time. The
others stand as they stood: who lacks executors waits in a lane of its kind, in the order of shares, and a lane is left
as soon as its first can't be helped. A round costs what changed, and what it gives.

Places are given to higher priorities first, and among equals to who has the smallest share of the cluster, one at a
time. Who finds no place is no obstacle to those behind it, except that room which is being made for it is kept.
"""

from __future__ import annotations

import heapq
from typing import Any

from flame.protocol.records import ApplicationSpec
from flame.protocol.resources import Resources
from flame_services.scheduler import reasons
from flame_services.scheduler.needs import look_at, lost, wanted_executors
from flame_services.scheduler.places import Places
from flame_services.scheduler.reclaim import Limit, Reclaim
from flame_services.scheduler.shares import Shares
from flame_services.scheduler.standings import LaneKey, Queue, Standing
from flame_services.scheduler.steps import Plan, Step
from flame_services.scheduler.view import NO_APPLICATION, View

__all__ = ["Plan", "Step", "lost", "plan", "wanted_executors"]


def plan(view: View, now: float) -> Plan:
    """Decide what to do. Reads the view, changes nothing."""
    result = Plan([], made_at=now)
    steps: dict[str, Step] = {}
    for session_id in view.due(now):
        session = view.sessions[session_id]
        result.looked_at.append(session_id)
        if not session.busy:
            step = look_at(view, session, now, result)
            if step:
                steps[session_id] = step
    _Round(view, result, steps).give()
    result.steps = [steps[session_id] for session_id in sorted(steps)]
    result.look_again_at = min(view.next_due(now), *result.timers.values(), float("inf"))
    return result


class _Round:
    """Gives places to those who lack executors."""

    def __init__(self, view: View, result: Plan, steps: dict[str, Step]) -> None:
        self._view = view
        self._result = result
        self._steps = steps
        self._shares = Shares(view, set(result.looked_at), result.standings)
        self._heap: list[tuple[Any, ...]] = []
        self._blocked: dict[LaneKey, str] = {}
        self._possible: dict[Resources, bool] = {}
        self._limits: dict[str, Limit | None] = {}
        self._leaving = {key: step.session for step in steps.values() for key in step.leave}

    def give(self) -> None:
        for _, lane in self._shares.lanes():
            self._push_waiting(lane, 0)
        if not self._heap:
            return
        self._places = Places(self._view.nodes, self._view.promised_on)
        self._capacities = [room.node.record.capacity for room in self._places.rooms.values()]
        self._reclaim: Reclaim | None = None
        while self._heap:
            *_, standing, lane, place = heapq.heappop(self._heap)
            key = self._lane_of(standing)
            holds = self._shares.holds(standing)
            if holds and key not in self._blocked:
                self._serve(standing, key)
            if holds and key in self._blocked:
                self._wait(standing, self._blocked[key])
            if lane is not None and standing.lane not in self._blocked:
                self._push_waiting(lane, 2 * place + 1)
                self._push_waiting(lane, 2 * place + 2)
        self._note_lanes()

    def _push_waiting(self, lane: Queue, place: int) -> None:
        if place < len(lane.heap):
            standing: Standing = lane.heap[place][-1]
            share = standing.rank * self._shares.part(standing.group.request)
            self._push(standing, share, lane, place)

    def _push(self, standing: Standing, share: float, lane: Queue | None = None, place: int = 0) -> None:
        order = (-standing.group.priority, share, standing.created, standing.session, id(standing))
        heapq.heappush(self._heap, (*order, standing, lane, place))

    def _lane_of(self, standing: Standing) -> LaneKey:
        return standing.lane if standing.session not in self._shares.given else LaneKey(standing.group, 1)

    def _serve(self, standing: Standing, key: LaneKey) -> None:
        """Give a session the next executor that it lacks, or those that must begin together, or block its lane."""
        reason = self._find(standing, key.together)
        if reason:
            self._blocked[key] = reason
            return
        given = self._shares.given[standing.session] = self._shares.given.get(standing.session, 0) + key.together
        if given < standing.lacks:
            self._push(standing, self._shares.share(standing))

    def _wait(self, standing: Standing, reason: str) -> None:
        if self._shares.is_fresh(standing.session) or standing.session in self._shares.given:
            self._result.waits[standing.session] = reason

    def _note_lanes(self) -> None:
        """Give the reason of a lane to those in it that the round did not come to."""
        self._result.lane_waits = self._blocked
        for key, lane in self._shares.lanes():
            if key in self._blocked:
                for standing in lane.standings():
                    name = standing.session
                    if self._shares.is_fresh(name) and self._shares.holds(standing) and name not in self._shares.given:
                        self._result.waits[name] = self._blocked[key]

    # ---- finding places

    def _find(self, standing: Standing, count: int) -> str:
        """Find places for so many executors at once, or have room made for them; otherwise return the reason."""
        group, spec = standing.group, self._spec(standing)
        seats = self._places.seats(group.application)
        if seats < count and not self._is_possible(group.request):
            return self._no_room(standing)
        for application in (group.application, ""):
            limit = self._limit(application)
            if limit is not None and limit.left < count:
                if count == 1 and self._make_place(standing, spec, limit, application):
                    return ""
                full = reasons.application_is_full(application, limit.most)
                return full if application else reasons.cluster_is_full(limit.most)
        if count == 1:
            found = self._bind(standing, spec)
        else:
            found = self._places.count(group.application, group.request, count) >= count and all(
                self._bind(standing, spec) for _ in range(count)
            )
        if found:
            return ""
        maker = self._room_maker()
        missing = count - int(seats)  # had there been one for a single executor, it would have been taken
        if count > 1 and maker.count(standing, missing) < missing:
            return reasons.together(count, self._places.count(group.application, group.request, count))
        if all(maker.make_room(standing) for _ in range(missing)):
            self._places.keep_seats(group.application)
            self._wait_for_room(standing)
            return ""
        return self._no_room(standing)

    def _is_possible(self, request: Resources) -> bool:
        """Whether a node is large enough, however much of it is free."""
        found = self._possible.get(request)
        if found is None:
            found = self._possible[request] = any(request.fits_in(capacity) for capacity in self._capacities)
        return found

    def _bind(self, standing: Standing, spec: ApplicationSpec) -> bool:
        group = standing.group
        room = self._places.find(group.application, group.request, spec.placement, standing.avoid)
        if room is None:
            return False
        room.take(group.request)
        for application in (group.application, ""):
            limit = self._limit(application)
            if limit is not None:
                limit.left -= 1
        self._step(standing.session).bind.append(room.name)
        return True

    def _make_place(self, standing: Standing, spec: ApplicationSpec, limit: Limit, application: str) -> bool:
        group = standing.group
        free = self._places.find(group.application, group.request, spec.placement, standing.avoid)
        if not self._room_maker().make_place(standing, limit, application, free):
            return False
        self._wait_for_room(standing)
        return True

    def _wait_for_room(self, standing: Standing) -> None:
        self._result.waits[standing.session] = reasons.ROOM_IS_MADE

    def _no_room(self, standing: Standing) -> str:
        if not self._places.rooms:
            return reasons.NO_COMMON_NODE if self._places.any_seats else reasons.NO_NODE
        request: Resources = standing.group.request
        others_first = any(request.fits_in(room.free) for room in self._places.rooms.values())
        return reasons.no_room(request, self._capacities, others_first)

    def _room_maker(self) -> Reclaim:
        if self._reclaim is None:
            self._reclaim = Reclaim(self._view, self._places, self._shares, self._leaving, self._tell_to_leave)
        return self._reclaim

    def _tell_to_leave(self, session: str, key: str) -> None:
        self._step(session).leave.append(key)

    def _step(self, session: str) -> Step:
        return self._steps.setdefault(session, Step(session))

    def _spec(self, standing: Standing) -> ApplicationSpec:
        record = self._view.applications.get(standing.group.application)
        return NO_APPLICATION if record is None else record.spec

    def _limit(self, application: str) -> Limit | None:
        """Return the limit of an application, or that of the cluster if it is empty."""
        if application in self._limits:
            return self._limits[application]
        view = self._view
        coming: set[str] = set(self._leaving)
        if application:
            record = view.applications.get(application)
            most = None if record is None else record.spec.max_executors
            used = view.executors_of.get(application, 0)
            coming = {key for key in coming if view.bindings[key].application == application}
            coming |= view.coming.get(application, set())
        else:
            most = view.max_executors
            used = len(view.bindings) + view.executors_promised
            coming.update(*view.coming.values())
        limit = None if most is None else Limit(max(0, most - used), len(coming), most)
        self._limits[application] = limit
        return limit
