"""What the scheduler knows of the cluster: the control plane's records, indexed, and kept as they change.

No I/O and no clock: whoever feeds the view says what time it is. `plan` reads it and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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

NOTHING: Final = Resources()


@dataclass(slots=True)
class Session:
    """A session and what serves it."""

    record: SessionRecord
    revision: int
    bindings: dict[str, BindingRecord] = field(default_factory=dict)
    """By key."""
    demand: bool = False
    """A task waits and nobody serves the session."""
    busy: bool = False
    """A decision about it is being carried out."""
    retry_at: float = 0.0
    """After a failure: nothing is bound before."""
    crashes: int = 0
    """Executors lost in a row, for the back-off."""
    epoch_over: bool = False
    """Its consumer was deleted: the next executor begins a new epoch."""
    avoid: str = ""
    """The node where the last attempt failed."""

    @property
    def id(self) -> str:
        """The session's id."""
        return self.record.id

    @property
    def unsettled(self) -> bool:
        """Whether it has ended but some of its tasks may lack their records."""
        return self.record.state is not SessionState.OPEN and not self.record.settled


@dataclass(slots=True)
class Executor:
    """An executor and how it has fared."""

    record: ExecutorRecord
    idle_since: float | None = None
    """When it was first seen to have nothing to do."""
    finished: int = 0
    finished_at: float = 0.0
    rate: float = 0.0
    """Tasks a second, lately."""


@dataclass(slots=True)
class Node:
    """A node, and what is left of it."""

    record: NodeRecord
    seen_at: float
    """When its heartbeat was last seen to change."""
    state: NodeState = NodeState.READY
    used: Resources = NOTHING
    bindings: dict[str, Resources] = field(default_factory=dict)
    """What each of its bindings uses, by key."""

    @property
    def free(self) -> Resources:
        """What no binding uses."""
        return self.record.capacity.minus(self.used)

    @property
    def takes(self) -> bool:
        """Whether new executors may be placed there."""
        return self.state is NodeState.READY and not self.record.stopping


NO_APPLICATION: Final = ApplicationSpec(command="-")
"""Stands in for an application that is not registered any more."""


class View:
    """The cluster as this scheduler knows it."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.applications: dict[str, ApplicationRecord] = {}
        self.sessions: dict[str, Session] = {}
        self.nodes: dict[str, Node] = {}
        self.executors: dict[str, Executor] = {}
        self.bindings: dict[str, BindingRecord] = {}
        self.active: set[str] = set()
        """Sessions that may need something; the others are not looked at."""

    # ---- feeding

    def put_application(self, name: str, record: ApplicationRecord | None) -> None:
        """Take over an application, or that it is gone."""
        if record is None:
            self.applications.pop(name, None)
        else:
            self.applications[name] = record

    def put_session(self, session_id: str, record: SessionRecord | None, revision: int) -> Session | None:
        """Take over a session, or that it is gone; return it."""
        if record is None:
            self.sessions.pop(session_id, None)
            self.active.discard(session_id)
            return None
        session = self.sessions.get(session_id)
        if session is None:
            session = self.sessions[session_id] = Session(record, revision)
            for key, binding in self.bindings.items():
                if binding.session == session_id:
                    session.bindings[key] = binding
                    self._use(key, binding, 1)
        elif revision >= session.revision:
            session.record = record
            session.revision = revision
        self.touch(session)
        return session

    def put_binding(self, key: str, record: BindingRecord | None) -> None:
        """Take over a binding, or that it is gone."""
        old = self.bindings.pop(key, None)
        if old is not None:
            self._use(key, old, -1)
            session = self.sessions.get(old.session)
            if session is not None:
                session.bindings.pop(key, None)
                self.touch(session)
        if record is not None:
            self.bindings[key] = record
            self._use(key, record, 1)
            session = self.sessions.get(record.session)
            if session is not None:
                session.bindings[key] = record
                self.touch(session)

    def put_executor(self, key: str, record: ExecutorRecord | None, now: float) -> None:
        """Take over an executor, or that it is gone."""
        if record is None:
            self.executors.pop(key, None)
            return
        executor = self.executors.get(key)
        if executor is None:
            executor = self.executors[key] = Executor(record, finished_at=now)
        executor.record = record
        if not record.idle or record.state is not ExecutorState.BOUND:
            executor.idle_since = None
        elif executor.idle_since is None:
            executor.idle_since = now
        finished = record.succeeded + record.failed
        if finished > executor.finished and now > executor.finished_at:
            executor.rate = (finished - executor.finished) / (now - executor.finished_at)
        if finished != executor.finished:
            executor.finished, executor.finished_at = finished, now
        session = self.sessions.get(record.session)
        if session is not None:
            self.touch(session)

    def put_node(self, name: str, record: NodeRecord | None, now: float) -> None:
        """Take over a node's heartbeat, or that it is gone."""
        if record is None:
            self.nodes.pop(name, None)
            return
        node = self.nodes.get(name)
        if node is None:
            node = self.nodes[name] = Node(record, now)
            for key, binding in self.bindings.items():
                if binding.node == name:
                    self._use(key, binding, 1)
        node.record = record
        node.seen_at = now
        node.state = NODE.next(node.state, NodeEvent.BEAT)

    def age_nodes(self, now: float, *, give_up: bool = True) -> bool:
        """Judge nodes by when they were last heard of; tell whether any judgement changed.

        Without ``give_up`` none is given up, however long it has been silent.
        """
        changed = False
        for node in self.nodes.values():
            silent_s = now - node.seen_at
            if node.state is NodeState.READY and silent_s > defaults.NODE_UNKNOWN_S:
                node.state = NODE.next(node.state, NodeEvent.MISSED)
                changed = True
            if give_up and node.state is NodeState.UNKNOWN and silent_s > defaults.NODE_GIVEN_UP_S:
                node.state = NODE.next(node.state, NodeEvent.GIVEN_UP)
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
        """Keep `active` exact for one session."""
        if session.bindings or session.demand or session.unsettled or self.least(session) > 0:
            self.active.add(session.id)
        else:
            self.active.discard(session.id)

    # ---- reading

    def spec_of(self, session: Session) -> ApplicationSpec:
        """Return what the session's application says."""
        application = self.applications.get(session.record.application)
        return NO_APPLICATION if application is None else application.spec

    def least(self, session: Session) -> int:
        """Return how many executors an open session has even with nothing to do."""
        if session.record.state is not SessionState.OPEN:
            return 0
        own = session.record.options.min_instances
        return min(self.most(session), self.spec_of(session).min_instances if own is None else own)

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

    def request_of(self, session_id: str) -> Resources:
        """Return what one executor of a session needs."""
        session = self.sessions.get(session_id)
        return defaults.RESOURCES if session is None else session.record.options.resources

    def _use(self, key: str, binding: BindingRecord, sign: int) -> None:
        node = self.nodes.get(binding.node)
        if node is None:
            return
        # What was added is taken away again, whatever has become known of the session meanwhile.
        before = node.bindings.pop(key, NOTHING)
        if sign > 0:
            node.bindings[key] = self.request_of(binding.session)
        after = node.bindings.get(key, NOTHING)
        node.used = node.used.minus(before).plus(after) if node.bindings else NOTHING
