"""What whoever watches a bucket was told: nothing twice, and nothing older after something newer."""

from __future__ import annotations

from collections.abc import Container

from flame.broker.seam import Entry, EntryHandler
from flame.logs import get_logger

log = get_logger("flame.broker.watch")


class ToldKeys:
    """Tells a handler of values, by the revisions that it was told of."""

    def __init__(self, handler: EntryHandler) -> None:
        """Begin with nothing told."""
        self._handler = handler
        self._revisions: dict[str, int] = {}

    def tell(self, entry: Entry) -> None:
        """Tell of a value, or that it is gone, if that is news."""
        known = self._revisions.get(entry.key)
        if entry.value is None:
            if known is None:
                return
            del self._revisions[entry.key]
        elif known is not None and entry.revision <= known:
            return
        else:
            self._revisions[entry.key] = entry.revision
        try:
            self._handler(entry)
        except Exception:
            log.exception("watch handler failed", key=entry.key)

    def tell_gone(self, there: Container[str], revision: int) -> None:
        """Tell of the keys that are not there any more; they went before this revision of the bucket."""
        for key in [key for key in self._revisions if key not in there]:
            self.tell(Entry(key, None, revision))
