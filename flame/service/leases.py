"""Which deliveries this executor may still take for its own.

A lease is good until ``ack_wait`` after its last extension, by this process's monotonic clock. Only while that is
certain is it extended; after that the broker may have given the task to another, so it is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator

from flame.protocol import defaults


class Leases:
    """The deliveries that were taken and are not finished."""

    def __init__(self, ack_wait_s: float) -> None:
        """Hold none; each will last ``ack_wait_s``."""
        self._certain_s = ack_wait_s * defaults.LEASE_CERTAIN
        self._extended_at: dict[str, float] = {}

    def take(self, handle: str, now: float) -> None:
        """Begin a lease."""
        self._extended_at[handle] = now

    def end(self, handle: str) -> None:
        """End a lease, if it is still held."""
        self._extended_at.pop(handle, None)

    def holds(self, handle: str, now: float) -> bool:
        """Whether the lease is certainly still held."""
        extended_at = self._extended_at.get(handle)
        return extended_at is not None and now - extended_at < self._certain_s

    def lapses_at(self, handle: str) -> float:
        """Return until when a lease was certain by this process's own extensions; 0 if it isn't held at all."""
        extended_at = self._extended_at.get(handle)
        return 0.0 if extended_at is None else extended_at + self._certain_s

    def due(self, now: float, age_s: float, kept_since: float | None = None) -> Iterator[str]:
        """Yield what is held and at least ``age_s`` old, to be extended; forget what has lapsed.

        Each counts as extended once the next is asked for: if telling the broker fails, it is as old as before.

        ``kept_since`` says since when another, the manager, has been extending every lease: one that was certain then
        has not lapsed, however long this process was blocked.
        """
        for handle, extended_at in list(self._extended_at.items()):
            lapses_at = extended_at + self._certain_s
            if lapses_at <= now and (kept_since is None or lapses_at < kept_since):
                self._extended_at.pop(handle, None)
            elif now - extended_at >= age_s:
                yield handle
                # Only now: one whose extension could not be sent is as old as before.
                if handle in self._extended_at:
                    self._extended_at[handle] = now

    def forget_all(self) -> None:
        """Forget everything: the connection was lost, and with it what was said about leases."""
        self._extended_at.clear()

    def __len__(self) -> int:
        """Return how many are held."""
        return len(self._extended_at)
