"""Storing the records of tasks, and counting them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from flame.broker.errors import Duplicate, StreamMissing
from flame.broker.seam import Broker, Delivery
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.messages import ResultRecord, TaskFault
from flame.protocol.states import TaskState
from flame.protocol.supervision import Assignment
from flame.service.bell import Bell
from flame.service.counts import Counts
from flame.service.holdings import Holdings
from flame.service.values import store_output

log = get_logger("flame.executor")

UNSTORED: Final = 1024
"""Records under way to the broker at most."""
STORE_TIMEOUT_S: Final = 5.0


class Recorder:
    """Brings records to the broker. When its own is stored a task is acknowledged and not this executor's any more."""

    def __init__(
        self,
        broker: Broker,
        assignment: Assignment,
        executor: str,
        holdings: Holdings,
        bell: Bell,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """Store what ``executor`` makes; ``spawn`` is called with what goes on by itself."""
        self._broker = broker
        self._assignment = assignment
        self._executor = executor
        self._holdings = holdings
        self._bell = bell
        self._spawn = spawn
        self._tasks = len(subjects.task(assignment.application, assignment.session, ""))
        self._results = subjects.result(assignment.application, assignment.session, "")
        self._stream = subjects.result_stream(assignment.application)
        self._over = False
        self.counts = Counts()
        self.unstored = 0
        """Records under way."""
        self.storing = 0
        """Outputs under way that are too large for their records: to whoever asks, their tasks still run."""
        self.last_handle = ""
        """Of the delivery that was finished last."""
        self.on_end: Callable[[], None] = lambda: None
        """Called when a record is stored, or never will be by this executor."""
        self.on_delay: Callable[[float], None] = lambda _seconds: None
        """Called with how long a large output took, during which nothing else could be run in its place."""

    def give_up(self) -> None:
        """Repeat nothing from now on: what could not be stored is another's to run."""
        self._over = True

    async def store(self, delivery: Delivery, record: ResultRecord) -> None:
        """Begin to store a task's record, as this executor's."""
        record.executor = self._executor
        large = len(record.output) > defaults.INLINE_LIMIT_BYTES
        data = b"" if large else record.encode()
        if large or len(data) > defaults.INLINE_LIMIT_BYTES:
            data = await self._in_parts(delivery, record)
        while self.unstored >= UNSTORED:
            await self._bell.wait()
        self.unstored += 1
        subject = self._results + delivery.subject[self._tasks :]
        on_done = partial(self._on_stored, delivery, record.state, data, self.counts.begin())
        try:
            await self._broker.store_then(subject, data, STORE_TIMEOUT_S, on_done, delivery.handle)
        except FlameError as error:
            on_done(0, error)

    async def _in_parts(self, delivery: Delivery, record: ResultRecord) -> bytes:
        """Store an output that is too large for a record, and return the record that refers to it, or says why not."""
        began = time.monotonic()
        self._holdings.start(delivery.handle, began, 0.0)  # its time limit was for the run, which is over
        self.unstored += 1
        self.storing += 1
        try:
            await store_output(self._broker, self._assignment, record)
        except FlameError as error:
            text = f"its output can't be stored: {error}"
            record.error = TaskFault(error.code, text, type(error).__qualname__)
            record.state, record.output = TaskState.FAILED, b""
        finally:
            self.unstored -= 1
            self.storing -= 1
        self.on_delay(time.monotonic() - began)
        return record.encode()

    def _on_stored(
        self, delivery: Delivery, state: TaskState, data: bytes, number: int, sequence: int, error: FlameError | None
    ) -> None:
        if error is None:
            self.counts.done(number, state, sequence)
        elif isinstance(error, Duplicate | StreamMissing) or self._over:
            self._note_refusal(delivery, error)
            self.counts.done(number, None, 0)
        else:
            self.counts.failed_once(number)
            self._spawn(self._store_again(delivery, state, data, number, error))
            return
        self._ended(delivery.handle)

    def _ended(self, handle: str) -> None:
        self._holdings.end(handle)
        self.last_handle = handle
        self.unstored -= 1
        self.on_end()

    async def _store_again(
        self, delivery: Delivery, state: TaskState, data: bytes, number: int, error: FlameError
    ) -> None:
        """Keep trying to store a record: it must not be lost, and its lease is kept meanwhile."""
        subject = self._results + delivery.subject[self._tasks :]
        pause_s = defaults.BACKOFF_FIRST_S
        while True:
            log.error("a record could not be stored; trying again", task=delivery.subject, error=str(error))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, defaults.BACKOFF_MAX_S)
            sequence = 0
            try:
                sequence = await (await self._broker.begin_store(subject, data, STORE_TIMEOUT_S, delivery.handle))
            except Duplicate:
                sequence = await self._stored_before(subject, data)
            except StreamMissing as final:
                self._note_refusal(delivery, final)
            except FlameError as again:
                error = again
                continue
            self.counts.done_again(number, state if sequence else None, sequence)
            self._ended(delivery.handle)
            return

    async def _stored_before(self, result: str, data: bytes) -> int:
        """Return the sequence of a record that an earlier attempt stored; 0 if the one that is there is another one.

        That may be this executor's as well: of another run of the task, which was delivered to it again meanwhile.
        """
        while True:
            try:
                found = await self._broker.last(self._stream, result)
            except StreamMissing:
                return 0
            except FlameError as error:
                log.debug("it is not known whose record is stored; asking again", result=result, error=str(error))
                await asyncio.sleep(defaults.BACKOFF_FIRST_S)
            else:
                return found.sequence if found is not None and found.data == data else 0

    def _note_refusal(self, delivery: Delivery, error: FlameError) -> None:
        if isinstance(error, StreamMissing):
            log.warning("a record has no stream any more", task=delivery.subject)
