"""Telling the cluster about one executor: its record, written in order and not too often."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from flame.broker.seam import Broker
from flame.cancel import end_task
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.records import ExecutorRecord

log = get_logger("flame.manager.record")

COUNTS_S: Final = 0.2
"""Between two records that differ in counts alone."""
_RETRY_FIRST_S: Final = 0.1
_RETRY_MAX_S: Final = 2.0


class RecordWriter:
    """The one writer of an executor's record.

    Every state is written, in order; of records in the same state only the last matters, and counts that a new state
    brings along are not written before. Whatever the broker does, it goes on until it has said everything.
    """

    def __init__(self, broker: Broker, node: str, executor: str) -> None:
        """Bind to a key; nothing is sent before `put`."""
        self._broker = broker
        self._bucket = broker.bucket(subjects.EXECUTORS)
        self._key = subjects.executor_key(node, executor)
        self._waiting: deque[ExecutorRecord] = deque()
        self._written: ExecutorRecord | None = None
        self._written_at = 0.0
        self._deleting = False
        self._failures = 0
        self._urgent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def put(self, record: ExecutorRecord) -> None:
        """Have a record written: a new state at once, counts soon."""
        if self._deleting:
            return
        if self._waiting and self._is_superseded(record):
            self._waiting[-1] = record
        else:
            self._waiting.append(record)
        if self._is_urgent():
            self._urgent.set()
        self._work()

    def _is_superseded(self, record: ExecutorRecord) -> bool:
        """Whether the newest record that waits need not be written, since ``record`` says all that it does."""
        newest = self._waiting[-1].state
        only_counts = len(self._waiting) == 1 and self._written is not None and newest is self._written.state
        return newest is record.state or only_counts

    def delete(self) -> None:
        """Have the record removed; nothing is written afterwards."""
        self._deleting = True
        self._waiting.clear()
        self._urgent.set()
        self._work()

    async def settled(self) -> None:
        """Return when all is written, or when `close` gave it up."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Write nothing more, whatever is left."""
        await end_task(self._task)

    def _work(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write_all(), name=f"record {self._key}")

    async def _write_all(self) -> None:
        while self._waiting:
            if not self._is_urgent():
                await self._pause()
            if self._waiting:
                await self._write(self._waiting.popleft())
        while self._deleting:
            if await self._attempt(partial(self._bucket.delete, self._key)):
                return

    def _is_urgent(self) -> bool:
        """Whether more than counts has changed."""
        return self._written is None or self._waiting[0].state is not self._written.state or len(self._waiting) > 1

    async def _pause(self) -> None:
        """Wait until counts may be written again, or something else has to be."""
        self._urgent.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._urgent.wait(), max(0.0, self._written_at + COUNTS_S - time.monotonic()))

    async def _write(self, record: ExecutorRecord) -> None:
        while not self._deleting:
            if self._waiting and self._waiting[0].state is record.state:
                record = self._waiting.popleft()  # newer counts came while the broker was away
            self._written = record
            if await self._attempt(partial(self._bucket.put, self._key, record.encode())):
                self._written_at = time.monotonic()
                return

    async def _attempt(self, operation: Callable[[], Awaitable[object]]) -> bool:
        """Try a write; after a failure wait a little. What fails may have happened: every write may be repeated."""
        problem = "not connected"
        try:
            if self._broker.connected:  # otherwise it would only fill the connection's buffer
                await operation()
                self._failures = 0
                return True
        except FlameError as error:
            problem = str(error)
        if self._failures == 0:
            log.warning("an executor's record can't be written; trying on", key=self._key, reason=problem)
        await asyncio.sleep(min(_RETRY_MAX_S, _RETRY_FIRST_S * 2 ** min(self._failures, 10)))
        self._failures += 1
        return False
