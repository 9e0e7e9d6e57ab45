"""What one session needs, whatever others do."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final

from flame.protocol.records import BindingRecord
from flame.protocol.states import CloseMode, ExecutorState, NodeState, SessionState
from flame_services.scheduler import reasons
from flame_services.scheduler.parts import Executor, Session
from flame_services.scheduler.standings import GroupKey, Standing
from flame_services.scheduler.steps import Plan, Step
from flame_services.scheduler.view import View

WORTH_S: Final = 1.0
"""A backlog that the present executors finish within this time is not worth another one."""
JUDGE_S: Final = 0.2
"""A session whose executors have finished nothing yet gets more for its backlog only when one has served for this long:
by then short tasks would have been reported, and a thousand of them need no executor each."""

LAG_S: Final = 0.3
"""What an executor says to wait may have been seen so long before."""
CERTAIN_S: Final = 2.0
"""What an executor has said to wait for this long does: its manager would have corrected it by now."""

Serving = list[tuple[str, BindingRecord, Executor | None]]


def look_at(view: View, session: Session, now: float, result: Plan) -> Step:
    """Return what is to be done about a session; put its standing, and when to look again, into ``result``."""
    step = Step(session.id)
    serving: Serving = []
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
    elif session.record.state is SessionState.OPEN or (
        session.drains and session.record.application in view.applications
    ):
        _go_on(view, session, step, serving, now, result)
    else:
        _end(session, step, serving)
    return step


def _end(session: Session, step: Step, serving: Serving) -> None:
    record = session.record
    step.force = record.state is SessionState.CLOSING and record.close_mode is CloseMode.FORCE
    step.leave = [key for key, binding, _ in serving if not binding.leave or (step.force and not binding.force)]
    step.settle = session.unsettled and not session.bindings


def _go_on(view: View, session: Session, step: Step, serving: Serving, now: float, result: Plan) -> None:
    staying = [(key, executor) for key, binding, executor in serving if not binding.leave]
    least, most = view.least(session), view.most(session)
    executors = [executor for _, executor in staying]
    wanted = wanted_executors(least=least, most=most, demand=session.demand, serving=executors, now=now)
    if wanted < most:
        _look_again(result, session, _certain_at(executors, now))
    if wanted > max(least, len(staying)) > 0 and (judged_at := _judged_at(executors)) > now:
        wanted = max(least, len(staying))
        _look_again(result, session, judged_at)
    idle = sorted(
        (executor.idle_since, key)
        for key, executor in staying
        if executor is not None and executor.idle_since is not None and not view.is_attached(executor.record.node)
    )
    spare = [key for _, key in idle[: max(0, len(staying) - wanted)]]
    _let_rest(view, session, step, idle[: len(spare)], now, result)
    has = len(staying) - len(step.leave)
    standing = Standing(
        session.id,
        GroupKey(session.record.options.priority, session.record.application, session.record.options.resources),
        view.weight(session),
        session.record.created,
        has,
        spare=tuple(spare[len(step.leave) :]),
        avoid=session.avoid,
    )
    # Those that leave are still there, for the session's limit, until they are gone.
    lacks = max(0, min(wanted - len(staying), most - len(serving)))
    if lacks and now < session.retry_at:
        _look_again(result, session, session.retry_at)
        result.waits[session.id] = reasons.retries(session, view.spec_of(session).session_retry_limit)
    elif lacks:
        standing.lacks = lacks
        standing.together = least if not staying and least > 1 else 1
    if standing.has or standing.lacks:
        result.standings.append(standing)
    if session.drains:
        _drain(session, step, staying, now, result)
    elif not session.bindings and view.idle_limit(session) <= now + view.wall_ahead_s:
        step.close_idle = True


def _judged_at(executors: list[Executor | None]) -> float:
    """Return from when on it is known whether tasks are short; infinity if no executor serves yet."""
    at = math.inf
    for executor in executors:
        if executor is not None and executor.serving_since is not None:
            if executor.finished:
                return 0.0
            at = min(at, executor.serving_since + JUDGE_S)
    return at


def _let_rest(
    view: View, session: Session, step: Step, idle: list[tuple[float, str]], now: float, result: Plan
) -> None:
    """Let executors leave that have had nothing to do for the application's delay."""
    delay_s = view.spec_of(session).delay_release_s
    for since, key in idle:
        if since + delay_s <= now:
            step.leave.append(key)
        else:
            _look_again(result, session, since + delay_s)
            return


def _drain(session: Session, step: Step, staying: list[tuple[str, Executor | None]], now: float, result: Plan) -> None:
    """Ask for a look whether a task is stored when nobody seems to have one."""
    if session.demand or any(executor is None or executor.idle_since is None for _, executor in staying):
        return
    if now >= session.look_from:
        step.look = True
    else:
        _look_again(result, session, session.look_from)


def _look_again(result: Plan, session: Session, at: float) -> None:
    if at == math.inf:
        return
    result.timers[session.id] = min(at, result.timers.get(session.id, math.inf))


def _certain_at(executors: list[Executor | None], now: float) -> float:
    """Return when the next of those that say that something waits will have said so for long enough."""
    times = (e.pending_at + CERTAIN_S for e in executors if e is not None and e.record.pending)
    return min((at for at in times if at > now), default=math.inf)


def _backlog(executor: Executor, begun: list[float], now: float) -> int:
    """Return how much of what an executor says to wait still may.

    Each of those that have begun since has taken one, so nobody else need be bound for that.
    """
    pending = executor.record.pending
    if not pending or now >= executor.pending_at + CERTAIN_S:
        return pending
    since = executor.pending_at - LAG_S
    itself = executor.serving_since is not None and executor.serving_since > since
    return pending - (len(begun) - bisect_right(begun, since) - itself)


def wanted_executors(
    *, least: int, most: int, demand: bool, serving: list[Executor | None], now: float = math.inf
) -> int:
    """Return how many executors a session should have, by what those it has report.

    One that has not reported yet counts as one that will take a task. Idle ones are kept here and left to the delayed
    release, so that a burst that comes back finds them warm.
    """
    count = len(serving)
    if count == 0:
        return min(most, max(least, 1 if demand else 0))
    coming = idle = pending = rated = 0
    rate = 0.0
    begun = sorted(e.serving_since for e in serving if e is not None and e.serving_since is not None)
    for executor in serving:
        if executor is None:
            coming += 1
            continue
        record = executor.record
        pending = max(pending, _backlog(executor, begun, now))
        if record.state is not ExecutorState.BOUND:
            coming += 1
        elif record.idle:
            idle += 1
        if executor.rate > 0:
            rated += 1
            rate += executor.rate
    if idle or pending <= coming:
        return min(most, max(least, count - idle))
    target = count + pending - coming
    if rated:
        # Those that have finished nothing yet are as fast as the others, and those that come are on their way already.
        taking = max(rated, count - coming)
        target = min(target, taking + math.floor(pending / (rate / rated * taking) / WORTH_S))
    return min(most, max(least, count, target))


def lost(view: View, binding: BindingRecord) -> bool:
    """Whether the executor of a binding is given up, since its node is."""
    node = view.nodes.get(binding.node)
    return node is None or node.state is NodeState.NOT_READY
