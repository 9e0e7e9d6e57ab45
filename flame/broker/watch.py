"""Following a bucket without missing a change.

A watch reads everything through a push consumer that begins with the last value of each key and goes on with every
change. The consumer's own sequence numbers show a gap; a gap, a silence, a reconnect and every minute that passes
end in a new reading from the start, so that what was lost is found again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from nats import errors as nats_errors

from flame.broker.errors import NotAcknowledged
from flame.broker.seam import Entry, EntryHandler, Listener
from flame.broker.wire import (
    CONSUMER_STALLED,
    KV_MARKER,
    KV_OPERATION,
    LAST_CONSUMER,
    SECOND_NS,
    STATUS,
    call,
    map_client_error,
)
from flame.cancel import end_task
from flame.errors import FlameError
from flame.logs import get_logger

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

log = get_logger("flame.broker.watch")

HEARTBEAT_S: Final = 2.0
"""A watch is kept by one server, without a copy elsewhere: its silence is all that tells of that server's death."""
SILENCE_S: Final = 3 * HEARTBEAT_S
CREATE_TIMEOUT_S: Final = 2.5
REPAIR_S: Final = 60.0
READ_TIMEOUT_S: Final = 30.0
_RETRY_S: Final = 0.5


class Reading:
    """One pass over a bucket, and its changes from then on, until something is missed."""

    def __init__(self, nc: Client, stream: str, prefix: str, pattern: str, handler: EntryHandler) -> None:
        """Say what to read; `start` begins."""
        self._nc = nc
        self._stream = stream
        self._prefix = prefix
        self._pattern = pattern
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._subscription: Any = None
        self._consumer = ""
        self._seen = 0
        self._expected: int | None = None
        self.complete: asyncio.Future[None] = self._loop.create_future()
        """Done when everything that was there at the start has been handled."""
        self.broken = asyncio.Event()
        """Something was missed: begin a new reading."""
        self.last_sign = self._loop.time()
        self.began_at = 0
        """The stream's last sequence before anything was read."""

    async def start(self) -> None:
        """Create the consumer; the handler is called from now on."""
        inbox = self._nc.new_inbox()
        what = f"watch {self._prefix}{self._pattern}"
        try:
            self._subscription = await self._nc.subscribe(inbox, cb=self._on_message)
        except (nats_errors.Error, OSError) as error:
            raise map_client_error(what, error) from error
        config = {
            "deliver_subject": inbox,
            **self._begin(),
            "ack_policy": "none",
            "max_deliver": 1,
            "filter_subject": self._prefix + self._pattern,
            "flow_control": True,
            "idle_heartbeat": int(HEARTBEAT_S * SECOND_NS),
            "inactive_threshold": 60 * SECOND_NS,
            "mem_storage": True,
            "num_replicas": 1,
        }
        body = {"stream_name": self._stream, "config": config}
        try:
            info = await call(self._nc, f"STREAM.INFO.{self._stream}", None, what, CREATE_TIMEOUT_S)
            self.began_at = int(info["state"]["last_seq"])
            answer = await call(self._nc, f"CONSUMER.CREATE.{self._stream}", body, what, CREATE_TIMEOUT_S)
        except BaseException:
            await self.stop()
            raise
        self._consumer = answer["name"]
        # The count is taken when the consumer is made, with nothing delivered yet.
        self._expected = int(answer.get("num_pending", 0)) + int(answer.get("delivered", {}).get("consumer_seq", 0))
        self._check_complete()

    @property
    def silent(self) -> bool:
        """Whether the broker has said nothing for longer than a living watch does."""
        return self._loop.time() - self.last_sign > SILENCE_S

    async def stop(self) -> None:
        """End it; the broker forgets the consumer."""
        with contextlib.suppress(nats_errors.Error, OSError):
            if self._subscription is not None:
                await self._subscription.unsubscribe()
            if self._consumer and self._nc.is_connected:
                await self._nc.publish(f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._consumer}")

    async def _on_message(self, msg: Msg) -> None:
        self.last_sign = self._loop.time()
        headers = msg.headers
        if headers and not msg.data and STATUS in headers:
            await self._on_status(msg, headers)
            return
        parts = msg.reply.split(".")
        base = 2 if len(parts) == 9 else 4
        if int(parts[base + 4]) != self._seen + 1:
            self.broken.set()
            return
        self._seen += 1
        await self._take(msg, int(parts[base + 3]))
        self._check_complete(nothing_more=parts[base + 6] == "0")

    def _begin(self) -> dict[str, object]:
        """Return where the consumer begins."""
        return {"deliver_policy": "last_per_subject"}

    async def _take(self, msg: Msg, sequence: int) -> None:
        """Hand a message on. While this waits, the broker holds back what follows."""
        headers = msg.headers
        deleted = headers is not None and (KV_OPERATION in headers or KV_MARKER in headers)
        self._handler(Entry(msg.subject[len(self._prefix) :], None if deleted else msg.data, sequence))

    async def _on_status(self, msg: Msg, headers: dict[str, str]) -> None:
        reply = msg.reply or headers.get(CONSUMER_STALLED, "")
        if reply:
            await self._nc.publish(reply)
        last = headers.get(LAST_CONSUMER)
        if last is not None and int(last) > self._seen:
            self.broken.set()

    def _check_complete(self, nothing_more: bool = False) -> None:
        counted = self._expected is not None and self._seen >= self._expected
        if (counted or nothing_more) and not self.complete.done():
            self.complete.set_result(None)


