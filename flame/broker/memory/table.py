"""A bucket as the server keeps it: the last value of each key, by revision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from flame.broker.errors import RevisionConflict, TooLarge
from flame.broker.memory.clock import Clock
from flame.broker.memory.patterns import matches
from flame.broker.seam import Entry
from flame.protocol.topology import BucketSpec

MARKER_TTL_S: Final = 3600.0
"""How long it is kept in mind that a key was deleted, and at which revision."""

OnChange = Callable[[Entry], None]


class _Kept(NamedTuple):
    entry: Entry
    until: float
    """When it is gone; infinity unless the bucket has a time limit, or this marks a deletion."""


class MemoryTable:
    """One bucket. Nothing here waits or sends: callers do."""

    def __init__(self, spec: BucketSpec, clock: Clock) -> None:
        """Make an empty one."""
        self.spec = spec
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        """In the order of the last change."""
        self._revision = 0
        self._followers: dict[OnChange, str] = {}

    @property
    def revision(self) -> int:
        """The last one of any key."""
        return self._revision

    def get(self, key: str) -> Entry | None:
        """Return a value, if there is one."""
        found = self._last(key)
        return None if found is None or found.value is None else found

    def create(self, key: str, value: bytes) -> int:
        """Write a key that has no value."""
        if self.get(key) is not None:
            raise RevisionConflict(f"wrong last sequence: {self._of(key)} (10071)")
        return self.write(key, value)

    def write(self, key: str, value: bytes | None, revision: int | None = None) -> int:
        """Write a key, or with ``None`` delete it; with ``revision`` only if that is its last one."""
        if revision is not None and revision != self._of(key):
            raise RevisionConflict(f"wrong last sequence: {self._of(key)} (10071)")
        if 0 <= self.spec.max_value_bytes < len(value or b""):
            raise TooLarge("message size exceeds maximum allowed (10054)")
        self._revision += 1
        entry = Entry(key, value, self._revision)
        lasts_s = min(self.spec.ttl_s or float("inf"), MARKER_TTL_S if value is None else float("inf"))
        self._kept.pop(key, None)
        self._kept[key] = _Kept(entry, self._clock.time() + lasts_s)
        for follower, pattern in list(self._followers.items()):
            if matches(pattern, key):
                follower(entry)
        return self._revision

    def clear(self, pattern: str) -> int:
        """Forget all keys that match, and that they ever were; return how many there were."""
        gone = [key for key in self._kept if matches(pattern, key)]
        for key in gone:
            del self._kept[key]
        return len(gone)

    def entries(self, pattern: str) -> list[Entry]:
        """Return all values whose keys match, in the order of their last change."""
        found = [self.get(key) for key in list(self._kept) if matches(pattern, key)]
        return [entry for entry in found if entry is not None]

    def follow(self, pattern: str, follower: OnChange) -> None:
        """Tell ``follower`` of every change from now on. That a key ran out of time is told nobody."""
        self._followers[follower] = pattern

    def unfollow(self, follower: OnChange) -> None:
        """Tell it no more."""
        self._followers.pop(follower, None)

    def _of(self, key: str) -> int:
        last = self._last(key)
        return 0 if last is None else last.revision

    def _last(self, key: str) -> Entry | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept.until <= self._clock.time():
            del self._kept[key]
            return None
        return kept.entry
