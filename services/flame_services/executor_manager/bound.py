"""One executor for its binding, whatever it runs in: what is wanted of it, and what its reports are answered."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Final, Generic, Protocol, TypeVar

from flame.broker.seam import Broker
from flame.errors import FlameError, IllegalTransition
from flame.protocol import subjects
from flame.protocol.codes import ReasonCode
from flame.protocol.records import BindingRecord
from flame.protocol.states import ExecutorState
from flame.protocol.supervision import LEAVE, SERVE, Assignment, Control, ExecutorReport, Orders
from flame_services.executor_manager.alarm import Alarm
from flame_services.executor_manager.assignment import Briefing, Registered, Superseded, read_briefing
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.handout import add_common_data
from flame_services.executor_manager.keeper import LeaseKeeper
from flame_services.executor_manager.launch import LaunchRefused
from flame_services.executor_manager.life import Life, Limits
from flame_services.executor_manager.reasons import Reason
from flame_services.executor_manager.record import RecordWriter

_RETRY_S: Final = 0.5
UNBOUND: Final = Reason(ReasonCode.UNBOUND, "its binding was deleted")
CLOSED_BY_FORCE: Final = Reason(ReasonCode.UNBOUND, "its session was closed by force")
FAULT_OF_OURS: Final = Reason(ReasonCode.INTERNAL, "a fault of the executor manager; its log has the details")


class Misplaced(FlameError):
    """A node can't carry a binding out, whatever is bound: it should not have been placed there."""


class Node(Protocol):
    """What every executor of a node is given."""

    @property
    def node(self) -> str:
        """The node's name."""

    @property
    def broker(self) -> Broker:
        """The manager's connection."""

    @property
    def consumers(self) -> Consumers:
        """Of the sessions that are served here."""

    @property
    def leases(self) -> LeaseKeeper:
        """Of what the executors hold."""


P = TypeVar("P", bound=Node)