async def read_all(nc: Client, stream: str, prefix: str, pattern: str) -> list[Entry]:
    """Read all values that are there now."""
    found: dict[str, Entry] = {}

    def keep(entry: Entry) -> None:
        found.pop(entry.key, None)
        if entry.value is not None:
            found[entry.key] = entry

    reading = Reading(nc, stream, prefix, pattern, keep)
    await reading.start()
    try:
        await _wait_complete(reading, f"read {prefix}{pattern}")
    finally:
        await reading.stop()
    return list(found.values())


async def _wait_complete(reading: Reading, what: str) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + READ_TIMEOUT_S
    broken = asyncio.ensure_future(reading.broken.wait())
    try:
        while not (reading.complete.done() or broken.done() or reading.silent) and loop.time() < deadline:
            await asyncio.wait((reading.complete, broken), timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        broken.cancel()
    if not reading.complete.done():
        raise NotAcknowledged(f"{what}: interrupted")


class Watch:
    """Follows a bucket through readings, one after the other."""

    def __init__(
        self,
        nc: Client,
        stream: str,
        prefix: str,
        pattern: str,
        handler: EntryHandler,
        on_repair: Listener | None,
        on_reconnect: Callable[[Listener], Callable[[], None]],
    ) -> None:
        """Say what to follow; `start` begins."""
        self._make: Callable[[], Reading] = lambda: Reading(nc, stream, prefix, pattern, self._on_entry)
        self._what = f"watch {prefix}{pattern}"
        self._handler = handler
        self._on_repair = on_repair
        self._reading: Reading | None = None
        self._revisions: dict[str, int] = {}
        self._fresh: set[str] | None = None
        self._again = asyncio.Event()
        self._forget = on_reconnect(self._again.set)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when everything that is there was handled."""
        try:
            await self._read()
        except BaseException:
            await self.stop()
            raise
        self._task = asyncio.create_task(self._follow(), name=self._what)

    async def stop(self) -> None:
        """Hear nothing more."""
        self._forget()
        task, self._task = self._task, None
        await end_task(task)
        reading, self._reading = self._reading, None
        if reading is not None:
            await reading.stop()

    async def _read(self) -> None:
        """Read everything, then tell of the keys that are gone."""
        old, self._reading = self._reading, None
        if old is not None:
            await old.stop()
        fresh: set[str] = set()
        self._fresh = fresh
        reading = self._reading = self._make()
        await reading.start()
        await _wait_complete(reading, self._what)
        self._fresh = None
        for key in [key for key in self._revisions if key not in fresh]:
            # It went before the reading began; whoever has written it since knows a higher revision.
            self._on_entry(Entry(key, None, reading.began_at))

    def _on_entry(self, entry: Entry) -> None:
        if self._fresh is not None:
            if entry.value is None:
                self._fresh.discard(entry.key)
            else:
                self._fresh.add(entry.key)
        known = self._revisions.get(entry.key)
        if entry.value is None:
            if known is None:
                return
            del self._revisions[entry.key]
        elif known is not None and entry.revision <= known:
            return
        else:
            self._revisions[entry.key] = entry.revision
        try:
            self._handler(entry)
        except Exception:
            log.exception("watch handler failed", key=entry.key)

    async def _follow(self) -> None:
        while True:
            await self._until_due()
            try:
                await self._read()
                if self._on_repair is not None:
                    self._on_repair()
            except Exception as error:
                if not isinstance(error, FlameError):
                    log.exception("watch failed", what=self._what)
                log.debug("watch interrupted", what=self._what, error=str(error))
                self._again.set()
                await asyncio.sleep(_RETRY_S)

    async def _until_due(self) -> None:
        """Wait until there is a reason to read everything again."""
        loop = asyncio.get_running_loop()
        due = loop.time() + REPAIR_S
        while not self._again.is_set() and self._reading is not None:
            now = loop.time()
            if now >= due or self._reading.broken.is_set() or self._reading.silent:
                break
            broken = asyncio.ensure_future(self._reading.broken.wait())
            again = asyncio.ensure_future(self._again.wait())
            try:
                await asyncio.wait((broken, again), timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                broken.cancel()
                again.cancel()
        self._again.clear()
