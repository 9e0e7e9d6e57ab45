"""Running tasks: one delivery from when it is its turn to when its record is on its way."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Callable
from typing import Any, cast

from flame.broker.seam import Broker, Delivery
from flame.credentials import check_secrets, texts_to_hide
from flame.errors import FlameError, MalformedMessage, TaskTimeout
from flame.protocol import defaults, subjects
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord, TaskFault, TaskMessage, TaskOptions
from flame.protocol.states import TaskState
from flame.protocol.supervision import Assignment
from flame.protocol.values import ValueRef
from flame.service.contexts import SessionContext, TaskContext, output_bytes
from flame.service.handlers import Handlers, fault_of
from flame.service.history import History
from flame.service.holdings import Holdings
from flame.service.outlet import Outlet, RunOutlet
from flame.service.prefetch import ServiceTime
from flame.service.recorder import Recorder
from flame.service.running import Run, Running, Stop
from flame.service.terms import Terms, may_retry, retry_pause_s
from flame.service.values import load_while


class Runs:
    """Runs the deliveries of one executor, each as its task wants it and not before its time."""

    def __init__(
        self, broker: Broker, assignment: Assignment, executor: str, handlers: Handlers, holdings: Holdings,
        recorder: Recorder, context: SessionContext,
    ) -> None:  # fmt: skip
        """Run deliveries out of ``holdings`` with a service's handlers, and have their records stored."""
        self._broker = broker
        self._session = context
        self._hidden = texts_to_hide(context.credentials, context.delegations)
        self._assignment = assignment
        self._handlers = handlers
        self._holdings = holdings
        self._recorder = recorder
        self._history = History(broker, assignment, holdings)
        self.running = Running(broker, assignment, executor, holdings, self._history)
        self._runs = self.running.runs
        self._outlet = Outlet(broker, assignment, executor, self._runs)
        self._terms = Terms.of(assignment)
        self._tasks = len(subjects.task(assignment.application, assignment.session, ""))
        self._due: list[float] = []
        """When tasks that were handed back for later are due, the next one first; monotonic."""
        self.fence = assignment.fence
        """Deliveries up to this sequence of the stream may have run before."""
        self.common_data_version = assignment.common_data_version
        """Of what the service has."""
        self._waited: set[str] = set()
        """The handles of deliveries for which newer common data was asked for."""
        self.on_behind: Callable[[Delivery, int], None] = lambda _delivery, _version: None
        """Called with a delivery that wants newer common data, and is to come again when that was asked for."""
        self.service_time = ServiceTime()
        recorder.on_delay = self.service_time.note
        self.on_end: Callable[[], None] = lambda: None
        """Called when a delivery was let go of without a record."""

    # ---- one delivery

    async def run(self, delivery: Delivery, worker: asyncio.Task[Any]) -> None:  # noqa: C901  # one delivery, in its steps
        """Run a delivery and begin to store its record; ``worker`` is the asyncio task that calls this."""
        handle = delivery.handle
        now = time.monotonic()
        if not self._holdings.certain(handle, now):
            self.let_go(handle)
            return  # held too long: the broker gives it to another
        try:
            message = TaskMessage.decode(delivery.data)
        except MalformedMessage as error:
            await self._refuse(delivery, TaskFault(ErrorCode.INVALID_ARGUMENT, f"the task can't be read: {error}"))
            return
        terms = self._terms
        if message.options is not None:
            if not await self._has_common_data(delivery, message.options.common_data_version or 0):
                return
            terms = Terms.of(self._assignment, message.options)
        run = self._runs[handle] = Run(delivery.subject[self._tasks :], message.listen)
        if (
            delivery.delivered > 1
            or delivery.sequence <= self.fence
            or message.again
            or terms.timed
            or self.running.cancelled
            or message.input_ref is not None
        ) and not await self._admit(run, delivery, terms, message):
            return
        if not self._start(run, handle, terms):
            return
        if message.listen:
            await self.running.announce(run)
            await flushed()  # what was sent leaves before user code that may block
        record = None
        if run.stop is None:
            record = await self._invoke(run, message, terms, worker)
        if record is None:
            await self._drop(run, handle)
        elif record.error is not None and self._runs_again(run, terms, record.error):
            await self._retry(run, delivery)
        else:
            await self._store(delivery, record)

    async def _has_common_data(self, delivery: Delivery, version: int) -> bool:
        """Whether the service has what a task wants; otherwise it waits, or is refused if there is no such version."""
        waited = delivery.handle in self._waited
        self._waited.discard(delivery.handle)
        if version <= self.common_data_version:
            return True
        if waited:
            text = f"it wants version {version} of the common data; the session has {self.common_data_version}"
            await self._refuse(delivery, TaskFault(ErrorCode.INVALID_ARGUMENT, text))
        else:
            self._waited.add(delivery.handle)
            self.on_behind(delivery, version)
        return False

    async def _admit(self, run: Run, delivery: Delivery, terms: Terms, message: TaskMessage) -> bool:
        """Look at a delivery that may be early, late, cancelled or a repetition; deal with it if it must not run."""
        if run.task in self.running.cancelled:
            await self._drop(run, delivery.handle)
            return False
        early_s = terms.too_early_s(delivery.stored_at, time.time()) if terms.delay_s else 0.0
        if not early_s and (delivery.delivered > 1 or delivery.sequence <= self.fence or message.again):
            past = await self._history.look(delivery)
            if past is None:
                self.let_go(delivery.handle)
                return False
            if past.recorded:
                await self._drop(run, delivery.handle)
                return False
            attempts = past.attempts
            if attempts.lost >= defaults.POISON_LIMIT:
                text = f"given up: {attempts.lost} executors were lost while they ran it"
                await self._refuse(delivery, TaskFault(ErrorCode.TASK_POISONED, text), attempts.lost + attempts.raised)
                return False
            run.raised = attempts.raised
            run.attempt = attempts.lost + attempts.raised + 1
            early_s = attempts.not_before - time.time()
        if early_s > 0:
            await self._later(delivery, early_s)
            return False
        if run.attempt == 1 and terms.expires_s and terms.expired(delivery.stored_at, time.time()):
            text = f"it was not started within {terms.expires_s:g} s"
            await self._refuse(delivery, TaskFault(ErrorCode.TASK_EXPIRED, text))
            return False
        return message.input_ref is None or await self._load_input(run, delivery, message, message.input_ref)

    async def _load_input(self, run: Run, delivery: Delivery, message: TaskMessage, ref: ValueRef) -> bool:
        """Get a large input before the run begins; ``False``: it must not, and was dealt with."""
        handle, began = delivery.handle, time.monotonic()
        if not self._holdings.start(handle, began, 0.0):  # an input that ends its process must count as an attempt
            self.let_go(handle)
            return False

        def wanted() -> bool:
            return run.stop is None and self._holdings.certain(handle, time.monotonic())

        try:
            data = await load_while(self._broker, self._assignment, ref, wanted)
        except FlameError as error:
            fault = TaskFault(error.code, f"its input can't be read: {error}", type(error).__qualname__)
            await self._refuse(delivery, fault, run.attempt - 1)
            return False
        except MemoryError:
            text = f"its input of {ref.size:,} bytes doesn't fit into the memory of its executor"
            await self._refuse(delivery, TaskFault(ErrorCode.OUT_OF_MEMORY, text, "MemoryError"), run.attempt - 1)
            return False
        self.service_time.note(time.monotonic() - began)  # it delays whatever is taken with it
        if data is not None:
            message.input = data
        elif run.stop is None:
            self.let_go(handle)
        else:
            await self._drop(run, handle)
        return data is not None

    def _start(self, run: Run, handle: str, terms: Terms) -> bool:
        """Say in the ledger that a run begins; ``False``: it must not."""
        run.started = time.time()
        now = time.monotonic()
        if terms.timeout_s:
            run.deadline = now + terms.timeout_s
        if self._holdings.start(handle, now, run.deadline):
            return True
        self.let_go(handle)  # taken away while the loop was blocked: another runs it
        return False

    async def _invoke(
        self, run: Run, message: TaskMessage, terms: Terms, worker: asyncio.Task[Any]
    ) -> ResultRecord | None:
        """Run user code and make the record of what came of it; ``None`` if the task has one."""
        outlet = self._outlet
        deadline = run.started + terms.timeout_s if terms.timeout_s else 0.0
        run.context = context = TaskContext(
            self._assignment.session,
            run.task,
            message.input,
            run.attempt,
            deadline,
            session=self._session,
            outlet=outlet,
        )
        if message.options is not None:
            _add_secrets(context, message.options)
        run.worker = worker
        try:
            output = output_bytes(await self._handlers.invoke(context))
            if context.outlet is not outlet:
                await cast(RunOutlet, context.outlet).finish()
        except asyncio.CancelledError as error:
            if run.stop is None and worker.cancelling():
                raise
            # User code let a cancellation out.
            record = ResultRecord(TaskState.FAILED, error=self._fault_of(error, context))
        except Exception as error:  # noqa: BLE001  # whatever user code raises is the task's outcome
            record = ResultRecord(TaskState.FAILED, error=self._fault_of(error, context))
        else:
            record = ResultRecord(TaskState.SUCCEED, output)
        finally:
            run.worker = None
        if run.stop is not None:
            _take_back(worker)
            if run.stop is Stop.CANCELLED:
                return None
            record = _stopped(run.stop, terms)
        if context.outlet is not outlet:
            record.chunks = await cast(RunOutlet, context.outlet).end()
        record.attempt = run.attempt
        record.digest = message.digest
        record.started = run.started
        record.finished = time.time()
        self.service_time.note(record.finished - run.started)
        return record

    def _fault_of(self, error: BaseException, context: TaskContext) -> TaskFault:
        """Describe what user code raised, without the secrets that it was given."""
        secrets = self._hidden
        if context.credentials or context.delegations:
            session = self._session
            secrets = texts_to_hide(session.credentials, session.delegations, context.credentials, context.delegations)
        return fault_of(error, secrets)

    def _runs_again(self, run: Run, terms: Terms, fault: TaskFault) -> bool:
        if run.stop is Stop.FORCED:
            return False
        return may_retry(self._assignment, terms, fault, run.raised, timeout=run.stop is Stop.TIMEOUT)

    async def _retry(self, run: Run, delivery: Delivery) -> None:
        """Have a task run again later, here or elsewhere."""
        raised = run.raised + 1
        pause_s = retry_pause_s(self._assignment.retry_backoff_s, raised, random.random())
        await self._history.note_raised(delivery, raised, time.time() + pause_s)
        await self._later(delivery, pause_s)

    # ---- the end of a delivery

    async def _store(self, delivery: Delivery, record: ResultRecord) -> None:
        self._runs.pop(delivery.handle, None)
        await self._recorder.store(delivery, record)

    async def _refuse(self, delivery: Delivery, fault: TaskFault, attempt: int = 0) -> None:
        """Give a task that must not run its record."""
        record = ResultRecord(TaskState.FAILED, error=fault, attempt=attempt, finished=time.time())
        await self._store(delivery, record)

    async def _later(self, delivery: Delivery, delay_s: float) -> None:
        """Hand a delivery back, to come again after ``delay_s``."""
        heapq.heappush(self._due, time.monotonic() + delay_s)
        self._runs.pop(delivery.handle, None)
        await self._holdings.hand_back(delivery.handle, delay_s)
        self.on_end()

    async def _drop(self, run: Run, handle: str) -> None:
        """Finish a delivery whose task has its record, or hand it back if it has none and must not be begun."""
        self.running.cancelled.discard(run.task)
        self._runs.pop(handle, None)
        if run.stop is Stop.FORCED:
            await self._holdings.hand_back(handle)
        else:
            await self._holdings.finish(handle)
        self.on_end()

    def let_go(self, handle: str) -> None:
        """Forget a delivery that is another's."""
        self._runs.pop(handle, None)
        self._holdings.end(handle)
        self.on_end()

    def next_due_s(self, now: float) -> float:
        """Return in how many seconds the first task is due that was handed back for later; infinity if none is."""
        while self._due and self._due[0] <= now:
            heapq.heappop(self._due)
        return self._due[0] - now if self._due else float("inf")


def _add_secrets(context: TaskContext, options: TaskOptions) -> None:
    if options.credentials:
        context.credentials = check_secrets("credentials", options.credentials)
    if options.delegations:
        context.delegations = check_secrets("delegations", options.delegations)


def _take_back(worker: asyncio.Task[Any]) -> None:
    """Take the cancellation back by which a run was stopped; pass on that of somebody else."""
    if worker.uncancel():
        raise asyncio.CancelledError  # this executor is to end


def _stopped(why: Stop, terms: Terms) -> ResultRecord:
    """Return the record of a run that was stopped, whatever user code made of that."""
    if why is Stop.TIMEOUT:
        text = f"the run took longer than {terms.timeout_s:g} s"
        fault = TaskFault(ErrorCode.TASK_TIMEOUT, text, TaskTimeout.__qualname__)
        return ResultRecord(TaskState.FAILED, error=fault)
    fault = TaskFault(ErrorCode.TASK_CANCELLED, "its session was closed by force while it ran")
    return ResultRecord(TaskState.CANCELLED, error=fault)


async def flushed() -> None:
    """Let the connection write what it was given: its writer runs when the loop turns."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
