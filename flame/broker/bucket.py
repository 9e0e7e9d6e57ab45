"""Key-value buckets on JetStream, compatible with the `nats kv` command."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Final

from flame.broker.errors import RevisionConflict
from flame.broker.leader import read_raw, stored_message
from flame.broker.seam import Entry, EntryHandler, Listener, Subscription
from flame.broker.watch import Watch, read_all
from flame.broker.wire import EXPECTED_REVISION, KV_MARKER, KV_OPERATION, ROLLUP, TTL, insist
from flame.errors import BrokerUnavailable, FlameError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nats.aio.client import Client

    from flame.broker.publisher import Publisher

MARKER_TTL: Final = "3600s"
"""How long a deletion is kept for watchers that were away; those away longer read everything again."""

ATTEMPT_S: Final = 3.0
ATTEMPTS: Final = 4
"""At a write that isn't acknowledged: together longer than a bucket is without a leader when its server dies."""


def bucket_stream(name: str) -> str:
    """The stream under a bucket."""
    return f"KV_{name}"


def _marks_deletion(message: dict[str, Any]) -> bool:
    headers = base64.b64decode(message.get("hdrs", "")).decode("utf-8", "replace")
    return f"{KV_OPERATION}:" in headers or f"{KV_MARKER}:" in headers


class JetStreamBucket:
    """One bucket."""

    def __init__(self, nc: Client, publisher: Publisher, name: str, on_reconnect: Callable[[Listener], Any]) -> None:
        """Bind to a bucket; nothing is sent."""
        self._nc = nc
        self._publisher = publisher
        self._stream = bucket_stream(name)
        self._prefix = f"$KV.{name}."
        self._on_reconnect = on_reconnect

    async def get(self, key: str) -> Entry | None:
        """See `flame.broker.seam.Bucket.get`."""
        message = await self._last(key)
        if message is None or _marks_deletion(message):
            return None
        stored = stored_message(message)
        return Entry(key, stored.data, stored.sequence)

    async def create(self, key: str, value: bytes) -> int:
        """See `flame.broker.seam.Bucket.create`."""
        try:
            return await self._write(key, value, {EXPECTED_REVISION: "0"})
        except RevisionConflict:
            message = await self._last(key)
            if message is None or not _marks_deletion(message):
                raise
            return await self._write(key, value, {EXPECTED_REVISION: str(message["seq"])})

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """See `flame.broker.seam.Bucket.update`."""
        return await self._write(key, value, {EXPECTED_REVISION: str(revision)})

    async def put(self, key: str, value: bytes) -> int:
        """See `flame.broker.seam.Bucket.put`."""
        return await self._write(key, value, None)

    async def delete(self, key: str, revision: int | None = None) -> None:
        """See `flame.broker.seam.Bucket.delete`."""
        headers = {KV_OPERATION: "PURGE", ROLLUP: "sub", TTL: MARKER_TTL}
        if revision is not None:
            headers[EXPECTED_REVISION] = str(revision)
        await self._write(key, b"", headers)

    async def clear(self, pattern: str) -> int:
        """See `flame.broker.seam.Bucket.clear`."""
        body = {"filter": self._prefix + pattern}
        answer = await insist(self._nc, f"STREAM.PURGE.{self._stream}", body, f"clear {self._prefix}{pattern}")
        return int(answer.get("purged", 0))

    async def entries(self, pattern: str = ">") -> list[Entry]:
        """See `flame.broker.seam.Bucket.entries`."""
        return await read_all(self._nc, self._stream, self._prefix, pattern)

    async def watch(self, pattern: str, handler: EntryHandler, on_repair: Listener | None = None) -> Subscription:
        """See `flame.broker.seam.Bucket.watch`."""
        watch = Watch(self._nc, self._stream, self._prefix, pattern, handler, on_repair, self._on_reconnect)
        await watch.start()
        return watch

    async def _last(self, key: str) -> dict[str, Any] | None:
        subject = self._prefix + key
        return await read_raw(self._nc, self._stream, {"last_by_subj": subject}, f"read {subject}")

    async def _write(self, key: str, value: bytes, headers: dict[str, str] | None) -> int:
        for attempt in range(1, ATTEMPTS + 1):
            future = await self._publisher.publish(self._prefix + key, value, ATTEMPT_S, headers)
            try:
                return await future
            except BrokerUnavailable:
                if attempt == ATTEMPTS:
                    raise
            except RevisionConflict as error:
                written = await self._written_before(key, value) if attempt > 1 else 0
                if written:
                    return written
                raise RevisionConflict(f"write {self._prefix}{key}: {error}") from error
            except FlameError as error:
                raise type(error)(f"write {self._prefix}{key}: {error}") from error
        raise AssertionError("unreachable")

    async def _written_before(self, key: str, value: bytes) -> int:
        """Return the revision that an earlier attempt has written, whose acknowledgement was lost; 0 if none has."""
        message = await self._last(key)
        if message is None:
            return 0
        stored = stored_message(message)
        return stored.sequence if stored.data == value and (value or _marks_deletion(message)) else 0
