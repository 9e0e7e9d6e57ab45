"""Acknowledged publishes, many under way at once over one inbox.

nats-py's own pipelined publish keeps its futures for ever when an acknowledgement is lost; here each has a time
limit, kept by one timer for all of them.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from nats import errors as nats_errors

from flame.broker.errors import Duplicate, NotAcknowledged, StreamMissing
from flame.broker.wire import ACK, STATUS, map_api_error, map_client_error
from flame.errors import BrokerUnavailable, FlameError

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

_SWEEP_S = 0.5


class Publisher:
    """Publishes to streams and matches the broker's acknowledgements to futures."""

    def __init__(self, nc: Client) -> None:
        """Bind to a connection; `start` subscribes."""
        self._nc = nc
        self._loop = asyncio.get_running_loop()
        self._prefix = f"{nc.new_inbox()}."
        self._cut = len(self._prefix)
        self._next = 0
        self._waiting: dict[str, tuple[asyncio.Future[int], float, str, str]] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Listen for acknowledgements."""
        await self._nc.subscribe(f"{self._prefix}*", cb=self._on_ack)

    def stop(self, reason: str) -> None:
        """Fail whatever is outstanding; it may have been stored."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        waiting, self._waiting = self._waiting, {}
        for future, _, subject, _ in waiting.values():
            if not future.done():
                future.set_exception(NotAcknowledged(f"store on {subject}: {reason}; it may have been stored"))
                future.exception()  # whoever asked may be gone: no warning for that

    async def publish(
        self,
        subject: str,
        data: bytes,
        timeout_s: float,
        headers: dict[str, str] | None = None,
        then_acknowledge: str = "",
    ) -> asyncio.Future[int]:
        """Send a message; the future brings its sequence once it is stored.

        ``then_acknowledge`` names a delivery to be acknowledged once the subject holds a message.
        """
        self._next += 1
        token = str(self._next)
        future: asyncio.Future[int] = self._loop.create_future()
        self._waiting[token] = (future, self._loop.time() + timeout_s, subject, then_acknowledge)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)
        try:
            await self._nc.publish(subject, data, self._prefix + token, headers)
        except (nats_errors.Error, OSError) as error:
            self._waiting.pop(token, None)
            raise map_client_error(f"store on {subject}", error) from error
        return future

    async def _on_ack(self, msg: Msg) -> None:
        entry = self._waiting.pop(msg.subject[self._cut :], None)
        if entry is None:
            return
        future, _, subject, handle = entry
        sequence = _sequence(msg.data)
        refusal = None if sequence else _refusal(subject, msg)
        if handle and (refusal is None or isinstance(refusal, Duplicate)):
            await self._nc.publish(handle, ACK)
        if future.done():
            return
        if refusal is None:
            future.set_result(sequence)
        else:
            future.set_exception(refusal)

    def _sweep(self) -> None:
        now = self._loop.time()
        late = [token for token, (_, deadline, _, _) in self._waiting.items() if deadline <= now]
        for token in late:
            future, _, subject, _ = self._waiting.pop(token)
            if not future.done():
                future.set_exception(
                    NotAcknowledged(f"store on {subject}: the broker did not acknowledge in time; it may be stored")
                )
        self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep) if self._waiting else None


def _sequence(data: bytes) -> int:
    """Return the sequence in an acknowledgement, 0 if it is none. Cheaper than decoding the JSON."""
    start = data.find(b'"seq":')
    if start < 0 or data.startswith(b'{"error"'):
        return 0
    start += 6
    end = start
    while data[end : end + 1].isdigit():
        end += 1
    return int(data[start:end] or 0)


def _refusal(subject: str, msg: Msg) -> FlameError:
    what = f"store on {subject}"
    if not msg.data:
        status = (msg.headers or {}).get(STATUS, "")
        if status == "503":
            return StreamMissing(f"{what}: no stream takes it")
        return BrokerUnavailable(f"{what}: empty acknowledgement {status}")
    try:
        fault = json.loads(msg.data)["error"]
    except (ValueError, KeyError, TypeError):
        return BrokerUnavailable(f"{what}: unreadable acknowledgement {msg.data[:80]!r}")
    return map_api_error(what, fault)
