"""Reading a stream from some place on, and following it, without missing or repeating a message.

As a watch of a bucket does, it reads through a push consumer whose own sequence numbers show a gap. After a gap, a
silence or a reconnect the next consumer begins behind the last message that was handed on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Final

from flame.broker.leader import newest_sequence
from flame.broker.seam import Entry, Listener, StoredMessage
from flame.broker.watch import HEARTBEAT_S, READ_TIMEOUT_S, Reading
from flame.broker.wire import SECOND_NS
from flame.errors import BrokerUnavailable

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

AHEAD: Final = 256
"""Messages that are kept for a slow reader; then the broker is held back."""
_RETRY_S: Final = 0.5


class StreamReading(Reading):
    """Messages of a stream behind a sequence, until something is missed."""

    def __init__(self, nc: Client, stream: str, pattern: str, after: int, *, follow: bool) -> None:
        """Say what to read, and whether what is stored later too; `start` begins."""
        super().__init__(nc, stream, "", pattern, _never)
        self._after = after
        self._follow = follow
        if follow:
            self.complete.set_result(None)  # nobody asks
        self._arrived: deque[StoredMessage] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def next(self) -> StoredMessage | None:
        """Return the next message; ``None`` if something was missed or, unless it follows, if that was all."""
        while not self._arrived:
            if self.broken.is_set() or self.silent or (self.complete.done() and not self._follow):
                return None
            self._news.clear()
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._news.wait()
            except TimeoutError:
                continue
        self._room.set()
        return self._arrived.popleft()

    def interrupt(self) -> None:
        """Something may have been missed."""
        self.broken.set()
        self._news.set()

    def _begin(self) -> dict[str, object]:
        return {"deliver_policy": "by_start_sequence", "opt_start_seq": self._after + 1}

    async def _take(self, msg: Msg, sequence: int) -> None:
        while len(self._arrived) >= AHEAD:
            self._room.clear()
            await self._room.wait()
        parts = msg.reply.split(".")
        stored_at = int(parts[7 if len(parts) == 9 else 9]) / SECOND_NS
        self._arrived.append(StoredMessage(msg.subject, msg.data, sequence, stored_at))
        self._news.set()

    async def _look_for_more(self) -> None:
        await super()._look_for_more()
        self._news.set()


def _never(_: Entry) -> None:
    """Stand in for the handler of a bucket's values."""


async def read_stream(
    nc: Client,
    stream: str,
    pattern: str,
    after: int,
    on_reconnect: Callable[[Listener], Callable[[], None]],
    *,
    follow: bool,
) -> AsyncGenerator[StoredMessage, None]:
    """See `flame.broker.seam.Broker.read`."""
    loop = asyncio.get_running_loop()
    progress_at = loop.time()
    while True:
        if not follow and after >= await newest_sequence(nc, stream, pattern):
            return
        reading = StreamReading(nc, stream, pattern, after, follow=follow)
        forget = on_reconnect(reading.interrupt)
        try:
            await reading.start()
            while (message := await reading.next()) is not None:
                after = message.sequence
                yield message
                progress_at = loop.time()
            if not follow and reading.complete.done():
                return
        except BrokerUnavailable:
            if nc.is_closed or (not follow and loop.time() - progress_at > READ_TIMEOUT_S):
                raise
            await asyncio.sleep(_RETRY_S)
        finally:
            forget()
            await reading.stop()
