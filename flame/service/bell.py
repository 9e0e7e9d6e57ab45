"""Waiting for the next end of anything."""

from __future__ import annotations

import asyncio


class Bell:
    """Wakes all who wait for it. Ringing while nobody waits costs next to nothing, and is not remembered."""

    def __init__(self) -> None:
        """Begin silent; made in the loop that it is used in."""
        self._loop = asyncio.get_running_loop()
        self._rung: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake whoever waits now."""
        if self._rung is not None and not self._rung.done():
            self._rung.set_result(None)

    async def wait(self) -> None:
        """Wait until it rings next."""
        if self._rung is None or self._rung.done():
            self._rung = self._loop.create_future()
        await asyncio.shield(self._rung)
