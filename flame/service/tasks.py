"""Taking a session's tasks, running them and storing their records: the hot path of an executor."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from flame.broker.errors import ConsumerMissing, Duplicate, StreamMissing
from flame.broker.seam import Broker, Delivery, Entry, Puller
from flame.cancel import end_tasks
from flame.errors import BrokerUnavailable, ConfigurationError, FlameError, InvalidArgument, MalformedMessage
from flame.ledger import Ledger
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import (
    Assignment,
    Attempts,
    ExecutorReport,
    ResultRecord,
    RunningEvent,
    TaskFault,
    TaskMessage,
)
from flame.protocol.states import TaskState
from flame.service.contexts import TaskContext, output_bytes
from flame.service.handlers import Handlers, fault_of
from flame.service.leases import Leases
from flame.service.prefetch import ServiceTime

log = get_logger("flame.executor")

WAIT_S: Final = 30.0
"""How long one request for a task stands."""
UNSTORED: Final = 1024
"""Records under way to the broker at most."""
STORE_TIMEOUT_S: Final = 5.0
TICK_S: Final = defaults.RUNNING_NOTICE_S
LOOP_TICK_S: Final = 0.05
"""How often the ledger is shown that the loop turns."""
AT_ONCE_S: Final = 0.01
"""A request that ends without a task sooner than this was refused."""
IDLE_S: Final = 0.08
"""After this long without a task an executor calls itself idle."""


async def flushed() -> None:
    """Let the connection write what it was given: its writer runs when the loop turns."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


class _Run:
    """One task that user code works on."""

    __slots__ = ("announced", "attempt", "started", "task_id")

    def __init__(self, task_id: str, attempt: int, started: float, announced: bool) -> None:
        self.task_id = task_id
        self.attempt = attempt
        self.started = started
        self.announced = announced


