"""Taking a session's tasks, running them and storing their records: the hot path of an executor."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from flame.broker.errors import ConsumerMissing, Duplicate, StreamMissing
from flame.broker.seam import Broker, Delivery, Puller
from flame.cancel import end_tasks
from flame.errors import BrokerUnavailable, FlameError, InvalidArgument, MalformedMessage
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import Assignment, ExecutorReport, ResultRecord, RunningEvent, TaskFault, TaskMessage
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
IDLE_S: Final = 0.08
"""After this long without a task an executor calls itself idle."""


async def flushed() -> None:
    """Let the connection write what it was given: its writer runs when the loop turns."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


class _Run:
    """One task that user code works on."""

    __slots__ = ("announced", "started", "task_id")

    def __init__(self, task_id: str, started: float, announced: bool) -> None:
        self.task_id = task_id
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
        self._leases = Leases(assignment.ack_wait_s)
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
                await self._take()
                if self._assignment.concurrency == 1:
                    while self._held and not self._leaving.is_set():
                        await self._run(self._held.popleft())
                else:
                    await self._run_some()
            await self._drain()
        finally:
            forget()
            await end_tasks((ticker, *self._background))

    async def _take(self) -> None:
        """Wait for tasks and hold them."""
        most = self._service_time.burst(self._assignment.concurrency) - len(self._running)
        assert self._puller is not None
        try:
            taken = await self._puller.burst(max(1, most), WAIT_S)
        except ConsumerMissing:
            if not self._leaving.is_set():
                await self._await_consumer()
            return
        except BrokerUnavailable:
            await asyncio.sleep(defaults.BACKOFF_FIRST_S)  # disconnected; the connection comes back by itself
            return
        if not taken:
            return
        now = self._loop.time()
        for delivery in taken:
            self._leases.take(delivery.handle, now)
        self._held.extend(taken)
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
            run = self._spawn(self._run(delivery))
            self._running.setdefault(delivery.handle, _Run("", self._loop.time(), True))
            run.add_done_callback(lambda _: self._wake())
        if self._held or len(self._running) >= self._assignment.concurrency:
            await self._next_end()

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
        if not self._leases.holds(handle, self._loop.time()):
            self._running.pop(handle, None)
            return  # held too long: the broker gives it to another
        try:
            message = TaskMessage.decode(delivery.data)
        except MalformedMessage as error:
            fault = TaskFault(ErrorCode.INVALID_ARGUMENT, f"the task can't be read: {error}")
            await self._store(delivery, ResultRecord(TaskState.FAILED, error=fault, finished=time.time()))
            return
        repeated = delivery.delivered > 1 or delivery.sequence <= self._fence or message.again
        if repeated and await self._finished_before(delivery):
            return
        task_id = delivery.subject[self._task_prefix :]
        started = time.time()
        self._running[handle] = _Run(task_id, started, message.listen)
        if message.listen:
            await self._announce(task_id, started)
            await flushed()  # what was sent leaves before user code that may block
        record = await self._invoke(TaskContext(self._assignment.session, task_id, message.input), started)
        await self._store(delivery, record)

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
        record.started = started
        record.finished = time.time()
        self._service_time.note(record.finished - started)
        return record

    async def _finished_before(self, delivery: Delivery) -> bool:
        """Look whether a delivery that may be a repetition has its record; if so, only acknowledge it."""
        subject = self._result_prefix + delivery.subject[self._task_prefix :]
        while self._leases.holds(delivery.handle, self._loop.time()):
            try:
                found = await self._broker.last(self._result_stream, subject)
            except BrokerUnavailable:
                await asyncio.sleep(defaults.BACKOFF_FIRST_S)
                continue
            if found is None:
                return False
            await self._broker.acknowledge(delivery.handle)
            break
        self._leases.end(delivery.handle)
        self._running.pop(delivery.handle, None)
        return True

    async def _announce(self, task_id: str, started: float) -> None:
        subject = subjects.event(self._assignment.application, self._assignment.session, task_id, "running")
        with contextlib.suppress(BrokerUnavailable):  # live only: who misses it learns of the end
            await self._broker.publish(subject, RunningEvent(self._executor, 1, started).encode())

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
        try:
            stored = await self._broker.begin_store(subject, data, STORE_TIMEOUT_S, delivery.handle)
        except FlameError as error:
            self._on_stored(delivery, record, data, error)
        else:
            stored.add_done_callback(
                lambda future: (
                    None if future.cancelled() else self._on_stored(delivery, record, data, future.exception())
                )
            )

    def _on_stored(self, delivery: Delivery, record: ResultRecord, data: bytes, error: BaseException | None) -> None:
        if error is None:
            if record.state is TaskState.SUCCEED:
                self._succeeded += 1
            else:
                self._failed += 1
        elif isinstance(error, StreamMissing):
            log.warning("a record has no stream any more", task=delivery.subject)
        elif not isinstance(error, Duplicate):
            self._spawn(self._store_again(delivery, record, data, error))
            return
        self._leases.end(delivery.handle)
        self._last_handle = delivery.handle
        self._unstored -= 1
        if self._quiet():
            self._idle_since = self._loop.time()
            self.on_quiet()
        self._wake()

    async def _store_again(
        self, delivery: Delivery, record: ResultRecord, data: bytes, error: BaseException | None
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
            except (Duplicate, StreamMissing) as final:
                error = final
            except FlameError as again:
                error = again
                continue
            self._on_stored(delivery, record, data, error)
            return

    # ---- leaving

    async def _stop_pulling(self, puller: Puller) -> None:
        for delivery in await puller.stop():
            await self._hand_back(delivery)

    async def _hand_back(self, delivery: Delivery) -> None:
        self._leases.end(delivery.handle)
        with contextlib.suppress(BrokerUnavailable):  # disconnected: its lease runs out
            await self._broker.hand_back(delivery.handle)

    async def _drain(self) -> None:
        """Hand back what is held and wait for what runs and for every record."""
        while self._held:
            delivery = self._held.popleft()
            if self._leases.holds(delivery.handle, self._loop.time()):
                await self._hand_back(delivery)
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
        """Extend leases, and announce tasks that have been running for a while."""
        extended = self._loop.time()
        while True:
            await asyncio.sleep(TICK_S if self._running else 10 * TICK_S)
            now = self._loop.time()
            if now - extended >= defaults.LEASE_EXTENSION_S / 2 and len(self._leases):
                extended = now
                try:
                    for handle in self._leases.due(now, defaults.LEASE_EXTENSION_S / 2):
                        await self._broker.extend(handle)
                except BrokerUnavailable as error:
                    log.debug("could not extend leases", error=str(error))
            wall = time.time()
            for run in list(self._running.values()):
                if not run.announced and run.task_id and wall - run.started >= defaults.RUNNING_NOTICE_S:
                    run.announced = True
                    await self._announce(run.task_id, run.started)

    def _reconnected(self) -> None:
        """What this connection had said of leases may be lost, and the consumer may be another one."""
        self._spawn(self._raise_fence())

    async def _raise_fence(self) -> None:
        try:
            state = await self._broker.stream_state(self._assignment.stream)
        except FlameError as error:
            log.debug("could not read the stream after a reconnect", error=str(error))
        else:
            self._fence = max(self._fence, state.last_sequence)

    def _spawn(self, coroutine: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)  # type: ignore[arg-type]
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
