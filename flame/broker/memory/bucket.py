"""One connection's side of a bucket."""

from __future__ import annotations

from collections.abc import Callable

from flame.broker.memory.calls import Calls
from flame.broker.memory.table import MemoryTable
from flame.broker.memory.watch import MemoryWatch
from flame.broker.seam import Entry, EntryHandler, Listener


class MemoryBucket:
    """One bucket; see `flame.broker.seam.Bucket` for what each operation does."""

    def __init__(self, calls: Calls, name: str, on_reconnect: Callable[[Listener], Callable[[], None]]) -> None:
        """Bind to a bucket; nothing is sent."""
        self._calls = calls
        self._name = name
        self._on_reconnect = on_reconnect

    def _table(self) -> MemoryTable:
        return self._calls.server.table(self._name)

    async def get(self, key: str) -> Entry | None:
        """See `flame.broker.seam.Bucket.get`."""
        return await self._calls.ask(f"read {self._name}.{key}", lambda: self._table().get(key))

    async def create(self, key: str, value: bytes) -> int:
        """See `flame.broker.seam.Bucket.create`."""
        return await self._write(key, value, lambda: self._table().create(key, value))

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """See `flame.broker.seam.Bucket.update`."""
        return await self._write(key, value, lambda: self._table().write(key, value, revision))

    async def put(self, key: str, value: bytes) -> int:
        """See `flame.broker.seam.Bucket.put`."""
        return await self._write(key, value, lambda: self._table().write(key, value))

    async def delete(self, key: str, revision: int | None = None) -> None:
        """See `flame.broker.seam.Bucket.delete`."""
        await self._write(key, b"", lambda: self._table().write(key, None, revision))

    async def clear(self, pattern: str) -> int:
        """See `flame.broker.seam.Bucket.clear`."""
        return await self._calls.ask(f"clear {self._name}.{pattern}", lambda: self._table().clear(pattern))

    async def entries(self, pattern: str = ">") -> list[Entry]:
        """See `flame.broker.seam.Bucket.entries`."""
        return await self._calls.ask(f"read {self._name}.{pattern}", lambda: self._table().entries(pattern))

    async def watch(self, pattern: str, handler: EntryHandler, on_repair: Listener | None = None) -> MemoryWatch:
        """See `flame.broker.seam.Bucket.watch`."""
        watch = MemoryWatch(self._calls, self._name, pattern, handler, on_repair, self._on_reconnect)
        await watch.start()
        return watch

    async def _write(self, key: str, value: bytes, action: Callable[[], int]) -> int:
        return await self._calls.write(f"write {self._name}.{key}", action, len(value))
