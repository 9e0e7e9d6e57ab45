"""Acknowledged publishes, many under way at once over one inbox.

nats-py's own pipelined publish keeps its futures for ever when an acknowledgement is lost; here each has a time
limit, kept by one timer for all of them.

A stream in a cluster of servers takes nothing for some seconds when the server that leads it dies: until another one
leads, publishes are refused because nobody listens. They are repeated within their time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from functools import partial
from typing import TYPE_CHECKING, Final

from nats import errors as nats_errors

from flame.broker.errors import Duplicate, NotAcknowledged, StreamMissing
from flame.broker.fast import Sender, status_of, subscribe
from flame.broker.seam import OnStored
from flame.broker.wire import ACK, has_stream, map_api_error, map_client_error
from flame.errors import BrokerUnavailable, FlameError

if TYPE_CHECKING:
    from nats.aio.client import Client

_SWEEP_S: Final = 0.5
_REPEAT_FIRST_S: Final = 0.1
_REPEAT_MAX_S: Final = 0.8
"""Between two attempts at storing what nobody took."""
_NOBODY: Final = "503"


class _Publish:
    """A message on its way."""

    __slots__ = ("data", "deadline", "handle", "headers", "on_done", "refused", "subject")

    def __init__(
        self,
        on_done: OnStored,
        deadline: float,
        subject: str,
        data: bytes,
        headers: dict[str, str] | None,
        handle: str,
    ) -> None:
        self.on_done = on_done
        self.deadline = deadline
        self.subject = subject
        self.data = data
        self.headers = headers
        self.handle = handle
        """The delivery to acknowledge once the subject holds a message."""
        self.refused = False
        """Nobody took it; it was certainly not stored."""

    def late(self) -> FlameError:
        what = f"store on {self.subject}"
        if self.refused:
            return BrokerUnavailable(f"{what}: the stream has no leader now; it was not stored")
        return NotAcknowledged(f"{what}: the broker did not acknowledge in time; it may be stored")


class Publisher:
    """Publishes to streams and matches the broker's acknowledgements to futures."""

    def __init__(self, nc: Client, sender: Sender) -> None:
        """Bind to a connection; `start` subscribes."""
        self._nc = nc
        self._sender = sender
        self._loop = asyncio.get_running_loop()
        self._prefix = f"{nc.new_inbox()}."
        self._cut = len(self._prefix)
        self._next = 0
        self._waiting: dict[str, _Publish] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._refused: list[str] = []
        self._repeating: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen for acknowledgements."""
        await subscribe(self._nc, f"{self._prefix}*", self._on_ack)

    def stop(self, reason: str) -> None:
        """Fail whatever is outstanding; it may have been stored."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        if self._repeating is not None:
            self._repeating.cancel()
        waiting, self._waiting = self._waiting, {}
        for publish in waiting.values():
            publish.on_done(0, NotAcknowledged(f"store on {publish.subject}: {reason}; it may have been stored"))

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
        future: asyncio.Future[int] = self._loop.create_future()
        await self.publish_then(subject, data, timeout_s, partial(_settle, future), headers, then_acknowledge)
        return future

    async def publish_then(
        self,
        subject: str,
        data: bytes,
        timeout_s: float,
        on_done: OnStored,
        headers: dict[str, str] | None = None,
        then_acknowledge: str = "",
    ) -> None:
        """Send a message; ``on_done`` gets its sequence once it is stored, or why it isn't."""
        self._next += 1
        token = str(self._next)
        deadline = self._loop.time() + timeout_s
        self._waiting[token] = _Publish(on_done, deadline, subject, data, headers, then_acknowledge)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)
        try:
            if headers is None:
                self._sender.send(subject, data, self._prefix + token)
                if self._sender.full:
                    await self._sender.room()
            else:
                await self._nc.publish(subject, data, self._prefix + token, headers)
        except (nats_errors.Error, OSError) as error:
            self._waiting.pop(token, None)
            raise map_client_error(f"store on {subject}", error) from error

    def _on_ack(self, subject: bytes, _reply: bytes, data: bytes, headers: bytes) -> None:
        token = subject[self._cut :].decode()
        publish = self._waiting.pop(token, None)
        if publish is None:
            return
        sequence = _sequence(data)
        if not sequence and not data and status_of(headers) == _NOBODY:
            self._waiting[token] = publish
            self._repeat_later(token, publish)
            return
        refusal = None if sequence else _refusal(publish.subject, data)
        if publish.handle and (refusal is None or isinstance(refusal, Duplicate)):
            with contextlib.suppress(nats_errors.Error):  # disconnected: the delivery comes back, and is looked up
                self._sender.send(publish.handle, ACK)
        publish.on_done(sequence, refusal)

    def _sweep(self) -> None:
        now = self._loop.time()
        for token in [token for token, publish in self._waiting.items() if publish.deadline <= now]:
            publish = self._waiting.pop(token)
            publish.on_done(0, publish.late())
        self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep) if self._waiting else None

    # ---- while a stream has no leader

    def _repeat_later(self, token: str, publish: _Publish) -> None:
        publish.refused = True
        self._refused.append(token)
        if self._repeating is None:
            self._repeating = self._loop.create_task(self._repeat(), name="repeated publishes")

    async def _repeat(self) -> None:
        pause_s = _REPEAT_FIRST_S
        try:
            while self._refused:
                refused, self._refused = self._refused, []
                await self._fail_without_stream(refused)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _REPEAT_MAX_S)
                for token in refused:
                    await self._send_again(token)
        finally:
            self._repeating = None

    async def _send_again(self, token: str) -> None:
        publish = self._waiting.get(token)
        if publish is None:
            return
        publish.refused = False
        try:
            await self._nc.publish(publish.subject, publish.data, self._prefix + token, publish.headers)
        except (nats_errors.Error, OSError):
            publish.refused = True
            self._refused.append(token)

    async def _fail_without_stream(self, tokens: list[str]) -> None:
        """End those whose stream doesn't exist: that looks the same as one without a leader."""
        exists: dict[str, bool] = {}
        for token in tokens:
            publish = self._waiting.get(token)
            if publish is None:
                continue
            family = ".".join(publish.subject.split(".", 3)[:3])  # a kind of one application, or keys of one bucket
            if family not in exists:
                exists[family] = await has_stream(self._nc, publish.subject)
            if not exists[family]:
                del self._waiting[token]
                publish.on_done(0, StreamMissing(f"store on {publish.subject}: no stream takes it"))


def _settle(future: asyncio.Future[int], sequence: int, error: FlameError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(sequence)
    else:
        future.set_exception(error)
        future.exception()  # whoever asked may be gone: no warning for that


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


def _refusal(subject: str, data: bytes) -> FlameError:
    what = f"store on {subject}"
    try:
        fault = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return BrokerUnavailable(f"{what}: unreadable acknowledgement {data[:80]!r}")
    return map_api_error(what, fault)
