"""One executor of a cluster in memory: an executor manager's part in its life, with a task for a process."""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from flame.broker.memory import MemoryBroker, MemoryServer
from flame.cancel import end_tasks
from flame.errors import FlameError, IllegalTransition
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.codes import ReasonCode
from flame.protocol.messages import LEAVE, SERVE, Assignment, Control, ExecutorReport, Orders
from flame.protocol.records import BindingRecord
from flame.protocol.states import ExecutorState
from flame.service.environment import ExecutorEnvironment
from flame.service.executor import Executor, check_service
from flame_services.executor_manager.assignment import Briefing, Superseded, read_briefing
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.handout import add_common_data
from flame_services.executor_manager.keeper import LeaseKeeper
from flame_services.executor_manager.launch import LaunchRefused
from flame_services.executor_manager.life import Deadline, Life, Limits
from flame_services.executor_manager.reasons import Reason, last_lines
from flame_services.executor_manager.record import RecordWriter

log = get_logger("flame.testing")

KILLED: Final = -9
"""The status of an executor that was ended at once: that of a process after SIGKILL."""
REMAINS_S: Final = 2.0
"""How long user code may go on after the cluster has ended: it is cancelled all that time."""
HOW: Final = "fresh: in the process of its test"
_RETRY_S: Final = 0.1
_UNBOUND: Final = Reason(ReasonCode.UNBOUND, "its binding was deleted")
_FORCED: Final = Reason(ReasonCode.UNBOUND, "its session was closed by force")
_OURS: Final = Reason(ReasonCode.INTERNAL, "a fault of the cluster in memory; the log has the details")

MakeService = Callable[[], object]


@dataclass(slots=True)
class Place:
    """What the executors of one node share."""

    server: MemoryServer
    broker: MemoryBroker
    node: str
    services: dict[str, MakeService]
    """By application."""
    made: dict[str, list[object]]
    """By application: the services that executors were given, in order."""
    leases: LeaseKeeper
    consumers: Consumers
    on_change: Callable[[], None]
    """Called when an executor begins or ends."""
    remains: set[asyncio.Task[Any]] = field(default_factory=set)
    """What is left of executors that were killed: user code may take its time, cut off from everything."""


