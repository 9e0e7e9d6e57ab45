"""The ids of tasks, which clients mint."""

from __future__ import annotations

import itertools
import secrets
import time
from typing import Final

from flame.protocol.ids import base62

_COUNTER_WIDTH: Final = 4


class TaskIds:
    """Mints task ids: unique without coordination, sorted by creation within one client.

    An id is the milliseconds since 1970 (8 characters), a counter (4) and what only this minter has (6).
    """

    def __init__(self) -> None:
        """Take a suffix that no other client has."""
        self._suffix = base62(secrets.randbelow(62**6), 6)
        self._counter = itertools.count()
        self._last = 0
        self._prefix = ""

    def mint(self) -> str:
        """Return the next id."""
        now = max(self._last, time.time_ns() // 1_000_000)
        if now != self._last:
            self._last = now
            self._prefix = base62(now, 8)
            self._counter = itertools.count()  # so that it never begins again within a millisecond
        return f"{self._prefix}{base62(next(self._counter), _COUNTER_WIDTH)}{self._suffix}"
