"""nats-py's hot path without what a message doesn't need.

nats-py matches every line it reads against up to seven regular expressions, builds a message object with decoded
headers, puts it into a queue and wakes a task that calls an ``async`` callback; and it validates and formats every
publish in several coroutines. Here a message is cut out of what was read and handed to a plain function, and a
publish is one
formatted command for the client's own writer. Everything else, from pings to reconnects, stays nats-py's.

This leans on attributes that nats-py keeps to itself, so its version is bounded in `pyproject.toml`, and the
conformance suite of the seam runs through every line of it. Nothing outside this module touches them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from nats import errors as nats_errors
from nats.protocol.parser import Parser

from flame.logs import get_logger

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.subscription import Subscription

log = get_logger("flame.broker")

FULL_BYTES: Final = 1024 * 1024
"""More than this in the client's buffer: wait until it is written."""

Handler = Callable[[bytes, bytes, bytes, bytes], None]
"""Gets subject, reply subject, data, and the headers as they were sent, empty if there are none."""

_MSG: Final = ord("M")
_HMSG: Final = ord("H")


class _Direct:
    """Stands where a subscription has its queue, and marks it as one whose messages go straight to a function."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler

    def empty(self) -> bool:
        return True

    def qsize(self) -> int:
        return 0

    async def join(self) -> None:
        pass


class _Parser(Parser):
    """Reads messages itself and leaves every other line to nats-py."""

    needed_bytes = 0
    """How much must be in the buffer before it is worth looking at again: a large message comes in many pieces."""

    def reset(self) -> None:
        super().reset()
        self.needed_bytes = 0

    def _joined(self, data: bytes) -> bytes:
        """Return what was left over together with what has come; nothing if that is still too little."""
        if self.buf:
            self.buf += data
            if len(self.buf) < self.needed_bytes:
                return b""
            data = bytes(self.buf)
            self.buf = bytearray()
        self.needed_bytes = 0
        return data

    async def parse(self, data: bytes = b"") -> None:
        data = self._joined(data)
        at, size = 0, len(data)
        while at < size:
            end = data.find(b"\r\n", at)
            if end < 0:
                break
            kind = data[at]
            if kind not in (_MSG, _HMSG):
                await super().parse(data[at : end + 2])
                at = end + 2
                continue
            line = data[at:end].split()
            begin = end + 2
            end = begin + int(line[-1])
            if end + 2 > size:
                self.needed_bytes = end + 2 - at
                break
            body = begin + int(line[-2]) if kind == _HMSG else begin
            reply = line[3] if len(line) == (6 if kind == _HMSG else 5) else b""
            at = end + 2
            subscription = self.nc._subs.get(int(line[2]))
            if subscription is None:
                continue
            queue = subscription._pending_queue
            if type(queue) is _Direct:
                try:
                    queue.handler(line[1], reply, data[body:end], data[begin:body])
                except Exception:
                    # Raised from here it would end the connection's reader, and with it all else that listens.
                    log.exception("a message handler failed", subject=line[1].decode("utf-8", "replace"))
            else:
                await self.nc._process_msg(int(line[2]), line[1], reply, data[body:end], data[begin:body] or None)
        if at < size:
            self.buf = bytearray(data[at:])


def speed_up(nc: Client) -> None:
    """Let a client that is not connected yet read in the fast way."""
    nc._ps = _Parser(nc)


async def subscribe(nc: Client, subject: str, handler: Handler) -> Subscription:
    """Call ``handler`` for every message from now on, at once and in order. It must be quick and must not raise."""
    subscription = await nc.subscribe(subject, pending_bytes_limit=0)
    early: asyncio.Queue[Any] = subscription._pending_queue
    direct: Any = _Direct(handler)
    subscription._pending_queue = direct
    subscription._message_iterator = None  # it would keep the queue
    while not early.empty():
        msg = early.get_nowait()
        handler(msg.subject.encode(), msg.reply.encode(), msg.data, b"")
    return subscription


async def first(nc: Client, subject: str) -> tuple[asyncio.Future[bytes], Subscription]:
    """Return a future that brings the data of the first message from now on; until then it takes little room."""
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def bring(_subject: bytes, _reply: bytes, data: bytes, _headers: bytes) -> None:
        if not future.done():
            future.set_result(data)
        nc._remove_sub(subscription._id)  # the server has ended it: it is not to be asked for after a reconnect

    subscription = await subscribe(nc, subject, bring)
    if not future.done():
        await subscription.unsubscribe(1)
    return future, subscription


def status_of(headers: bytes) -> str:
    """Return the status in the first line of some headers; empty if there is none."""
    return headers[9:12].decode() if headers[8:9] == b" " else ""


def description_of(headers: bytes) -> str:
    """Return the text behind the status in the first line of some headers."""
    return headers[13 : headers.find(b"\r\n")].decode("utf-8", "replace").strip()


def header(headers: bytes, name: bytes) -> str:
    """Return the value of one header; empty if there is none."""
    at = headers.find(b"\r\n" + name + b":")
    if at < 0:
        return ""
    begin = at + len(name) + 3
    return headers[begin : headers.find(b"\r\n", begin)].decode("utf-8", "replace").strip()


class Sender:
    """Publishes on one connection."""

    def __init__(self, nc: Client) -> None:
        """Bind to a connection."""
        self._nc = nc
        # The client's writer sets the future that wakes it; this one is set already and serves every time.
        self._woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._woken.set_result(None)

    def send(self, subject: str, data: bytes, reply: str = "") -> None:
        """Publish. Subjects must be legal: nothing checks them here. Raises nats-py's errors."""
        nc = self._nc
        command = f"PUB {subject} {reply} {len(data)}\r\n".encode() + data + b"\r\n"
        if not nc.is_connected:
            self._check_disconnected(len(command))
        if len(data) > nc._max_payload:
            raise nats_errors.MaxPayloadError
        nc._pending.append(command)
        nc._pending_data_size += len(command)
        queue = nc._flush_queue
        if queue is not None and queue.empty():
            queue.put_nowait(self._woken)

    @property
    def full(self) -> bool:
        """Whether the buffer holds so much that the caller should wait; see `room`."""
        return self._nc._pending_data_size > FULL_BYTES

    async def room(self) -> None:
        """Wait until the buffer was written."""
        await self._nc._flush_pending(force_flush=True)

    def _check_disconnected(self, size: int) -> None:
        nc = self._nc
        if nc.is_closed:
            raise nats_errors.ConnectionClosedError
        if nc.is_draining_pubs:
            raise nats_errors.ConnectionDrainingError
        if not nc.is_draining and nc._pending_data_size + size > nc._max_pending_size:
            raise nats_errors.OutboundBufferLimitError
