"""Taking tasks from a pull consumer in bursts, over one inbox.

A request that stands while user code blocks the loop would let the broker deliver into a socket that nobody
reads. So nothing stands: a request with both ``no_wait`` and ``expires`` waits for a first message, brings what is
there by then, and ends, and `burst` returns when the broker has said so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Final

from nats import errors as nats_errors

from flame.broker.errors import ConsumerMissing
from flame.broker.fast import Sender, description_of, status_of, subscribe
from flame.broker.seam import Delivery
from flame.broker.wire import API, SECOND_NS, map_client_error
from flame.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client
    from nats.aio.subscription import Subscription

log = get_logger("flame.broker.puller")

HEARTBEAT_S: Final = 2.0
_MISSED: Final = 2.5
"""Heartbeats without a sign after which a standing request is taken for lost."""
_END_TIMEOUT_S: Final = 1.0
"""The end of a request that has brought something follows at once; this bounds the wait for one that was lost."""
STRAY_S: Final = 0.3
"""A delivery that comes after its burst, since a request was taken for lost and was not, is good for the next one for
this long: whoever takes it counts its lease from then."""


class JetStreamPuller:
    """One executor's side of a consumer. One burst at a time."""

    def __init__(self, nc: Client, sender: Sender, stream: str, consumer: str) -> None:
        """Bind to a consumer; `start` subscribes."""
        self._nc = nc
        self._sender = sender
        self._subject = f"{API}.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._what = f"pull from {stream}/{consumer}"
        self._loop = asyncio.get_running_loop()
        self._inbox = nc.new_inbox()
        self._subscription: Subscription | None = None
        self._arrived: list[Delivery] = []
        self._signal: asyncio.Future[bool] | None = None
        self._ended = True
        """No request is under way."""
        self._missing: str = ""
        self._stopped = False
        self._taking = False
        self._stray_since = 0.0
        """When the first delivery came that waits in `_arrived` without a burst."""
        self.forget: Callable[[], None] = lambda: None
        """Takes the connection's listener for reconnects back."""

    async def start(self) -> None:
        """Listen for deliveries."""
        self._subscription = await subscribe(self._nc, self._inbox, self._on_message)

    async def burst(self, most: int, wait_s: float) -> list[Delivery]:
        """See `flame.broker.seam.Puller.burst`."""
        if self._arrived and self._loop.time() - self._stray_since > STRAY_S:
            log.warning("deliveries waited too long to be taken: they come again", what=self._what)
            self._arrived.clear()
        self._taking = True
        try:
            return await self._burst(most, wait_s)
        finally:
            self._taking = False

    async def _burst(self, most: int, wait_s: float) -> list[Delivery]:
        if not self._nc.is_connected and not self._stopped:
            # A request made now would be sent after the reconnect, and might be answered when nobody waits any more.
            await self._sign(wait_s)
            return []
        if not self._arrived and not self._stopped:
            # It waits for a first message, brings all that is there then, and ends.
            await self._ask({"batch": most, "no_wait": True, "expires": int(wait_s * SECOND_NS), **_heartbeat(wait_s)})
            while len(self._arrived) < most and not self._ended:
                if not await self._sign(_END_TIMEOUT_S if self._arrived else HEARTBEAT_S * _MISSED):
                    break
            self._ended = True
        if self._missing and not self._arrived:
            missing, self._missing = self._missing, ""
            raise ConsumerMissing(f"{self._what}: {missing}")
        arrived, self._arrived = self._arrived, []
        return arrived

    def interrupt(self) -> None:
        """End a wait: the request that stood is gone with the connection."""
        self._ended = True
        self._wake()

    async def stop(self) -> list[Delivery]:
        """See `flame.broker.seam.Puller.stop`."""
        if not self._stopped:
            self._stopped = True
            self.forget()
            if self._subscription is not None and self._nc.is_connected:
                # Not `unsubscribe`: the server has dropped our request only once this round trip is done, and what it
                # sent before that must be handed back. Disconnected, it is redelivered after its lease instead.
                with contextlib.suppress(nats_errors.Error):
                    await self._subscription.drain()  # type: ignore[no-untyped-call]  # nats-py
            self.interrupt()
        arrived, self._arrived = self._arrived, []
        return arrived

    async def _ask(self, request: dict[str, object]) -> None:
        self._ended = False
        try:
            self._sender.send(self._subject, json.dumps(request).encode(), self._inbox)
        except (nats_errors.Error, OSError) as error:
            self._ended = True
            raise map_client_error(self._what, error) from error

    async def _sign(self, limit_s: float) -> bool:
        """Wait for anything to arrive; tell whether it did."""
        signal: asyncio.Future[bool] = self._loop.create_future()
        self._signal = signal
        timer = self._loop.call_later(limit_s, self._wake, False)
        try:
            return await signal
        finally:
            timer.cancel()
            self._signal = None

    def _wake(self, arrived: bool = True) -> None:
        if self._signal is not None and not self._signal.done():
            self._signal.set_result(arrived)

    def _on_message(self, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        status = status_of(headers) if headers and not data else ""
        if not status:
            if not self._taking and not self._arrived:
                self._stray_since = self._loop.time()
            self._arrived.append(read_delivery(subject.decode(), reply.decode(), data))
        elif status == "100":
            pass  # a heartbeat: the request stands
        else:
            text = description_of(headers)
            if status == "503" or "Deleted" in text or "not found" in text.lower():
                self._missing = text or "nobody answers for it"
            self._ended = True
        self._wake()


class JetStreamDelivery(Delivery):
    """A delivery whose handle is its reply subject, which carries the consumer's view of it.

    ``$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.<n>.<time>.<pending>``; longer with domain and account.
    """

    __slots__ = ()

    @property
    def stored_at(self) -> float:
        """See `flame.broker.seam.Delivery.stored_at`."""
        parts = self.handle.split(".")
        return int(parts[_base(parts) + 5]) / SECOND_NS


def read_delivery(subject: str, reply: str, data: bytes) -> JetStreamDelivery:
    """Read a delivery."""
    parts = reply.split(".")
    base = _base(parts)
    return JetStreamDelivery(subject, data, reply, int(parts[base + 2]), int(parts[base + 3]), int(parts[base + 6]))


def _base(parts: list[str]) -> int:
    return 2 if len(parts) == 9 else 4


def _heartbeat(wait_s: float) -> dict[str, object]:
    return {"idle_heartbeat": int(HEARTBEAT_S * SECOND_NS)} if wait_s > 2 * HEARTBEAT_S else {}
