"""What should be done next: a pure function of the view and the time.

Decisions about one session come together in one `Step`, are carried out in its order, and the session is not looked
at again until that is done.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Final

from flame.protocol.records import BindingRecord
from flame.protocol.resources import Resources
from flame.protocol.states import ExecutorState, NodeState, SessionState
from flame_services.scheduler.view import Executor, Node, Session, View

WORTH_S: Final = 1.0
"""A backlog that the present executors finish within this time is not worth another one."""


@dataclass(slots=True)
class Step:
    """What to do about one session."""

    session: str
    replace: bool = False
    """Its consumer's epoch is over: executors that may still live must not reach its tasks."""
    reap: list[str] = field(default_factory=list)
    """Bindings whose executors have ended."""
    leave: list[str] = field(default_factory=list)
    """Bindings whose executors are to leave."""
    bind: list[str] = field(default_factory=list)
    """Nodes on which to bind one more executor each."""
    settle: bool = False
    """It has ended and nobody serves it: give every task its record."""

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self.replace or self.settle or bool(self.reap or self.leave or self.bind)


@dataclass(slots=True)
class Plan:
    """All that should be done now, and when to look again if nothing changes."""

    steps: list[Step]
    look_again_at: float = math.inf


def plan(view: View, now: float) -> Plan:
    """Decide what to do. Reads the view, changes nothing."""
    result = Plan([])
    wishes: list[tuple[int, int, float, str]] = []
    steps: dict[str, Step] = {}
    for session_id in sorted(view.active):
        session = view.sessions[session_id]
        if session.busy:
            continue
        step = steps[session_id] = Step(session_id)
        missing = _look_at(view, session, step, now, result)
        serving = len(session.bindings) - len(step.reap)
        for rank in range(missing):
            heapq.heappush(
                wishes, (-session.record.options.priority, serving + rank, session.record.created, session_id)
            )
    _place(view, wishes, steps)
    result.steps = [step for step in steps.values() if step]
    return result


def _look_at(view: View, session: Session, step: Step, now: float, result: Plan) -> int:
    """Fill in a session's step and return how many executors more it should have."""
    serving: list[tuple[str, BindingRecord, Executor | None]] = []
    for key, binding in session.bindings.items():
        executor = view.executors.get(key)
        if executor is not None and executor.record.state is ExecutorState.RELEASED:
            step.reap.append(key)
        elif lost(view, binding):
            step.replace = True
        else:
            serving.append((key, binding, executor))
    if step.replace:
        # Whatever of it still lives elsewhere shares the consumer that is given up, so it is replaced as well.
        step.leave = [key for key, binding, _ in serving if not binding.leave]
        return 0
    if session.record.state is not SessionState.OPEN:
        step.leave = [key for key, binding, _ in serving if not binding.leave]
        step.settle = session.unsettled and not session.bindings
        return 0
    staying = [(key, executor) for key, binding, executor in serving if not binding.leave]
    wanted = wanted_executors(
        least=view.least(session),
        most=view.most(session),
        demand=session.demand,
        serving=[executor for _, executor in staying],
    )
    if len(staying) > wanted:
        step.leave = _superfluous(view, session, staying, len(staying) - wanted, now, result)
    if len(staying) >= wanted:
        return 0
    if now < session.retry_at:
        result.look_again_at = min(result.look_again_at, session.retry_at)
        return 0
    return min(wanted - len(staying), view.most(session) - len(serving))  # those that leave are still there


def wanted_executors(*, least: int, most: int, demand: bool, serving: list[Executor | None]) -> int:
    """Return how many executors a session should have, by what those it has report.

    One that has not reported yet counts as one that will take a task. Idle ones are kept here and left to the delayed
    release, so that a burst that comes back finds them warm.
    """
    count = len(serving)
    if count == 0:
        return min(most, max(least, 1 if demand else 0))
    known = [executor for executor in serving if executor is not None]
    coming = sum(1 for e in serving if e is None or e.record.state is not ExecutorState.BOUND)
    idle = sum(1 for e in known if e.record.state is ExecutorState.BOUND and e.record.idle)
    pending = max((e.record.pending for e in known), default=0)
    if idle or pending <= coming:
        busy_enough = count if not idle else count - idle
        return min(most, max(least, busy_enough))
    rate = sum(e.rate for e in known)
    more = pending - coming if rate <= 0 else min(pending - coming, math.floor(pending / rate / WORTH_S))
    return min(most, max(least, count + more))


def _superfluous(
    view: View, session: Session, staying: list[tuple[str, Executor | None]], count: int, now: float, result: Plan
) -> list[str]:
    """Choose executors that have had nothing to do for the application's delay."""
    delay_s = view.spec_of(session).delay_release_s
    idle = sorted(
        (executor.idle_since, key)
        for key, executor in staying
        if executor is not None and executor.idle_since is not None
    )
    chosen = []
    for since, key in idle[:count]:
        if since + delay_s <= now:
            chosen.append(key)
        else:
            result.look_again_at = min(result.look_again_at, since + delay_s)
    return chosen


def lost(view: View, binding: BindingRecord) -> bool:
    """Whether the executor of a binding is given up, since its node is."""
    node = view.nodes.get(binding.node)
    return node is None or node.state is NodeState.NOT_READY


def _place(view: View, wishes: list[tuple[int, int, float, str]], steps: dict[str, Step]) -> None:
    """Give places to wishes: higher priority first, then who has fewer executors, then who is older."""
    free: dict[str, Resources] = {name: node.free for name, node in view.nodes.items() if node.takes}
    refused: set[str] = set()
    while wishes:
        _, _, _, session_id = heapq.heappop(wishes)
        if session_id in refused:
            continue
        request = view.request_of(session_id)
        avoid = view.sessions[session_id].avoid
        name = _roomiest(free, view.nodes, request, avoid)
        if name is None:
            refused.add(session_id)  # what it needs isn't there; others may need less
            continue
        free[name] = free[name].minus(request)
        steps[session_id].bind.append(name)


def _roomiest(free: dict[str, Resources], nodes: dict[str, Node], request: Resources, avoid: str) -> str | None:
    """Return the node with the most room, avoiding one where another will do."""
    best: str | None = None
    best_rank: tuple[bool, float, int, str] | None = None
    for name, room in free.items():
        if not request.fits_in(room):
            continue
        capacity = nodes[name].record.capacity
        share = room.cpu / capacity.cpu if capacity.cpu else 0.0
        rank = (name != avoid, share, -len(nodes[name].bindings), name)
        if best_rank is None or rank > best_rank:
            best, best_rank = name, rank
    return best
