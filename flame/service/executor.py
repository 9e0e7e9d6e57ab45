"""An executor's life: it enters one session, serves its tasks, leaves, and ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from flame.broker.seam import Broker
from flame.credentials import check_secrets, texts_to_hide
from flame.errors import ConfigurationError, ValueGone
from flame.logs import get_logger
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import TaskFault
from flame.protocol.states import EXECUTOR, ExecutorEvent
from flame.protocol.supervision import LEAVE, Assignment, ExecutorReport, Orders
from flame.service.contexts import SessionContext
from flame.service.environment import EXECUTOR as EXECUTOR_VARIABLE
from flame.service.environment import ExecutorEnvironment
from flame.service.handlers import Handlers, fault_of
from flame.service.renewal import Renewal
from flame.service.reports import Reporter
from flame.service.state import State
from flame.service.tasks import TaskRunner
from flame.service.values import load

log = get_logger("flame.executor")

FORKED: Final = "forked"
"""How a process was started that is a fork of a template."""
FAILED: Final = 1
"""Exit status of an executor that could not enter or leave its session in order."""


class Executor:
    """Runs a service for the one session that its manager assigns."""

    def __init__(self, service: object, environment: ExecutorEnvironment, broker: Broker, started: str = "") -> None:
        """Run ``service`` over a connected broker; ``started`` says how this process was, if that is known."""
        self._service = service
        self._environment = environment
        self._broker = broker
        self._started = started
        self._state = EXECUTOR.next(EXECUTOR.initial, ExecutorEvent.READY)
        self._fault: TaskFault | None = None
        self._runner: TaskRunner | None = None
        self._has: int | None = None
        """The version of common data that it can't get any more, while it asks for a newer one."""
        self._context: SessionContext | None = None
        self._hidden: tuple[str, ...] = ()
        """The session's secrets, which are to be in no text that others may read."""
        self._reporter = Reporter(broker, environment.node, environment.executor, self._snapshot)
        self.on_session: Callable[[Assignment], None] = _do_nothing
        """Called when it has its session, before it enters that."""

    @property
    def serves(self) -> bool:
        """Whether it has entered its session."""
        return self._runner is not None

    @property
    def fault(self) -> TaskFault | None:
        """What the service raised when it was to enter its session, or to leave it."""
        return self._fault

    async def serve(self, assignment: Assignment | None = None) -> int:
        """Live until the session has ended, or there is none to serve; return the exit status.

        With ``assignment``, what the first report would ask for is known.
        """
        if assignment is None:
            orders = await self._reporter.first_report()
            if orders.want == LEAVE or orders.assignment is None:
                return 0
            assignment = orders.assignment
            if orders.executor:
                self._become(orders.executor, orders.folder)
        log.info("entering", session=assignment.session, executor=self._environment.executor)
        self.on_session(assignment)
        handlers = Handlers(self._service)
        try:
            self._advance(ExecutorEvent.ASSIGN)
            if not await self._enter(handlers, assignment):
                return FAILED
            await self._serve_tasks(handlers, assignment)
            await self._leave(handlers, assignment)
        finally:
            await self._reporter.stop()
            handlers.close()
        self._advance(ExecutorEvent.GONE)
        await self._reporter.report()
        return FAILED if self._fault is not None else 0

    def _become(self, executor: str, folder: str) -> None:
        """Take on a name and a folder: this process was started before it was known for which executor."""
        self._environment = replace(self._environment, executor=executor)
        os.environ[EXECUTOR_VARIABLE] = executor
        self._reporter.rename(executor)
        if folder:
            os.chdir(folder)

    async def _enter(self, handlers: Handlers, assignment: Assignment) -> bool:
        """Run ``on_session_enter``; a failure is reported, and the manager tries elsewhere."""
        try:
            context = self._context = await self._make_context(assignment)
            self._hidden = texts_to_hide(context.credentials, context.delegations)
            if self._started == FORKED:
                handlers.on_fork()
            await handlers.enter(context)
        except Exception as error:  # noqa: BLE001  # whatever user code raises; it is logged there
            self._blame("on_session_enter failed", error, assignment)
            await self._reporter.report()
            return False
        self._advance(ExecutorEvent.ENTERED)
        return True

    async def _make_context(self, assignment: Assignment) -> SessionContext:
        while assignment.common_data_ref is not None:
            try:
                assignment.common_data = await load(self._broker, assignment, assignment.common_data_ref)
                break
            except ValueGone:
                if not await self._take_newer(assignment):
                    raise
        return SessionContext(
            assignment.session,
            assignment.application,
            assignment.common_data,
            assignment.common_data_version,
            check_secrets("credentials", assignment.credentials),
            check_secrets("delegations", assignment.delegations),
            State(self._broker, self._environment.node, self._environment.executor),
        )

    async def _take_newer(self, assignment: Assignment) -> bool:
        """Ask for common data that has replaced what an assignment refers to; tell whether there is any."""
        self._has = version = assignment.common_data_version
        orders = await self._reporter.report()
        self._has = None
        newer = orders.common_data_version is not None and orders.common_data_version > version
        if not newer or (orders.common_data is None and orders.common_data_ref is None):
            return False
        assert orders.common_data_version is not None
        assignment.common_data_version = orders.common_data_version
        assignment.common_data, assignment.common_data_ref = orders.common_data or b"", orders.common_data_ref
        return True

    def _blame(self, what: str, error: Exception, assignment: Assignment) -> None:
        """Take note of what the service raised, and log it without its session's secrets."""
        self._fault = fault_of(error, self._hidden)
        log.error(what, session=assignment.session, traceback=self._fault.traceback)

    def _common_data_refused(self, error: Exception, assignment: Assignment) -> None:
        self._blame("on_common_data_update failed; leaving the session", error, assignment)
        self._on_orders(Orders(LEAVE))

    async def _serve_tasks(self, handlers: Handlers, assignment: Assignment) -> None:
        assert self._context is not None
        renewal = Renewal(
            assignment, self._context, handlers.common_data_updated, partial(load, self._broker, assignment)
        )
        renewal.on_ask = self._reporter.wake_now
        executor = self._environment.executor
        runner = self._runner = TaskRunner(self._broker, assignment, executor, handlers, self._context, renewal)
        runner.on_refused = partial(self._common_data_refused, assignment=assignment)
        runner.on_change = self._reporter.wake
        runner.on_quiet = self._reporter.look_soon
        await self._reporter.start(
            assignment.application, assignment.session, self._on_orders, runner.cancel, runner.want_common_data
        )
        self._reporter.wake_now()
        await runner.serve()

    async def _leave(self, handlers: Handlers, assignment: Assignment) -> None:
        self._reporter.wake_now()
        try:
            async with asyncio.timeout(assignment.leave_timeout_s):
                await handlers.leave()
        except TimeoutError:
            self._fault = TaskFault(
                ErrorCode.TASK_FAILED,
                f"on_session_leave took longer than {assignment.leave_timeout_s:g} s",
                "TimeoutError",
            )
            log.error("on_session_leave took too long", session=assignment.session)
        except Exception as error:  # noqa: BLE001  # whatever user code raises; it is logged there
            self._blame("on_session_leave failed", error, assignment)

    def _on_orders(self, orders: Orders) -> None:
        runner = self._runner
        if runner is None:
            return
        if orders.want == LEAVE:
            if EXECUTOR.moves.get((self._state, ExecutorEvent.LEAVE)) is not None:
                self._advance(ExecutorEvent.LEAVE)
                self._reporter.wake_now()
            runner.leave(force=orders.force)
        elif orders.assignment is not None and runner.lost_consumer.is_set():
            runner.consumer_restored(orders.assignment.fence)
        runner.renewal.hear(orders)

    def _advance(self, event: ExecutorEvent) -> None:
        self._state = EXECUTOR.next(self._state, event)

    def _snapshot(self) -> ExecutorReport:
        report = ExecutorReport(self._state, os.getpid(), self._fault, started=self._started)
        if self._has is not None:
            report.common_data_version, report.common_data_wanted = self._has, self._has + 1
        return report if self._runner is None else self._runner.fill(report)


def _do_nothing(_: Assignment) -> None:
    """Be what is called where nobody wants to know."""


def check_service(service: object) -> None:
    """Refuse what can't be a service, with the likely mistake."""
    if isinstance(service, type):
        raise ConfigurationError(f"flame.run: got the class {service.__name__}; pass an instance, {service.__name__}()")
    if not callable(getattr(service, "on_task_invoke", None)):
        raise ConfigurationError(
            f"flame.run: {type(service).__name__} has no on_task_invoke; expected an instance of a FlameService"
        )