class MemoryExecutor:
    """Carries one binding out."""

    def __init__(self, place: Place, binding: BindingRecord) -> None:
        """Take a binding; `start` begins."""
        limits = Limits(defaults.READY_TIMEOUT_S, defaults.ENTER_TIMEOUT_S, defaults.LEAVE_TIMEOUT_S)
        self.binding: Final = binding
        self.writer: Final = RecordWriter(place.broker, place.node, binding.executor)
        self.life: Final = Life(binding, limits, time.time())
        self.released: Final = asyncio.Event()
        self._place = place
        self._loop = asyncio.get_running_loop()
        self._assignment: Assignment | None = None
        self._lost_consumer = False
        self._unwanted = False
        self._armed: Deadline | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._broker: MemoryBroker | None = None
        self._serving: asyncio.Task[tuple[int, str]] | None = None
        self._ended: asyncio.Future[tuple[int, str]] = self._loop.create_future()
        """How it ended, and what it wrote last."""
        self._task: asyncio.Task[None] | None = None

    @property
    def consumer(self) -> tuple[str, str]:
        """The stream and the consumer that it pulls from."""
        return subjects.task_stream(self.binding.application), self.binding.consumer

    @property
    def must_be_reminded(self) -> bool:
        """Whether it should report, since there is something for it to hear."""
        return self.life.must_be_reminded or self._lost_consumer

    # ---- what is wanted of it

    def start(self) -> None:
        """Begin to carry the binding out."""
        self._task = asyncio.create_task(self._live(), name=f"executor {self.binding.executor}")

    def leave(self) -> None:
        """Have it leave its session and end; tasks that run may finish."""
        self.life.leaving = True

    def force(self) -> None:
        """Have it leave now: what runs in it is stopped."""
        if self.life.forced or self.released.is_set():
            return
        self.leave()
        self._place.leases.excuse(self.binding.executor)
        if self.life.state in (ExecutorState.BOUND, ExecutorState.UNBINDING):
            self.life.force()
            self._follow_life()
        else:
            self.life.forced = True
            self.end(_FORCED, blameless=True)

    def drop(self) -> None:
        """End it and remove its record: its binding is gone."""
        self._unwanted = True
        if self.released.is_set():
            self.writer.delete()
        else:
            self.end(_UNBOUND, blameless=True)

    def end(self, cause: Reason, *, blameless: bool = False) -> None:
        """End it at once, for a reason of ours; ``blameless``: that is not counted as an attempt of what runs in it."""
        if blameless:
            self._place.leases.excuse(self.binding.executor)
        self.life.give_up(cause, blameless=blameless)
        self.leave()
        self.kill()

    def kill(self) -> None:
        """End it as SIGKILL ends a process: nothing that it says from now on is heard by anybody."""
        if self._broker is not None:
            self._place.server.interrupt(self._broker)
        if not self._ended.done():
            self._ended.set_result((KILLED, ""))
        serving = self._serving
        if serving is not None and not serving.done():
            remains = asyncio.create_task(end_tasks((serving,)))
            self._place.remains.add(remains)
            remains.add_done_callback(self._place.remains.discard)

    async def nudge(self) -> None:
        """Ask it to report now, to be told what is wanted of it. It may not hear."""
        with contextlib.suppress(FlameError):
            subject = subjects.control(self.binding.application, self.binding.session)
            await self._place.broker.publish(subject, Control(self.binding.executor).encode())

    async def close(self) -> None:
        """Let go of everything, after it was released or killed."""
        self._set_timer(None)
        await end_soon(task for task in (self._task, self._serving) if task is not None)
        await self.writer.close()

    # ---- what it reports

    async def report(self, report: ExecutorReport) -> Orders:
        """Take note of a report and answer it."""
        try:
            self.life.hear(report, time.time())
        except IllegalTransition as error:
            log.warning("report ignored", executor=self.binding.executor, reason=str(error))
        self._follow_life()
        self._lost_consumer = report.lost_consumer
        if self.life.leaving or self._assignment is None or self.released.is_set():
            return Orders(LEAVE, force=self.life.forced)
        if report.lost_consumer:
            return await self._repair(self._assignment)
        if report.state is ExecutorState.IDLE:
            self.life.assign(time.time())
            self._follow_life()
            return Orders(SERVE, self._assignment)
        orders = Orders(SERVE)
        if report.common_data_wanted:
            with contextlib.suppress(FlameError):  # it asks again
                await add_common_data(self._place.broker, self.binding.session, report, orders)
        return orders

    async def _repair(self, assignment: Assignment) -> Orders:
        try:
            repaired = await self._place.consumers.repair(self.binding, assignment)
        except Superseded:
            self.leave()
            return Orders(LEAVE)
        except FlameError as error:
            log.warning("its consumer can't be made again yet", reason=str(error))
            return Orders(SERVE)
        self._place.leases.consumer_replaced(self.binding.consumer)
        self._assignment = repaired
        self._lost_consumer = False
        return Orders(LEAVE) if self.life.leaving else Orders(SERVE, repaired)

    # ---- how busy it is

    def note_backlog(self, pending: int) -> None:
        """Take note of what waits in its session."""
        self.life.note_backlog(pending, time.time())
        self._follow_life()

    def is_busy(self) -> bool:
        """Whether it takes tasks and has something to do, or has fallen silent."""
        self.life.note_silence(time.time())
        self._follow_life()
        return self.life.is_busy

    # ---- its life

    async def _live(self) -> None:
        try:
            assignment = await self._prepare()
            if assignment is None:
                self.life.release(None, clean=True, now=time.time())
                return
            status, output = await self._run(assignment)
            await self._place.leases.hand_over(self.binding.executor)
            self.life.end(status, output, time.time())
        except Superseded as error:
            self.life.release(Reason(ReasonCode.UNBOUND, str(error)), clean=True, now=time.time())
        except LaunchRefused as error:
            self.life.release(Reason(ReasonCode.STARTING_REFUSED, str(error)), clean=False, now=time.time())
        except Exception:
            log.exception("an executor can't be looked after any more", executor=self.binding.executor)
            self.kill()
        finally:
            self._release()

    async def _prepare(self) -> Assignment | None:
        """Read what the binding refers to, however long that takes; ``None`` if it is to leave before."""
        briefing: Briefing | None = None
        while briefing is None:
            if self.life.leaving or self._ended.done():
                return None
            try:
                briefing = await read_briefing(self._place.broker, self.binding)
            except (Superseded, LaunchRefused):
                raise
            except FlameError:
                await asyncio.sleep(_RETRY_S)
        if self.binding.application not in self._place.services:
            raise LaunchRefused(
                f"application {self.binding.application!r} has no service in this process:"
                " register it by MemoryCluster.register"
            )
        ledger = self._place.leases.open(self.binding, briefing.assignment.ack_wait_s)
        return replace(briefing.assignment, ledger=ledger)

    async def _run(self, assignment: Assignment) -> tuple[int, str]:
        if self._ended.done():
            return await self._ended  # killed meanwhile
        self._assignment = assignment
        self.life.tell_start(HOW)
        self.life.start(time.time())
        self._follow_life()
        self._broker = self._place.server.connect(self.binding.executor)
        self._serving = asyncio.create_task(self._serve(self._broker), name=f"service {self.binding.executor}")
        self._serving.add_done_callback(self._note_end)
        return await self._ended

    async def _serve(self, broker: MemoryBroker) -> tuple[int, str]:
        """Be the process of a service; return its exit status, and what it would have written to standard error."""
        place, application = self._place, self.binding.application
        try:
            service = place.services[application]()
            check_service(service)
            place.made.setdefault(application, []).append(service)
            environment = ExecutorEnvironment(broker.endpoint, place.node, self.binding.executor)
            return await Executor(service, environment, broker, HOW).serve(), ""
        except SystemExit as error:
            return (error.code if isinstance(error.code, int) else int(error.code is not None)), ""
        except Exception:  # noqa: BLE001  # whatever ends a service ends with a traceback on its standard error
            return 1, last_lines(traceback.format_exc().encode())
        finally:
            await broker.close()

    def _note_end(self, serving: asyncio.Task[tuple[int, str]]) -> None:
        if not self._ended.done():
            self._ended.set_result((KILLED, "") if serving.cancelled() else serving.result())

    def _release(self) -> None:
        life = self.life
        if life.state is not ExecutorState.RELEASED:
            life.release(_OURS, clean=False, now=time.time())
        self._place.leases.drop(self.binding.executor)
        self._follow_life()
        self._set_timer(None)
        self.released.set()
        self._place.on_change()
        if self._unwanted:
            self.writer.delete()

    def _follow_life(self) -> None:
        """Tell the cluster what has changed, and watch the time that it has."""
        for record in self.life.take_changes():
            self.writer.put(record)
        deadline = self.life.deadline
        if deadline is not self._armed:
            self._armed = deadline
            self._set_timer(None if deadline is None else deadline.after_s)

    def _set_timer(self, after_s: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if after_s is None else self._loop.call_later(after_s, self._overdue)

    def _overdue(self) -> None:
        if self._armed is None or self.released.is_set():
            return
        if self._armed.ask_first and not self._place.broker.connected:
            self._set_timer(self._armed.after_s)
        else:
            self.end(self._armed.cause)


async def end_soon(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they end, but not for ever: user code may catch every cancellation."""
    tasks = list(tasks)
    try:
        async with asyncio.timeout(REMAINS_S):
            await end_tasks(tasks)
    except TimeoutError:
        names = ", ".join(task.get_name() for task in tasks if not task.done())
        log.warning("user code goes on although it was cancelled again and again", tasks=names)
