"""The connection of programs that don't make one themselves: one for each running event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from flame.client.connection import Connection, connect


class _Defaults:
    """The default connection of each running event loop."""

    def __init__(self) -> None:
        self._by_loop: dict[asyncio.AbstractEventLoop, asyncio.Task[Connection]] = {}

    async def get(self) -> Connection:
        loop = asyncio.get_running_loop()
        for other in [other for other in self._by_loop if other.is_closed()]:
            del self._by_loop[other]
        opening = self._by_loop.get(loop)
        if opening is not None and opening.done() and (opening.cancelled() or opening.exception() is not None):
            opening = None
        if opening is None:
            opening = self._by_loop[loop] = loop.create_task(self._open(loop))
        return await asyncio.shield(opening)

    async def _open(self, loop: asyncio.AbstractEventLoop) -> Connection:
        connection = await connect()
        # asyncio closes its asynchronous generators when a loop ends, whoever started them: that is the one hook
        # there is for ending the connection of a program that never closes anything.
        closing = self._close_with_loop(loop, connection)
        await anext(closing)
        connection.keep_alive = closing
        return connection

    async def _close_with_loop(self, loop: asyncio.AbstractEventLoop, connection: Connection) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            self._by_loop.pop(loop, None)
            with contextlib.suppress(Exception):
                await connection.close()


_defaults = _Defaults()


async def default_connection() -> Connection:
    """Return the running loop's default connection; it is closed when the loop ends."""
    return await _defaults.get()
