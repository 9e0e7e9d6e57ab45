"""What the scheduler knows of the cluster: the control plane's records, indexed, and kept as they change.

No I/O and no clock: whoever feeds the view says what time it is. `plan` reads it and changes nothing.
"""

from __future__ import annotations

import math
from typing import Final

from flame.protocol import defaults
from flame.protocol.records import (
    ApplicationRecord,
    ApplicationSpec,
    BindingRecord,
    ExecutorRecord,
    NodeRecord,
    SessionRecord,
)
from flame.protocol.resources import Resources
from flame.protocol.states import NODE, ExecutorState, NodeEvent, NodeState, SessionState
from flame_services.scheduler.parts import COMING, Executor, Node, Session
from flame_services.scheduler.standings import Standings
from flame_services.scheduler.steps import Plan
from flame_services.scheduler.timers import Timers

__all__ = ["Executor", "Node", "Session", "View"]

LOOK_AGAIN_S: Final = 1.0
"""Between two looks whether a draining session still has a task."""
NO_APPLICATION: Final = ApplicationSpec(command="-")
"""Stands in for an application that is not registered any more."""


class View:
    """The cluster as this scheduler knows it.

    Whoever plans calls `planned` with each plan before it carries that out, and `done` when a session's step is
    finished or given up. `plan` looks at what has changed since.
    """

    def __init__(self, max_executors: int | None = None) -> None:
        """Know nothing yet. All sessions together have at most that many executors."""
        self.max_executors = max_executors
        self.wall_ahead_s = 0.0
        """Unix time less the time that plans are made at; idle limits count in Unix time."""
        self.applications: dict[str, ApplicationRecord] = {}
        self.sessions: dict[str, Session] = {}
        self.nodes: dict[str, Node] = {}
        self.executors: dict[str, Executor] = {}
        self.bindings: dict[str, BindingRecord] = {}
        self.changed: set[str] = set()
        """Sessions to look at: something about them changed and they may need something."""
        self.timers = Timers()
        """When to look at sessions about which nothing changed."""
        self.idle_limits = Timers()
        """When open sessions that nobody serves are to be closed, in Unix time."""
        self.standings = Standings()
        self.sessions_of: dict[str, set[str]] = {}
        """By application."""
        self.executors_of: dict[str, int] = {}
        """Bindings and promised ones of each application that has any."""
        self.executors_promised = 0
        self.promised_on: dict[str, list[Resources]] = {}
        """What executors will use that are just being bound, by node."""
        self.coming: dict[str, set[str]] = {}
        """Keys of bindings whose executors leave or have ended, by application."""
        self._keys_on: dict[str, set[str]] = {}
        """Bindings by node, also of nodes that are not known."""
        self._unclaimed: dict[str, dict[str, BindingRecord]] = {}
        """Bindings of sessions that are not known."""
        self._helped: set[str] = set()
        """Sessions with a reason of their own to wait although they have a standing."""

    # ---- feeding

    def put_application(self, name: str, record: ApplicationRecord | None) -> None:
        """Take over an application, or that it is gone."""
        if record is None:
            self.applications.pop(name, None)
        else:
            self.applications[name] = record
        for session_id in self.sessions_of.get(name, ()):
            self.touch(self.sessions[session_id])

    def put_session(self, session_id: str, record: SessionRecord | None, revision: int) -> Session | None:
        """Take over a session, or that it is gone; return it."""
        session = self.sessions.get(session_id)
        if record is None:
            if session is not None:
                self._drop_session(session)
            return None
        if session is None:
            session = self.sessions[session_id] = Session(record, revision, self._unclaimed.pop(session_id, {}))
            self.sessions_of.setdefault(record.application, set()).add(session_id)
            for key in session.bindings:
                self._account(key)
        elif revision >= session.revision:
            session.record = record
            session.revision = revision
        self.touch(session)
        return session

    def _drop_session(self, session: Session) -> None:
        self._forget_standing(session)
        self._break_promises(session)
        session_id = session.id
        del self.sessions[session_id]
        for timers in (self.timers, self.idle_limits):
            timers.clear(session_id)
        self.changed.discard(session_id)
        self._helped.discard(session_id)
        of_application = self.sessions_of[session.record.application]
        of_application.discard(session_id)
        if not of_application:
            del self.sessions_of[session.record.application]
        if session.bindings:
            self._unclaimed[session_id] = session.bindings
            for key in session.bindings:
                self._account(key)

    def put_binding(self, key: str, record: BindingRecord | None) -> None:
        """Take over a binding, or that it is gone."""
        old = self.bindings.pop(key, None)
        if old is not None:
            self._unlink(key, old)
        if record is None:
            return
        self.bindings[key] = record
        self._keys_on.setdefault(record.node, set()).add(key)
        self._count_executors(record.application, 1)
        session = self.sessions.get(record.session)
        if session is None:
            self._unclaimed.setdefault(record.session, {})[key] = record
        else:
            session.bindings[key] = record
            if old is None and record.node in session.promised:
                self._keep_promise(session, record.node)
            self.touch(session)
        self._account(key)

    def _unlink(self, key: str, old: BindingRecord) -> None:
        self._account(key, old)
        keys = self._keys_on[old.node]
        keys.discard(key)
        if not keys:
            del self._keys_on[old.node]
        self._count_executors(old.application, -1)
        session = self.sessions.get(old.session)
        if session is not None:
            session.bindings.pop(key, None)
            self.touch(session)
        elif old.session in self._unclaimed:
            unclaimed = self._unclaimed[old.session]
            unclaimed.pop(key, None)
            if not unclaimed:
                del self._unclaimed[old.session]

    def put_executor(self, key: str, record: ExecutorRecord | None, now: float) -> None:
        """Take over an executor, or that it is gone."""
        if record is None:
            known = self.executors.pop(key, None)
            session = None if known is None else self.sessions.get(known.record.session)
        else:
            executor = self.executors.get(key)
            if executor is None:
                executor = self.executors[key] = Executor(record, finished_at=now, pending_at=now)
            executor.take(record, now)
            session = self.sessions.get(record.session)
        if key in self.bindings:
            self._account(key)
        if session is not None:
            self.touch(session)

    def put_node(self, name: str, record: NodeRecord | None, now: float) -> None:
        """Take over a node's heartbeat, or that it is gone."""
        node = self.nodes.get(name)
        if record is None:
            if node is not None:
                del self.nodes[name]
                self._touch_node(name)
            return
        if node is None:
            node = self.nodes[name] = Node(record, now)
            for key in self._keys_on.get(name, ()):
                self._account(key)
            self._touch_node(name)
        served, node.record = node.record.application, record
        node.seen_at = now
        before, node.state = node.state, NODE.next(node.state, NodeEvent.BEAT)
        if before is NodeState.NOT_READY or record.application != served:
            self._touch_node(name)

    def age_nodes(self, now: float, *, give_up: bool = True) -> bool:
        """Judge nodes by when they were last heard of; tell whether any judgement changed.

        Without ``give_up`` none is given up, however long it has been silent.
        """
        changed = False
        for name, node in self.nodes.items():
            silent_s = now - node.seen_at
            if node.state is NodeState.READY and silent_s > defaults.NODE_UNKNOWN_S:
                node.state = NODE.next(node.state, NodeEvent.MISSED)
                changed = True
            if give_up and node.state is NodeState.UNKNOWN and silent_s > defaults.NODE_GIVEN_UP_S:
                node.state = NODE.next(node.state, NodeEvent.GIVEN_UP)
                self._touch_node(name)
                changed = True
        return changed

    def silent_nodes(self, now: float, longer_s: float) -> list[str]:
        """Return the nodes that were not heard of for longer than this, and are not given up yet."""
        return [
            name
            for name, node in self.nodes.items()
            if node.state is not NodeState.NOT_READY and now - node.seen_at > longer_s
        ]

    def forgive_nodes(self, now: float) -> None:
        """Give every node a full grace period: it was this scheduler that was away."""
        for node in self.nodes.values():
            node.seen_at = now

    def touch(self, session: Session) -> None:
        """Take note that something about a session changed that was set on it directly."""
        session_id = session.id
        self._forget_standing(session)
        self.timers.clear(session_id)
        self.idle_limits.set(session_id, self.idle_limit(session))
        if session.bindings or session.demand or session.unsettled or session.waits_for or self.least(session) > 0:
            self.changed.add(session_id)
        else:
            self.changed.discard(session_id)

    # ---- what becomes of plans

    def planned(self, decided: Plan) -> list[Session]:
        """Take note of a plan that is about to be carried out; return the sessions that wait for something else now."""
        reasons = {name: "" for name in decided.looked_at if not self.sessions[name].busy}
        for session_id in decided.looked_at:
            self.changed.discard(session_id)
            self.timers.clear(session_id)
            session = self.sessions[session_id]
            self._forget_standing(session)
            if session.busy:
                self.idle_limits.clear(session_id)
        for session_id, at in decided.timers.items():
            self.timers.set(session_id, at)
        for standing in decided.standings:
            self.sessions[standing.session].standing = standing
            self.standings.adopt(standing)
        for step in decided.steps:
            self.begin(self.sessions[step.session], step.bind)
            if step.look:
                self.sessions[step.session].look_from = decided.made_at + LOOK_AGAIN_S
        return self._note_waits(decided, reasons)

    def done(self, session_id: str) -> None:
        """Take note that nothing is being done about a session any more: it is looked at again."""
        session = self.sessions.get(session_id)
        if session is not None:
            session.busy = False
            self._break_promises(session)
            self.touch(session)

    def begin(self, session: Session, nodes: list[str]) -> None:
        """Take note that a step is being carried out which binds executors to ``nodes``."""
        self._forget_standing(session)
        self.changed.discard(session.id)
        self.timers.clear(session.id)
        self.idle_limits.clear(session.id)
        session.busy = True
        for name in nodes:
            session.promised.append(name)
            self.promised_on.setdefault(name, []).append(session.record.options.resources)
        self._count_executors(session.record.application, len(nodes))
        self.executors_promised += len(nodes)

    def _break_promises(self, session: Session) -> None:
        for name in tuple(session.promised):
            self._keep_promise(session, name)

    def _keep_promise(self, session: Session, name: str) -> None:
        session.promised.remove(name)
        self._count_executors(session.record.application, -1)
        self.executors_promised -= 1
        on_node = self.promised_on[name]
        on_node.remove(session.record.options.resources)
        if not on_node:
            del self.promised_on[name]

    def _note_waits(self, decided: Plan, reasons: dict[str, str]) -> list[Session]:
        """Keep the reasons of sessions to wait; ``reasons`` has those that were looked at, without any."""
        reasons.update((step.session, "") for step in decided.steps if step.bind)
        lanes = self.standings.lanes
        for key, reason in decided.lane_waits.items():
            lane = lanes.get(key)
            if lane is not None and lane.waits != reason:
                lane.waits = reason
                reasons.update((standing.session, reason) for standing in lane.standings())
        for name in self._helped:
            session = self.sessions[name]
            if session.standing is not None and name not in reasons:
                reasons[name] = lanes[session.standing.lane].waits if session.standing.lacks else ""
        reasons.update(decided.waits)
        self._helped = {name for name in decided.waits if self.sessions[name].standing is not None}
        found = []
        for name, reason in reasons.items():
            session = self.sessions[name]
            if session.waits_for != reason:
                session.waits_for = reason
                found.append(session)
        return found

    # ---- reading

    def due(self, now: float) -> list[str]:
        """Return the sessions to look at."""
        due = set(self.timers.due(now))
        due.update(self.idle_limits.due(now + self.wall_ahead_s))
        due |= self.changed
        return list(due)

    def next_due(self, now: float) -> float:
        """Return when sessions are to be looked at next, besides those that are now."""
        wall = now + self.wall_ahead_s
        idle = self.idle_limits.first_after(wall)
        return min(self.timers.first_after(now), idle - self.wall_ahead_s if idle < math.inf else math.inf)

    def spec_of(self, session: Session) -> ApplicationSpec:
        """Return what the session's application says."""
        application = self.applications.get(session.record.application)
        return NO_APPLICATION if application is None else application.spec

    def idle_limit(self, session: Session) -> float:
        """Return when, in Unix time, a session is closed for want of tasks if none comes; infinity: never."""
        record = session.record
        if record.state is not SessionState.OPEN or session.bindings or session.busy:
            return math.inf
        if session.demand or session.holds_tasks:
            return math.inf
        own = record.options.idle_timeout_s
        timeout_s = self.spec_of(session).idle_timeout_s if own is None else own
        return max(record.created, record.idle_since) + timeout_s if timeout_s > 0 else math.inf

    def least(self, session: Session) -> int:
        """Return how many executors an open session has even with nothing to do."""
        if session.record.state is not SessionState.OPEN:
            return 0
        own = session.record.options.min_instances
        least = self.spec_of(session).min_instances if own is None else own
        return min(self.most(session), least) if least else 0

    def most(self, session: Session) -> int:
        """Return how many executors a session may have.

        While it is served that is no more than its consumer was made for: its application may have been updated.
        """
        limit = self.spec_of(session).max_instances
        for binding in session.bindings.values():
            if 0 < binding.max_executors < limit and binding.epoch == session.record.epoch:
                limit = binding.max_executors
        own = session.record.options.max_instances
        return limit if own is None else min(own, limit)

    def is_attached(self, node: str) -> bool:
        """Whether a node serves one application only: somebody waits there, so its executors are left alone."""
        known = self.nodes.get(node)
        return known is not None and known.record.application != ""

    def weight(self, session: Session) -> float:
        """Return a session's part in relation to others'."""
        own = session.record.options.weight
        return self.spec_of(session).weight if own is None else own

    def request_of(self, session_id: str) -> Resources:
        """Return what one executor of a session needs."""
        session = self.sessions.get(session_id)
        return defaults.RESOURCES if session is None else session.record.options.resources

    # ---- indexes

    def _touch_node(self, name: str) -> None:
        """Look at every session that has an executor on a node."""
        for key in self._keys_on.get(name, ()):
            session = self.sessions.get(self.bindings[key].session)
            if session is not None:
                self.touch(session)

    def _forget_standing(self, session: Session) -> None:
        if session.standing is not None:
            self.standings.forget(session.standing)
            session.standing = None

    def _count_executors(self, application: str, change: int) -> None:
        count = self.executors_of.get(application, 0) + change
        if count:
            self.executors_of[application] = count
        else:
            self.executors_of.pop(application, None)

    def _account(self, key: str, gone: BindingRecord | None = None) -> None:
        """Keep what is known of one binding's place, also when it has just ``gone``."""
        binding = gone or self.bindings[key]
        session, executor = self.sessions.get(binding.session), self.executors.get(key)
        leaves = binding.leave or (executor is not None and executor.record.state is ExecutorState.RELEASED)
        coming = self.coming.get(binding.application)
        if leaves and gone is None:
            self.coming.setdefault(binding.application, set()).add(key)
        elif coming is not None and key in coming:
            coming.remove(key)
            if not coming:
                del self.coming[binding.application]
        node = self.nodes.get(binding.node)
        if node is None:
            return
        node.remove(key)
        if gone is not None:
            return
        uses = binding.resources
        if session is not None and uses == defaults.RESOURCES:  # older records don't say it
            uses = session.record.options.resources
        node.place(key, uses, COMING if session is None or leaves else session.record.options.priority)
