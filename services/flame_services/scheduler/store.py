"""The control plane's records: written to the buckets, and kept in the view as they change there.

What this scheduler writes is in its view at once; the same change, heard again from the broker, is ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker, Entry, Subscription
from flame.errors import FlameError, Unavailable
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.records import (
    ApplicationRecord,
    BindingRecord,
    ExecutorRecord,
    NodeRecord,
    Record,
    SessionRecord,
    decode_record,
)
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

R = TypeVar("R", bound=Record)


class Table(Generic[R]):
    """One bucket of records."""

    def __init__(
        self, broker: Broker, bucket: str, kind: type[R], pattern: str, feed: Callable[[str, R | None, int], None]
    ) -> None:
        """Follow ``pattern`` of ``bucket``, handing each change to ``feed``."""
        self._bucket = broker.bucket(bucket)
        self._name = bucket
        self._kind = kind
        self._pattern = pattern
        self._feed = feed
        self._revisions: dict[str, int] = {}
        self._doubtful: set[str] = set()
        """The newest of each key, or what its deletion here made of it, until the watch has heard of that too."""

    async def follow(self) -> Subscription:
        """Read everything, then go on hearing of changes."""
        return await self._bucket.watch(self._pattern, self._on_entry)

    async def get(self, key: str) -> tuple[R, int] | None:
        """Read a record from the broker itself."""
        entry = await self._bucket.get(key)
        if entry is None or entry.value is None:
            return None
        record = decode_record(self._kind, entry.value)
        return None if record is None else (record, entry.revision)

    def revision(self, key: str) -> int:
        """Return the revision of a key as it is known here; 0 if it is not."""
        return self._revisions.get(key, 0)

    async def refresh(self, key: str) -> None:
        """Read a key from the broker itself and hand on what changed: the watch may be behind."""
        entry = await self._bucket.get(key)
        self._on_entry(Entry(key, None, 0) if entry is None else entry)

    async def settle_doubts(self) -> None:
        """Read the keys again whose writing was not acknowledged: it may have happened."""
        for key in tuple(self._doubtful):
            await self.refresh(key)
            self._doubtful.discard(key)

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except Unavailable:
            self._doubtful.add(key)
            raise

    async def create(self, key: str, record: R) -> int:
        """Write a key that has no record; raise `RevisionConflict` if it has one."""
        with self._writing(key):
            revision = await self._bucket.create(key, record.encode())
        self._take(key, record, revision)
        return revision

    async def update(self, key: str, record: R, revision: int) -> int:
        """Write a key that still has ``revision``; raise `RevisionConflict` if it was changed."""
        with self._writing(key):
            new = await self._bucket.update(key, record.encode(), revision)
        self._take(key, record, new)
        return new

    async def put(self, key: str, record: R) -> None:
        """Write a key that has no other writer."""
        with self._writing(key):
            revision = await self._bucket.put(key, record.encode())
        self._take(key, record, revision)

    async def delete(self, key: str) -> None:
        """Remove a key."""
        with self._writing(key):
            await self._bucket.delete(key)
        self._take(key, None, self._revisions.get(key, 0) + 1)

    async def change(self, key: str, make: Callable[[R], R | None]) -> R | None:
        """Change a record by compare-and-set, trying again when somebody else was quicker.

        ``make`` returns the new record, or ``None`` to leave it. Returns the record as it is then, ``None`` if it
        doesn't exist.
        """
        while True:
            found = await self.get(key)
            if found is None:
                return None
            record, revision = found
            new = make(record)
            if new is None or new == record:
                return record
            try:
                await self.update(key, new, revision)
            except RevisionConflict:
                continue
            return new

    def _on_entry(self, entry: Entry) -> None:
        if entry.value is None:
            known = self._revisions.get(entry.key, 0)
            if 0 < entry.revision < known:
                return  # it has been written here since
            self._take(entry.key, None, max(entry.revision, known + 1))
            del self._revisions[entry.key]  # everything older was heard before this
            return
        record = decode_record(self._kind, entry.value)
        if record is None:
            log.warning("a record can't be read and is ignored", bucket=self._name, key=entry.key)
            return
        self._take(entry.key, record, entry.revision)

    def _take(self, key: str, record: R | None, revision: int) -> None:
        if revision <= self._revisions.get(key, 0):
            return
        self._revisions[key] = revision
        self._feed(key, record, revision)


class Store:
    """All tables, and the view that they feed."""

    def __init__(self, broker: Broker, view: View) -> None:
        """Feed ``view``."""
        self._broker = broker
        self._view = view
        self.on_change: Callable[[], None] = lambda: None
        """Called after each change that a plan might answer."""
        self._loop = asyncio.get_running_loop()
        self._subscriptions: list[Subscription] = []
        self.on_session: Callable[[str, SessionRecord | None], None] = lambda _key, _record: None
        """Called with every session that changed or is gone."""
        self.common_data = broker.bucket(subjects.COMMON_DATA)
        self.applications = Table(broker, subjects.APPLICATIONS, ApplicationRecord, "*", self._feed_application)
        self.sessions = Table(broker, subjects.SESSIONS, SessionRecord, "*", self._feed_session)
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

    async def announce(self, record: SessionRecord) -> None:
        """Tell whoever listens what a session is now."""
        try:
            await self._broker.publish(subjects.session_events(record.application, record.id), record.encode())
        except FlameError as error:
            log.debug("a session's event was not sent", session=record.id, error=str(error))

    def _feed_application(self, key: str, record: ApplicationRecord | None, _revision: int) -> None:
        self._view.put_application(key, record)
        self.on_change()

    def _feed_session(self, key: str, record: SessionRecord | None, revision: int) -> None:
        self._view.put_session(key, record, revision)
        self.on_session(key, record)
        self.on_change()

    def _feed_binding(self, key: str, record: BindingRecord | None, _revision: int) -> None:
        self._view.put_binding(key, record)
        self.on_change()

    def _feed_executor(self, key: str, record: ExecutorRecord | None, _revision: int) -> None:
        self._view.put_executor(key, record, self._loop.time())
        self.on_change()

    def _feed_node(self, key: str, record: NodeRecord | None, _revision: int) -> None:
        before = self._view.nodes.get(key)
        took = before.takes if before is not None else None
        self._view.put_node(key, record, self._loop.time())
        after = self._view.nodes.get(key)
        if (after.takes if after is not None else None) != took:
            self.on_change()