class TaskRunner:
    """Serves one session's tasks until it is told to leave."""

    def __init__(self, broker: Broker, assignment: Assignment, executor: str, handlers: Handlers) -> None:
        """Serve ``assignment`` with a service's handlers."""
        self._broker = broker
        self._assignment = assignment
        self._executor = executor
        self._handlers = handlers
        self._loop = asyncio.get_running_loop()
        self._task_prefix = len(subjects.task(assignment.application, assignment.session, ""))
        self._result_prefix = subjects.result(assignment.application, assignment.session, "")
        self._result_stream = subjects.result_stream(assignment.application)
        self._ledger = _open_ledger(assignment.ledger)
        self._leases = Leases(assignment.ack_wait_s)
        self._extension_s = defaults.extension_s(assignment.ack_wait_s)
        self._silence_s = defaults.manager_silence_s(assignment.ack_wait_s)
        self._slots: dict[str, int] = {}
        """The ledger's slot of each delivery that is held, runs, or whose record is on its way."""
        self._busy = asyncio.Event()
        self._service_time = ServiceTime()
        self._held: deque[Delivery] = deque()
        self._running: dict[str, _Run] = {}
        self._unstored = 0
        self._settled: asyncio.Future[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._puller: Puller | None = None
        self._last_handle = ""
        self._leaving = asyncio.Event()
        self._idle_since = self._loop.time()
        self._called_idle = False
        self._over = False
        """Nothing is served any more: what could not be stored is another's to run."""
        self._pending = 0
        self._succeeded = 0
        self._failed = 0
        self._fence = assignment.fence
        self.lost_consumer = asyncio.Event()
        """Set while the consumer can't be found; `consumer_restored` clears it."""
        self._restored = asyncio.Event()
        self.on_change: Callable[[], None] = lambda: None
        """Called when the manager should hear of a change at once."""
        self.on_quiet: Callable[[], None] = lambda: None
        """Called when there is nothing to do for now: the manager should hear of it if that stays so."""

    # ---- what the manager hears

    def fill(self, report: ExecutorReport) -> ExecutorReport:
        """Add the numbers to a report."""
        report.succeeded = self._succeeded
        report.failed = self._failed
        report.running = len(self._running)
        report.held = len(self._held)
        report.pending = self._pending
        idle_s = self._loop.time() - self._idle_since if self._quiet() else 0.0
        report.idle_s = idle_s if idle_s >= IDLE_S else 0.0
        self._called_idle = report.idle_s > 0
        report.lost_consumer = self.lost_consumer.is_set()
        return report

    def _quiet(self) -> bool:
        return not self._running and not self._held and not self._unstored

    # ---- serving

    def leave(self) -> None:
        """Take no more tasks; `serve` returns when the running ones have their records."""
        if not self._leaving.is_set():
            self._leaving.set()
            self._restored.set()
            self._wake()
            if self._puller is not None:
                self._spawn(self._stop_pulling(self._puller))

    def consumer_restored(self, fence: int) -> None:
        """Go on pulling: the consumer exists again, and what it delivers up to ``fence`` may have run."""
        self._fence = max(self._fence, fence)
        self.lost_consumer.clear()
        self._restored.set()

    async def serve(self) -> None:
        """Take and run tasks until `leave`; then every task taken has its record or was handed back."""
        ticker = self._loop.create_task(self._tick())
        forget = self._broker.on_reconnect(self._reconnected)
        try:
            self._puller = await self._broker.pull(self._assignment.stream, self._assignment.consumer)
            while not self._leaving.is_set():
                if not self._held:
                    await self._take()
                if self._assignment.concurrency == 1:
                    while self._held and not self._leaving.is_set():
                        await self._run(self._held.popleft())
                else:
                    await self._run_some()
            await self._drain()
        finally:
            self._over = True
            forget()
            await end_tasks((ticker, *self._background))
            if self._ledger is not None:
                self._ledger.close()

    async def _take(self) -> None:
        """Wait for tasks and hold them."""
        most = self._service_time.burst(self._assignment.concurrency) - len(self._running)
        if self._ledger is not None:
            most = min(most, self._ledger.room)
        assert self._puller is not None
        asked = time.monotonic()
        try:
            taken = await self._puller.burst(max(1, most), WAIT_S)
        except ConsumerMissing:
            if not self._leaving.is_set():
                await self._await_consumer()
            return
        except BrokerUnavailable:
            await asyncio.sleep(defaults.BACKOFF_FIRST_S)  # disconnected; the connection comes back by itself
            return
        now = time.monotonic()
        if taken:
            self._hold(taken, now)
        elif now - asked < AT_ONCE_S:
            await asyncio.sleep(defaults.BACKOFF_FIRST_S)  # refused: there are too many requests, or no leader

    def _hold(self, taken: Sequence[Delivery], now: float) -> None:
        """Note what was taken before any of it runs."""
        for delivery in taken:
            self._leases.take(delivery.handle, now)
        if self._ledger is not None:
            self._ledger.tick(now)
            for delivery in taken:
                key = subjects.task_key(delivery.subject)
                self._slots[delivery.handle] = self._ledger.take(delivery.handle, key, now)
        self._held.extend(taken)
        self._busy.set()
        had_backlog = self._pending > 0
        self._pending = taken[-1].pending
        if self._called_idle or (self._pending > 0) != had_backlog:
            self._called_idle = False
            self.on_change()

    async def _await_consumer(self) -> None:
        """Tell the manager that the consumer is gone and wait until it is there again."""
        self._restored.clear()
        self.lost_consumer.set()
        self.on_change()
        await self._restored.wait()

    async def _run_some(self) -> None:
        """Start what is held in tasks of their own, and wait while all places are taken."""
        while self._held and not self._leaving.is_set():
            if len(self._running) >= self._assignment.concurrency:
                break
            delivery = self._held.popleft()
            run = self._spawn(self._run_apart(delivery))
            self._running.setdefault(delivery.handle, _Run("", 1, 0.0, announced=True))
            run.add_done_callback(lambda _: self._wake())
        if not self._leaving.is_set() and (self._held or len(self._running) >= self._assignment.concurrency):
            await self._next_end()

    async def _run_apart(self, delivery: Delivery) -> None:
        """Run one delivery beside others: a fault of ours must not take its place away for ever."""
        try:
            await self._run(delivery)
        except Exception:
            log.exception("a task could not be run; it comes again when its lease has run out", task=delivery.subject)
            self._let_go(delivery.handle)

    async def _next_end(self) -> None:
        """Wait until a task or the storing of a record has ended."""
        if self._settled is None or self._settled.done():
            self._settled = self._loop.create_future()
        await asyncio.shield(self._settled)

    def _wake(self) -> None:
        if self._settled is not None and not self._settled.done():
            self._settled.set_result(None)

    # ---- one task

    async def _run(self, delivery: Delivery) -> None:
        """Run one delivery and begin to store its record."""
        handle = delivery.handle
        if not self._holds(handle):
            self._let_go(handle)
            return  # held too long: the broker gives it to another
        try:
            message = TaskMessage.decode(delivery.data)
        except MalformedMessage as error:
            fault = TaskFault(ErrorCode.INVALID_ARGUMENT, f"the task can't be read: {error}")
            await self._store(delivery, ResultRecord(TaskState.FAILED, error=fault, finished=time.time()))
            return
        attempt = 1
        if delivery.delivered > 1 or delivery.sequence <= self._fence or message.again:
            attempt = await self._attempt(delivery)
            if not attempt:
                return
        started = time.time()
        if self._ledger is not None and not self._start_in_ledger(handle):
            self._let_go(handle)
            return  # taken away while the loop was blocked: another runs it
        task_id = delivery.subject[self._task_prefix :]
        self._running[handle] = _Run(task_id, attempt, started, message.listen)
        if message.listen:
            await self._announce(task_id, attempt, started)
            await flushed()  # what was sent leaves before user code that may block
        context = TaskContext(self._assignment.session, task_id, message.input, attempt)
        await self._store(delivery, await self._invoke(context, started))

    async def _invoke(self, context: TaskContext, started: float) -> ResultRecord:
        """Run user code and make the record of what came of it."""
        try:
            output = output_bytes(await self._handlers.invoke(context))
        except asyncio.CancelledError as error:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            record = ResultRecord(TaskState.FAILED, error=fault_of(error))  # user code let its own cancellation out
        except Exception as error:  # noqa: BLE001  # whatever user code raises is the task's outcome
            record = ResultRecord(TaskState.FAILED, error=fault_of(error))
        else:
            record = ResultRecord(TaskState.SUCCEED, output)
        record.executor = self._executor
        record.attempt = context.attempt
        record.started = started
        record.finished = time.time()
        self._service_time.note(record.finished - started)
        return record

    async def _attempt(self, delivery: Delivery) -> int:
        """Look at a delivery that may be a repetition and return which attempt at its task this is.

        0 if it must not run: it has its record and is only acknowledged, it was the end of too many executors and gets
        one, or its lease ran out meanwhile.
        """
        subject = self._result_prefix + delivery.subject[self._task_prefix :]
        attempts = self._broker.bucket(subjects.ATTEMPTS)
        while self._holds(delivery.handle):
            try:
                found, entry = await asyncio.gather(
                    self._broker.last(self._result_stream, subject), attempts.get(subjects.task_key(delivery.subject))
                )
            except StreamMissing:
                break  # its application is gone
            except FlameError:
                await asyncio.sleep(defaults.BACKOFF_FIRST_S)
                continue
            if found is not None:
                with contextlib.suppress(BrokerUnavailable):  # it comes back, and is looked up again
                    await self._broker.acknowledge(delivery.handle)
                break
            lost = _lost_with(entry)
            if lost >= defaults.POISON_LIMIT:
                fault = TaskFault(ErrorCode.TASK_FAILED, f"given up: {lost} executors were lost while they ran it")
                await self._store(
                    delivery, ResultRecord(TaskState.FAILED, error=fault, attempt=lost, finished=time.time())
                )
                return 0
            return lost + 1
        self._let_go(delivery.handle)
        return 0

    # ---- what is held

    def _holds(self, handle: str) -> bool:
        """Whether a delivery is certainly still this executor's, by its own extensions or its manager's."""
        now = time.monotonic()
        if self._leases.holds(handle, now):
            return True
        ledger = self._ledger
        if ledger is None or self._slots.get(handle, -1) < 0 or not ledger.kept_by_manager(now, self._silence_s):
            return False
        return self._leases.lapses_at(handle) >= ledger.kept_since()

    def _start_in_ledger(self, handle: str) -> bool:
        slot = self._slots.get(handle, -1)
        assert self._ledger is not None
        if slot < 0 or self._ledger.start(slot, time.monotonic()):
            return True
        del self._slots[handle]  # the ledger has cleared it
        return False

    def _let_go(self, handle: str) -> None:
        """Forget a delivery that is finished, or another's."""
        self._leases.end(handle)
        self._running.pop(handle, None)
        slot = self._slots.pop(handle, -1)
        if slot >= 0 and self._ledger is not None:
            self._ledger.clear(slot)

    async def _announce(self, task_id: str, attempt: int, started: float) -> None:
        subject = subjects.event(self._assignment.application, self._assignment.session, task_id, "running")
        with contextlib.suppress(BrokerUnavailable):  # live only: who misses it learns of the end
            await self._broker.publish(subject, RunningEvent(self._executor, attempt, started).encode())

    # ---- its record

    async def _store(self, delivery: Delivery, record: ResultRecord) -> None:
        """Begin to store a record; the task is acknowledged when it is stored."""
        data = record.encode()
        if len(data) > defaults.INLINE_LIMIT_BYTES:
            record.error = TaskFault(
                ErrorCode.PAYLOAD_TOO_LARGE,
                f"output of {len(record.output)} bytes: with its envelope {len(data)}, the limit is"
                f" {defaults.INLINE_LIMIT_BYTES}",
                InvalidArgument.__qualname__,
            )
            record.state, record.output = TaskState.FAILED, b""
            data = record.encode()
        while self._unstored >= UNSTORED:
            await self._next_end()
        self._unstored += 1
        self._running.pop(delivery.handle, None)
        subject = self._result_prefix + delivery.subject[self._task_prefix :]
        on_done = partial(self._on_stored, delivery, record, data)
        try:
            await self._broker.store_then(subject, data, STORE_TIMEOUT_S, on_done, delivery.handle)
        except FlameError as error:
            on_done(0, error)

    def _on_stored(
        self, delivery: Delivery, record: ResultRecord, data: bytes, _sequence: int, error: FlameError | None
    ) -> None:
        if error is None:
            if record.state is TaskState.SUCCEED:
                self._succeeded += 1
            else:
                self._failed += 1
        elif isinstance(error, StreamMissing):
            log.warning("a record has no stream any more", task=delivery.subject)
        elif not isinstance(error, Duplicate) and not self._over:
            self._spawn(self._store_again(delivery, record, data, error))
            return
        self._let_go(delivery.handle)
        self._last_handle = delivery.handle
        self._unstored -= 1
        if self._quiet():
            self._idle_since = self._loop.time()
            self.on_quiet()
        self._wake()

    async def _store_again(
        self, delivery: Delivery, record: ResultRecord, data: bytes, error: FlameError | None
    ) -> None:
        """Keep trying to store a record: it must not be lost, and its lease is kept meanwhile."""
        subject = self._result_prefix + delivery.subject[self._task_prefix :]
        pause_s = defaults.BACKOFF_FIRST_S
        while True:
            log.error("a record could not be stored; trying again", task=delivery.subject, error=str(error))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, defaults.BACKOFF_MAX_S)
            try:
                await (await self._broker.begin_store(subject, data, STORE_TIMEOUT_S, delivery.handle))
                error = None
            except Duplicate as final:
                error = None if await self._is_ours(subject) else final
            except StreamMissing as final:
                error = final
            except FlameError as again:
                error = again
                continue
            self._on_stored(delivery, record, data, 0, error)
            return

    async def _is_ours(self, result: str) -> bool:
        """Whether the record that is stored is this executor's: an earlier attempt was stored, but not acknowledged."""
        try:
            found = await self._broker.last(self._result_stream, result)
            return found is not None and ResultRecord.decode(found.data).executor == self._executor
        except FlameError as error:
            log.debug("it is not known whose record is stored; it is not counted", result=result, error=str(error))
            return False

    # ---- leaving

    async def _stop_pulling(self, puller: Puller) -> None:
        for delivery in await puller.stop():
            await self._hand_back(delivery)

    async def _hand_back(self, delivery: Delivery) -> None:
        stolen = self._ledger is not None and self._ledger.stolen(self._slots.get(delivery.handle, -1))
        self._let_go(delivery.handle)
        if stolen:
            return  # its manager has done so already
        with contextlib.suppress(BrokerUnavailable):  # disconnected: its lease runs out
            await self._broker.hand_back(delivery.handle)

    async def _drain(self) -> None:
        """Hand back what is held and wait for what runs and for every record."""
        while self._held:
            delivery = self._held.popleft()
            if self._holds(delivery.handle):
                await self._hand_back(delivery)
            else:
                self._let_go(delivery.handle)
        while self._running or self._unstored or self._background:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._next_end()
        if self._last_handle:
            # The consumer is deleted after this: every acknowledgement must have been taken by then.
            try:
                await self._broker.acknowledge_surely(self._last_handle, 2.0)
            except FlameError as error:
                log.debug("the last acknowledgement is uncertain", error=str(error))

    # ---- time

    async def _tick(self) -> None:
        """While there is work: show that the loop turns, keep leases, announce tasks that run for long."""
        looked = 0.0
        while True:
            await self._busy.wait()
            await asyncio.sleep(LOOP_TICK_S)
            now = time.monotonic()
            if self._ledger is not None:
                self._ledger.tick(now)
            if now - looked < TICK_S:
                continue
            looked = now
            await self._keep_leases(now)
            wall = time.time()
            for run in list(self._running.values()):
                if not run.announced and run.task_id and wall - run.started >= defaults.RUNNING_NOTICE_S:
                    run.announced = True
                    await self._announce(run.task_id, run.attempt, run.started)
            if self._quiet():
                self._busy.clear()

    async def _keep_leases(self, now: float) -> None:
        """Extend leases, unless the manager does so."""
        ledger = self._ledger
        kept_since = (
            ledger.kept_since() if ledger is not None and ledger.kept_by_manager(now, self._silence_s) else None
        )
        try:
            for handle in self._leases.due(now, self._extension_s, kept_since):
                if kept_since is None or self._slots.get(handle, -1) < 0:
                    await self._broker.extend(handle)
        except BrokerUnavailable as error:
            log.debug("could not extend leases", error=str(error))

    def _reconnected(self) -> None:
        """What this connection had said of leases may be lost, and the consumer may be another one."""
        self._spawn(self._raise_fence())

    async def _raise_fence(self) -> None:
        stream, consumer = self._assignment.stream, self._assignment.consumer
        try:
            self._fence = max(self._fence, (await self._broker.stream_state(stream)).last_sequence)
            await self._broker.consumer_state(stream, consumer)
        except ConsumerMissing:
            # The server has restarted: what it had delivered is delivered anew, so what was not started is not ours.
            self._leases.forget_all()
        except FlameError as error:
            log.debug("could not look at the stream after a reconnect", error=str(error))

    def _spawn(self, coroutine: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)  # type: ignore[arg-type]
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _lost_with(entry: Entry | None) -> int:
    """Return how many executors were lost while they ran a task. What can't be read must not stop the task."""
    if entry is None or entry.value is None:
        return 0
    try:
        return Attempts.decode(entry.value).lost
    except MalformedMessage as error:
        log.warning("a count of attempts can't be read", task=entry.key, error=str(error))
        return 0


def _open_ledger(path: str) -> Ledger | None:
    if not path:
        return None
    try:
        return Ledger(path)
    except ConfigurationError as error:
        log.warning("without its ledger the executor keeps its leases itself", error=str(error))
        return None
