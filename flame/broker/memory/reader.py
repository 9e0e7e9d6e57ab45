"""Reading and following a stream of the in-memory server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Final, TypeVar

from flame.broker.memory.calls import Calls
from flame.broker.memory.watch import HEARTBEAT_S
from flame.broker.seam import Listener, StoredMessage
from flame.errors import BrokerUnavailable

PAGE: Final = 256
GIVE_UP_S: Final = 30.0
_RETRY_S: Final = 0.5

T = TypeVar("T")


async def read_stream(
    calls: Calls,
    stream: str,
    pattern: str,
    after: int,
    on_reconnect: Callable[[Listener], Callable[[], None]],
    *,
    follow: bool,
) -> AsyncGenerator[StoredMessage, None]:
    """See `flame.broker.seam.Broker.read`."""
    what = f"read {pattern}"
    server, clock = calls.server, calls.server.clock
    news = asyncio.Event()
    forget = on_reconnect(news.set)
    last = (await _insist(calls, what, lambda: server.stream(stream).state())).last_sequence

    def tell() -> None:
        """Say that there is something new, unless that gets lost."""
        if not server.chance.happens(server.faults.lose_live):
            calls.link.deliver(news.set)

    try:
        while True:
            news.clear()

            def look(behind: int = after) -> list[StoredMessage]:
                kept = server.stream(stream)
                kept.followers.add(pattern, tell)
                return kept.behind(pattern, behind, PAGE)

            page = await _insist(calls, what, look, patient=follow)
            for message in page:
                if not follow and message.sequence > last:
                    return
                after = message.sequence
                yield message
            if not page and not follow:
                return
            if not page:
                timer = clock.call_later(HEARTBEAT_S, news.set)
                await news.wait()
                timer.cancel()
    finally:
        forget()
        kept = server.streams.get(stream)
        if kept is not None:
            kept.followers.remove(pattern, tell)


async def _insist(calls: Calls, what: str, action: Callable[[], T], *, patient: bool = False) -> T:
    """Ask until there is an answer: for long, or if ``patient`` until the connection is closed."""
    clock = calls.server.clock
    give_up = clock.time() + GIVE_UP_S
    while True:
        try:
            return await calls.ask(what, action)
        except BrokerUnavailable:
            if calls.link.closed or (not patient and clock.time() > give_up):
                raise
            passed = asyncio.Event()
            clock.call_later(_RETRY_S, passed.set)
            await passed.wait()
