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
from flame.broker.leader import newest_sequence
from flame.broker.seam import Entry, EntryHandler, Listener
from flame.broker.told import ToldKeys
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
LOOKS: Final = 10
"""So often a reading that has what the last look told of asks whether there is more."""
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
        """Done when everything that was there at the start, and still is, has been handled."""
        self.broken = asyncio.Event()
        """Something was missed: begin a new reading."""
        self._position = 0
        """The stream's sequence of the last message that was handled."""
        self._newest: int | None = None
        """The last look at the leader found a newer message, with this sequence."""
        self._looks = 0
        self._looking: asyncio.Task[None] | None = None
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
        if self._expected <= self._seen:
            self._look()

    @property
    def silent(self) -> bool:
        """Whether the broker has said nothing for longer than a living watch does."""
        return self._loop.time() - self.last_sign > SILENCE_S

    async def stop(self) -> None:
        """End it; the broker forgets the consumer."""
        looking, self._looking = self._looking, None
        await end_task(looking)
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
        sequence = int(parts[base + 3])
        await self._take(msg, sequence)
        self._position = sequence
        if self._may_be_complete(nothing_more=parts[base + 6] == "0"):
            self._looks += self._look()

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
        else:
            self._look()

    def _may_be_complete(self, nothing_more: bool) -> bool:
        """Whether it is worth asking the leader: at first by what the consumer says, then by what the leader said."""
        if self._newest is not None:
            return self._position >= self._newest
        return nothing_more or (self._expected is not None and self._seen >= self._expected)

    def _look(self) -> bool:
        """Begin to find out whether this was all, unless that is known or being found out; tell whether it began."""
        if self.complete.done() or (self._looking is not None and not self._looking.done()):
            return False
        self._looking = self._loop.create_task(self._look_for_more(), name=f"look at {self._prefix}{self._pattern}")
        return True

    async def _look_for_more(self) -> None:
        """Be complete if the leader knows of nothing newer.

        A consumer doesn't know what is stored: it may be on a replica that is behind, and a value that is written again
        while it reads goes from where it has not yet been to where its count does not go. Where writing never ceases
        the leader always knows of something newer; a value that is missed in so many looks was written in each.
        """
        try:
            newest = await newest_sequence(self._nc, self._stream, self._prefix + self._pattern)
        except FlameError:
            self.broken.set()
            return
        if newest > self._position and self._looks < LOOKS:
            self._newest = newest
        elif not self.complete.done():
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
        self._on_repair = on_repair
        self._reading: Reading | None = None
        self._told = ToldKeys(handler)
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
        # What is gone went before the reading began; whoever has written it since knows a higher revision.
        self._told.tell_gone(fresh, reading.began_at)

    def _on_entry(self, entry: Entry) -> None:
        if self._fresh is not None:
            if entry.value is None:
                self._fresh.discard(entry.key)
            else:
                self._fresh.add(entry.key)
        self._told.tell(entry)

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