class BoundExecutor(ABC, Generic[P]):
    """Carries one binding out: what doesn't depend on what the executor runs in."""

    def __init__(self, place: P, binding: BindingRecord, limits: Limits, log: Any) -> None:
        """Take a binding; `start` begins."""
        self.binding: Final = binding
        self.writer: Final = RecordWriter(place.broker, place.node, binding.executor)
        self.released: Final = asyncio.Event()
        """It is gone and its last record is on its way."""
        self.life: Final = Life(binding, limits, time.time())
        self._place: Final = place
        self._log: Final = log.bind(executor=binding.executor, session=binding.session, application=binding.application)
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._assignment: Assignment | None = None
        self._lost_consumer = False
        self._alarm = Alarm(self._overdue)
        self._terminating = False
        """It was told to end, and the alarm tells when that has taken too long."""
        self._unwanted = False

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
        """Have it leave its session and end; tasks that run may finish. `nudge` lets it know soon."""
        if not self.life.leaving:
            self.life.leaving = True
            self._log.debug("told to leave")

    def force(self) -> None:
        """Have it leave now: what runs in it is stopped, by itself or with it."""
        if self.life.forced or self.released.is_set():
            return
        self.leave()
        self._place.leases.excuse(self.binding.executor)
        if self.life.state in (ExecutorState.BOUND, ExecutorState.UNBINDING):
            self.life.force()
            self._follow_life()
        else:
            self.life.forced = True
            self.terminate(CLOSED_BY_FORCE)

    async def nudge(self) -> None:
        """Ask it to report now, to be told what is wanted of it. It may not hear."""
        with contextlib.suppress(FlameError):
            for name in self._names():
                subject = subjects.control(self.binding.application, self.binding.session)
                await self._place.broker.publish(subject, Control(name).encode())

    def drop(self) -> None:
        """End it and remove its record: its binding is gone."""
        self._unwanted = True
        if self.released.is_set():
            self.writer.delete()
        else:
            self.terminate(UNBOUND)

    @abstractmethod
    def terminate(self, cause: Reason) -> None:
        """End it through no fault of its own: what runs in it is not charged with an attempt."""

    def note_backlog(self, pending: int) -> None:
        """Take note of what waits in its session."""
        self.life.note_backlog(pending, time.time())
        self._follow_life()

    def is_busy(self) -> bool:
        """Whether it takes tasks and has something to do, or has fallen silent."""
        self.life.note_silence(time.time())
        self._follow_life()
        return self.life.is_busy

    # ---- what it reports

    async def report(self, report: ExecutorReport) -> Orders:
        """Take note of a report and answer it."""
        try:
            self.life.hear(report, time.time())
        except IllegalTransition as error:
            self._log.warning("report ignored", pid=report.pid, reason=str(error))
        self._follow_life()
        self._lost_consumer = report.lost_consumer
        if self.life.leaving or self._assignment is None or self.released.is_set():
            return Orders(LEAVE, force=self.life.forced)
        if report.lost_consumer:
            return await self._repair(self._assignment)
        if report.state is ExecutorState.IDLE:
            self.life.assign(time.time())
            self._follow_life()
            return self._assign(self._assignment)
        orders = Orders(SERVE)
        if report.common_data_wanted:
            with contextlib.suppress(FlameError):  # it asks again
                await add_common_data(self._place.broker, self.binding.session, report, orders)
        return orders

    def _assign(self, assignment: Assignment) -> Orders:
        """Return what it is told first of all."""
        return Orders(SERVE, assignment)

    async def _repair(self, assignment: Assignment) -> Orders:
        try:
            repaired = await self._place.consumers.repair(self.binding, assignment)
        except Superseded as error:
            self._log.info("lost its consumer for good", reason=str(error))
            self.leave()
            return Orders(LEAVE)
        except FlameError as error:
            self._log.warning("its consumer can't be made again yet", reason=str(error))
            return Orders(SERVE)
        self._place.leases.consumer_replaced(self.binding.consumer)
        self._assignment = repaired
        self._lost_consumer = False
        return Orders(LEAVE) if self.life.leaving else Orders(SERVE, repaired)

    def _names(self) -> Iterable[str]:
        """Return what it may believe to be called."""
        return (self.binding.executor,)

    # ---- its life

    async def _live(self) -> None:
        try:
            ended = await self._carry_out()
            if ended is None:
                self.life.release(None, clean=True, now=time.time())
            else:
                self.life.end(*ended, time.time())
        except Superseded as error:
            self.life.release(Reason(ReasonCode.UNBOUND, str(error)), clean=True, now=time.time())
        except Misplaced as error:
            self.life.release(Reason(ReasonCode.UNBOUND, str(error)), clean=False, now=time.time())
        except LaunchRefused as error:
            self.life.release(Reason(ReasonCode.STARTING_REFUSED, str(error)), clean=False, now=time.time())
        except Exception:  # noqa: BLE001 (of ours, whatever it is: the executor must end and the cluster know)
            self._log.exception("an executor can't be looked after any more")
        finally:
            self._release()

    @abstractmethod
    async def _carry_out(self) -> tuple[int, str] | None:
        """Start it, and return its exit status and what it wrote last, when it has ended and what it held is back.

        ``None``: it was to leave before it was started. Raises `Superseded`, `Misplaced`, `LaunchRefused`.
        """

    async def _read_briefing(self) -> Briefing:
        """Read what the binding refers to, however long that takes; raise `Superseded`, `LaunchRefused`."""
        told = False
        while True:
            try:
                return await read_briefing(self._place.broker, self.binding, self._known())
            except (Superseded, LaunchRefused):
                raise
            except FlameError as error:
                if not told:
                    self._log.warning("can't be started yet; trying on", reason=str(error))
                told = True
            await asyncio.sleep(_RETRY_S)

    def _known(self) -> Registered | None:
        """Return its application as the node has heard of it."""
        return None

    @abstractmethod
    def _clean_up(self) -> None:
        """End it, if it has not ended, and let go of what it was given."""

    @abstractmethod
    def _overdue(self) -> None:
        """Act on a time limit that has passed."""

    def _release(self) -> None:
        """Let go of everything. Also on the way out of a failure of ours: nothing stays."""
        self._clean_up()
        if self.life.state is not ExecutorState.RELEASED:
            self.life.release(FAULT_OF_OURS, clean=False, now=time.time())
        self._place.leases.drop(self.binding.executor)
        self._follow_life()
        self._alarm.set(None)
        self.released.set()
        if self._unwanted:
            self.writer.delete()

    def _follow_life(self) -> None:
        """Tell the cluster what has changed, and watch the time that it has."""
        for record in self.life.take_changes():
            self.writer.put(record)
        if not self._terminating:
            self._alarm.follow(self.life.deadline)
