"""Watching the time that an executor has for what it is doing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from flame_services.executor_manager.life import Deadline


class Alarm:
    """Calls back when a deadline has passed."""

    def __init__(self, ring: Callable[[], None]) -> None:
        """Be silent until there is a deadline."""
        self.armed: Deadline | None = None
        """The deadline that is watched, or was last."""
        self._ring: Final = ring
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def follow(self, deadline: Deadline | None) -> None:
        """Watch a deadline from now on, unless it is the one that is watched already; ``None``: there is none."""
        if deadline is not self.armed:
            self.armed = deadline
            self.set(None if deadline is None else deadline.after_s)

    def begin_anew(self) -> None:
        """Give what is watched its whole time again."""
        if self.armed is not None:
            self.set(self.armed.after_s)

    def set(self, after_s: float | None) -> None:
        """Ring after so long, or not at all."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if after_s is None else self._loop.call_later(after_s, self._ring)
