"""One kind of the control plane's records: written to its bucket, and heard of as it changes there.

What this scheduler writes is handed on at once; the same change, heard again from the broker, is ignored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker, Entry, Subscription
from flame.errors import MalformedMessage, Unavailable
from flame.logs import get_logger
from flame.protocol.codec import peek
from flame.protocol.records import Record

log = get_logger("flame.scheduler")

R = TypeVar("R", bound=Record)


class Table(Generic[R]):
    """One bucket of records."""

    def __init__(
        self,
        broker: Broker,
        bucket: str,
        kind: type[R],
        pattern: str,
        feed: Callable[[str, R | None, int], None],
        known: Callable[[str], tuple[R, int] | None] = lambda _key: None,
    ) -> None:
        """Follow ``pattern`` of ``bucket``, handing each change to ``feed``.

        ``known`` returns what was handed on of a key, with its revision: where that is still so, nothing need be read.
        """
        self._known = known
        self._bucket = broker.bucket(bucket)
        self._name = bucket
        self._kind = kind
        self._pattern = pattern
        self._feed = feed
        self._revisions: dict[str, int] = {}
        """The newest of each key, or what its deletion here made of it, until the watch has heard of that too."""
        self._doubtful: set[str] = set()
        self.unreadable: dict[str, dict[str, Any]] = {}
        """Keys with something that this program can't read, such as a record of a newer version, as far as it goes.

        Hands off what they are about.
        """

    async def follow(self) -> Subscription:
        """Read everything, then go on hearing of changes."""
        return await self._bucket.watch(self._pattern, self._on_entry)

    async def get(self, key: str) -> tuple[R, int] | None:
        """Read a record from the broker itself; raise `MalformedMessage` if there is something else."""
        entry = await self._bucket.get(key)
        if entry is None or entry.value is None:
            return None
        try:
            return self._kind.decode(entry.value), entry.revision
        except MalformedMessage as error:
            raise type(error)(f"{self._name}: {key}: {error}") from None

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
            self._doubtful.discard(key)  # before it is read: a write may fail meanwhile
            try:
                await self.refresh(key)
            except BaseException:
                self._doubtful.add(key)
                raise

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
        doesn't exist. ``make`` may be called more than once: only what it did last counts.
        """
        known = self._known(key)
        if known is not None:
            record, revision = known
            new = make(record)
            if new is not None and new != record:  # otherwise somebody may have changed it since
                with contextlib.suppress(RevisionConflict):
                    await self.update(key, new, revision)
                    return new
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
        try:
            record = self._kind.decode(entry.value)
        except MalformedMessage as error:
            self._leave_alone(entry, error)
        else:
            self._take(entry.key, record, entry.revision)

    def _leave_alone(self, entry: Entry, error: MalformedMessage) -> None:
        """Forget what was known of a key and remember that there is something."""
        if entry.revision <= self._revisions.get(entry.key, 0):
            return
        if entry.key not in self.unreadable:
            log.warning(
                "a record can't be read, and what it is about is left alone; is this scheduler older than others?",
                bucket=self._name,
                key=entry.key,
                error=str(error),
            )
        self.unreadable[entry.key] = peek(entry.value or b"")
        self._revisions[entry.key] = entry.revision
        self._feed(entry.key, None, entry.revision)

    def _take(self, key: str, record: R | None, revision: int) -> None:
        if revision <= self._revisions.get(key, 0):
            return
        self._revisions[key] = revision
        self.unreadable.pop(key, None)
        self._feed(key, record, revision)
