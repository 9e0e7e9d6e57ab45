"""The control plane's records, all kinds of them, and the view that they are kept in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flame.broker.seam import Broker, Subscription
from flame.protocol import subjects
from flame.protocol.records import (
    ApplicationRecord,
    BindingRecord,
    ExecutorRecord,
    NodeRecord,
    SessionRecord,
)
from flame.protocol.resources import Resources
from flame_services.scheduler.changes import Judgement
from flame_services.scheduler.herald import Herald
from flame_services.scheduler.table import Table
from flame_services.scheduler.view import View


class Store:
    """All tables, and the view that they feed."""

    def __init__(self, broker: Broker, view: View) -> None:
        """Feed ``view``."""
        self._view = view
        self.on_change: Callable[[], None] = lambda: None
        """Called after each change that a plan might answer."""
        self._loop = asyncio.get_running_loop()
        self._subscriptions: list[Subscription] = []
        self.on_session: Callable[[str, SessionRecord | None], None] = lambda _key, _record: None
        """Called with every session that changed or is gone."""
        self.herald: Herald | None = None
        """Told of every change; set while this scheduler is the one that plans."""
        self.common_data = broker.bucket(subjects.COMMON_DATA)
        self.credentials = broker.bucket(subjects.CREDENTIALS)
        self.state = broker.bucket(subjects.STATE)
        self.applications = Table(broker, subjects.APPLICATIONS, ApplicationRecord, "*", self._feed_application)
        self.sessions = Table(broker, subjects.SESSIONS, SessionRecord, "*", self._feed_session, self._known_session)
        self.bindings = Table(broker, subjects.BINDINGS, BindingRecord, "*.*", self._feed_binding)
        self.executors = Table(broker, subjects.EXECUTORS, ExecutorRecord, "*.*", self._feed_executor)
        self.nodes = Table(broker, subjects.NODES, NodeRecord, "*", self._feed_node)

    async def start(self) -> None:
        """Return when the view holds everything."""
        # Sessions before bindings: a binding counts with what its session asks for.
        for table in (self.applications, self.sessions, self.nodes, self.bindings, self.executors):
            self._subscriptions.append(await table.follow())

    async def stop(self) -> None:
        """Hear of nothing more."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.stop()

    async def settle_doubts(self) -> None:
        """Read again whatever a write that was not acknowledged may have changed."""
        for table in (self.applications, self.sessions, self.nodes, self.bindings, self.executors):
            await table.settle_doubts()

    def readable(self, application: str, session: str) -> bool:
        """Whether nothing keeps this scheduler from acting for a session: it can read all that is about it."""
        return not (
            session in self.sessions.unreadable
            or application in self.applications.unreadable
            or any(binding.get("session") == session for binding in self.bindings.unreadable.values())
        )

    async def is_known(self, session: str) -> bool:
        """Whether a session has a record, even one that can't be read. If the view has none, the broker is asked."""
        if session not in self._view.sessions and session not in self.sessions.unreadable:
            await self.sessions.refresh(session)
        return session in self._view.sessions or session in self.sessions.unreadable

    # ---- feeding

    def _feed_application(self, key: str, record: ApplicationRecord | None, _revision: int) -> None:
        before = self._view.applications.get(key)
        self._view.put_application(key, record)
        if self.herald is not None and key not in self.applications.unreadable:
            self.herald.application(before, record)
        self.on_change()

    def _feed_session(self, key: str, record: SessionRecord | None, revision: int) -> None:
        known = self._view.sessions.get(key)
        before = None if known is None else known.record
        self._view.put_session(key, record, revision)
        if self.herald is not None and key not in self.sessions.unreadable:
            self.herald.session(before, record)
        self.on_session(key, record)
        self.on_change()

    def _known_session(self, key: str) -> tuple[SessionRecord, int] | None:
        session = self._view.sessions.get(key)
        return None if session is None else (session.record, session.revision)

    def _feed_binding(self, key: str, record: BindingRecord | None, _revision: int) -> None:
        if key in self.bindings.unreadable:
            return  # what was known of it is the best there is
        self._view.put_binding(key, record)
        self.on_change()

    def _feed_executor(self, key: str, record: ExecutorRecord | None, _revision: int) -> None:
        if key in self.executors.unreadable:
            return  # the same
        known = self._view.executors.get(key)
        before = None if known is None else known.record
        self._view.put_executor(key, record, self._loop.time())
        if self.herald is not None:
            self.herald.executor(before, record)
        self.on_change()

    def _feed_node(self, key: str, record: NodeRecord | None, _revision: int) -> None:
        before = self._view.nodes.get(key)
        if key in self.nodes.unreadable:
            record = _living(key, None if before is None else before.record)
        took = before.takes if before is not None else None
        judged = Judgement.of(self._view, key)
        self._view.put_node(key, record, self._loop.time())
        if self.herald is not None:
            self.herald.node(key, judged, Judgement.of(self._view, key))
        after = self._view.nodes.get(key)
        if (after.takes if after is not None else None) != took:
            self.on_change()


def _living(name: str, known: NodeRecord | None) -> NodeRecord:
    """Stand in for the record of a node that beats but can't be read: it keeps what it has and gets nothing new."""
    if known is not None:
        return known.changed(stopping=True)
    return NodeRecord.model_construct(
        name=name, hostname="", arch="", os="", capacity=Resources(), started=0.0, stopping=True
    )
