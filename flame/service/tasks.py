"""Taking a session's tasks and having them run, one after the other or side by side: the loop of an executor."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any, Final

from flame.broker.errors import ConsumerMissing, StreamMissing
from flame.broker.seam import Broker, Delivery, Puller
from flame.cancel import end_tasks
from flame.errors import BrokerUnavailable, FlameError
from flame.logs import get_logger
from flame.protocol import defaults
from flame.protocol.supervision import Assignment, ExecutorReport
from flame.service.bell import Bell
from flame.service.contexts import SessionContext
from flame.service.handlers import Handlers
from flame.service.holdings import Holdings
from flame.service.recorder import Recorder
from flame.service.renewal import Renewal
from flame.service.runs import Runs

log = get_logger("flame.executor")

WAIT_S: Final = 30.0
"""How long one request for a task stands."""
TICK_S: Final = defaults.RUNNING_NOTICE_S
LOOP_TICK_S: Final = 0.05
"""How often the ledger is shown that the loop turns, and runs are looked at that may be over their time."""
AT_ONCE_S: Final = 0.01
"""A request that ends without a task sooner than this was refused."""
IDLE_S: Final = 0.08
"""After this long without a task an executor calls itself idle."""


class TaskRunner:
    """Serves one session's tasks until it is told to leave."""

    def __init__(
        self, broker: Broker, assignment: Assignment, executor: str, handlers: Handlers, context: SessionContext,
        renewal: Renewal,
    ) -> None:  # fmt: skip
        """Serve ``assignment`` with a service's handlers, for which its session is ``context``."""
        self._broker = broker
        self._assignment = assignment
        self._loop = asyncio.get_running_loop()
        self._bell = Bell()
        self._holdings = Holdings(broker, assignment)
        self._recorder = Recorder(broker, assignment, executor, self._holdings, self._bell, self._spawn)
        self._runs = Runs(broker, assignment, executor, handlers, self._holdings, self._recorder, context)
        self._running = self._runs.running
        self._recorder.on_end = self._runs.on_end = self._on_end
        self._runs.on_behind = self._behind
        self.renewal = renewal
        """The session's common data."""
        self.on_refused: Callable[[Exception], None] = lambda _error: None
        """Called with what the service raised when it heard of other common data: this executor can't go on."""
        self._workers: set[asyncio.Task[None]] = set()
        """Those that run one delivery each, where several may run at once."""
        self._background: set[asyncio.Task[None]] = set()
        self._pauses: set[asyncio.Task[None]] = set()
        """Until these are done nothing is begun."""
        self._after_reconnect: asyncio.Task[None] | None = None
        """One of them: what was delivered before may be another's by now."""
        self._renewing: asyncio.Task[None] | None = None
        """Another one: there is newer common data."""
        self._reconnects = 0
        self._puller: Puller | None = None
        self._busy = asyncio.Event()
        self._leaving = asyncio.Event()
        self._idle_since = self._loop.time()
        self._called_idle = False
        self._pending = 0
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
        self._recorder.counts.fill(report)
        report.running = len(self._running.runs) + self._recorder.storing
        report.held = len(self._holdings.waiting)
        report.pending = self._pending
        report.idle_s = self._idle_s()
        self._called_idle = report.idle_s > 0
        self.renewal.fill(report)
        report.lost_consumer = self.lost_consumer.is_set()
        return report

    def _idle_s(self) -> float:
        idle_s = self._loop.time() - self._idle_since
        if not self._quiet() or idle_s < IDLE_S:
            return 0.0
        # A task that comes back soon is worth waiting for.
        return idle_s if self._runs.next_due_s(time.monotonic()) > self._assignment.delay_release_s else 0.0

    def _quiet(self) -> bool:
        return not self._running.runs and not self._holdings.waiting and not self._recorder.unstored

    def _on_end(self) -> None:
        if self._quiet():
            self._idle_since = self._loop.time()
            self.on_quiet()
        self._bell.ring()

    # ---- what it is told

    def leave(self, *, force: bool = False) -> None:
        """Take no more tasks; `serve` returns when the running ones have their records.

        ``force``: they are stopped and recorded as cancelled. It can be asked for later, too.
        """
        if not self._leaving.is_set():
            self._leaving.set()
            self._restored.set()
            self._bell.ring()
            for pause in self._pauses:
                pause.cancel()
            if self._puller is not None:
                self._spawn(self._stop_pulling(self._puller))
        if force:
            self._running.force()

    def cancel(self, tasks: Collection[str]) -> None:
        """Stop tasks that have their records already: those that run are cancelled, others are not begun."""
        self._running.cancel(tasks)

    def consumer_restored(self, fence: int) -> None:
        """Go on pulling: the consumer exists again, and what it delivers up to ``fence`` may have run."""
        self._raise_fence(fence)
        self.lost_consumer.clear()
        self._restored.set()

    # ---- serving

    async def serve(self) -> None:
        """Take and run tasks until `leave`; then every task taken has its record or was handed back."""
        ticker = self._loop.create_task(self._tick())
        forget = self._broker.on_reconnect(self._reconnected)
        try:
            self._puller = await self._broker.pull(self._assignment.stream, self._assignment.consumer)
            run_taken = self._run_in_turn if self._assignment.concurrency == 1 else self._run_side_by_side
            while not self._leaving.is_set():
                if not self._holdings.waiting:
                    await self._take()
                await run_taken()
            await self._drain()
        finally:
            self._recorder.give_up()
            forget()
            await end_tasks(task for task in (ticker, *self._pauses, *self._workers, *self._background))
            self._holdings.close()

    async def _take(self) -> None:
        """Wait for tasks and hold them."""
        await self._settled()
        assert self._puller is not None
        most = self._runs.service_time.burst(self._assignment.concurrency) - len(self._workers)
        asked = time.monotonic()
        try:
            taken = await self._puller.burst(max(1, self._holdings.limit(most)), WAIT_S)
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
        elif now - asked < AT_ONCE_S and not self._leaving.is_set():
            await asyncio.sleep(defaults.BACKOFF_FIRST_S)  # refused: there are too many requests, or no leader

    def _hold(self, taken: Sequence[Delivery], now: float) -> None:
        """Note what was taken before any of it runs."""
        self._holdings.take(taken, now)
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

    async def _run_in_turn(self) -> None:
        """Run what is held, one after the other, without asyncio tasks of their own: most tasks are short."""
        waiting, worker = self._holdings.waiting, asyncio.current_task()
        assert worker is not None
        while waiting and not self._leaving.is_set():
            if self._pauses:
                await self._settled()
                continue
            await self._runs.run(waiting.popleft(), worker)

    async def _run_side_by_side(self) -> None:
        """Start what is held in tasks of their own, and wait while all places are taken."""
        await self._settled()
        waiting, places = self._holdings.waiting, self._assignment.concurrency
        while waiting and not self._leaving.is_set() and len(self._workers) < places:
            worker = self._loop.create_task(self._run_apart(waiting.popleft()))
            self._workers.add(worker)
            worker.add_done_callback(self._worker_ended)
        if not self._leaving.is_set() and (waiting or len(self._workers) >= places):
            await self._bell.wait()

    async def _run_apart(self, delivery: Delivery) -> None:
        """Run one delivery beside others: a fault of ours must not take its place away for ever."""
        worker = asyncio.current_task()
        assert worker is not None
        try:
            await self._runs.run(delivery, worker)
        except Exception:
            log.exception("a task could not be run; it comes again when its lease has run out", task=delivery.subject)
            self._runs.let_go(delivery.handle)

    def _worker_ended(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        self._on_end()

    # ---- leaving

    async def _stop_pulling(self, puller: Puller) -> None:
        for delivery in await puller.stop():
            with contextlib.suppress(BrokerUnavailable):  # disconnected: its lease runs out
                await self._broker.hand_back(delivery.handle)

    async def _drain(self) -> None:
        """Hand back what is held and wait for what runs and for every record."""
        await self._holdings.hand_back_waiting()
        while self._workers or self._recorder.unstored or self._background:
            await self._bell.wait()
        if self._recorder.last_handle:
            # The consumer is deleted after this: every acknowledgement must have been taken by then.
            try:
                await self._broker.acknowledge_surely(self._recorder.last_handle, 2.0)
            except FlameError as error:
                log.debug("the last acknowledgement is uncertain", error=str(error))

    # ---- time

    async def _tick(self) -> None:
        """While there is work: show that the loop turns, stop what is over its time, keep leases, tell what runs."""
        looked = 0.0
        while True:
            await self._busy.wait()
            await asyncio.sleep(LOOP_TICK_S)
            now = time.monotonic()
            self._holdings.tick(now)
            self._running.stop_late(now)
            if now - looked < TICK_S:
                continue
            looked = now
            await self._holdings.keep(now)
            await self._running.announce_long()
            if self._quiet():
                self._busy.clear()

    # ---- after a reconnect

    def _reconnected(self) -> None:
        """What this connection had said of leases may be lost, and the consumer may be another one."""
        self._reconnects += 1
        if self._leaving.is_set() or self._after_reconnect is not None:
            return
        self._after_reconnect = self._pause(self._look_around())

    async def _look_around(self) -> None:
        """Find out what may have run elsewhere meanwhile, however long that takes."""
        stream, consumer = self._assignment.stream, self._assignment.consumer
        known = 0
        while known < self._reconnects:
            reconnects = self._reconnects
            try:
                self._raise_fence((await self._broker.stream_state(stream)).last_sequence)
                await self._broker.consumer_state(stream, consumer)
            except ConsumerMissing:
                # The server has restarted: what it had delivered is delivered anew; what was not started is not ours.
                self._holdings.forget_leases()
            except StreamMissing:
                return
            except FlameError as error:
                log.debug("could not look at the stream after a reconnect", error=str(error))
                await asyncio.sleep(defaults.BACKOFF_FIRST_S)
                continue
            known = reconnects
        self._spawn(self._running.stop_recorded())

    # ---- before anything is begun

    def _pause(self, until: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin nothing until something is done."""
        pause = self._loop.create_task(until)
        self._pauses.add(pause)
        pause.add_done_callback(self._pause_over)
        return pause

    def _pause_over(self, pause: asyncio.Task[None]) -> None:
        self._pauses.discard(pause)
        if pause is self._after_reconnect:
            self._after_reconnect = None
        if pause is self._renewing:
            self._renewing = None
        self._bell.ring()

    async def _settled(self) -> None:
        """Wait until it is known what became of tasks while there was no connection, and the newest data is here."""
        while self._pauses:
            await asyncio.wait(tuple(self._pauses))

    def want_common_data(self, version: int) -> None:
        """Begin nothing more until the service has heard of common data of a version that there is."""
        if not self.renewal.want(version) or self._leaving.is_set():
            return
        if self._renewing is None or self._renewing.done():
            self._renewing = self._pause(self._renew())

    def _behind(self, delivery: Delivery, version: int) -> None:
        """Put a task back in front of what waits: it wants newer common data than there is here."""
        self._holdings.waiting.appendleft(delivery)
        self.want_common_data(version)

    async def _renew(self) -> None:
        """Get the common data that is wanted, and have the service hear of it when that disturbs nothing."""
        while self.renewal.wanted:
            await self.renewal.fetch()
            while self._assignment.concurrency == 1 and self._running.runs:
                await self._bell.wait()
            try:
                await self.renewal.apply()
            except Exception as error:  # noqa: BLE001  # whatever user code raises
                self.on_refused(error)
            self._runs.common_data_version = self.renewal.version

    def _raise_fence(self, sequence: int) -> None:
        self._runs.fence = max(self._runs.fence, sequence)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        self._bell.ring()
