"""One executor: its process, its record and its reports, from the binding to the release."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from dataclasses import replace
from functools import partial
from typing import Final

from flame.errors import FlameError, IllegalTransition
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.codes import ReasonCode
from flame.protocol.messages import LEAVE, SERVE, Assignment, Control, ExecutorReport, Orders
from flame.protocol.records import BindingRecord
from flame.protocol.states import ExecutorState
from flame_services.executor_manager.alarm import Alarm
from flame_services.executor_manager.assignment import Briefing, Superseded, read_briefing
from flame_services.executor_manager.handout import add_common_data
from flame_services.executor_manager.launch import LaunchRefused
from flame_services.executor_manager.life import Life, Limits
from flame_services.executor_manager.place import Place
from flame_services.executor_manager.process import ExitWatch, Process, is_alive, started_at
from flame_services.executor_manager.reasons import Reason, last_lines, mute, out_of_memory, service_ended
from flame_services.executor_manager.record import RecordWriter
from flame_services.executor_manager.share import Share
from flame_services.executor_manager.start import FORKED, Start
from flame_services.executor_manager.stock import Stock
from flame_services.executor_manager.template import Template
from flame_services.executor_manager.verdicts import out_of_memory as fault_of_memory

log = get_logger("flame.manager.executor")

KILL_AFTER_S: Final = 5.0
"""Between SIGTERM and SIGKILL."""
_VANISH_S: Final = 1.0
_WRAPPER_S: Final = 2.0
"""How long the program that was started, such as `uv run`, may outlive the service that it started."""
_RETRY_S: Final = 0.5
MUTE_S: Final = 60.0
"""One that runs no task and has not reported for this long is of no use any more."""
_REPORTING: Final = (ExecutorState.BOUND, ExecutorState.UNBINDING)
_BRIEF_S: Final = 0.05
"""That an executor is entering its session after it was forked, or leaving it, is told if it takes longer than this."""
_HOLD_S: Final = 0.1
"""A forked executor is held to its resources from then on."""
UNBOUND: Final = Reason(ReasonCode.UNBOUND, "its binding was deleted")
CLOSED_BY_FORCE: Final = Reason(ReasonCode.UNBOUND, "its session was closed by force")
FAULT_OF_OURS: Final = Reason(ReasonCode.INTERNAL, "a fault of the executor manager; its log has the details")


class Executor:
    """Carries one binding out. Its process is never used for another."""

    def __init__(self, place: Place, binding: BindingRecord) -> None:
        """Take a binding; `start` begins."""
        settings = place.settings
        limits = Limits(settings.ready_timeout_s, settings.enter_timeout_s, defaults.LEAVE_TIMEOUT_S)
        self.binding: Final = binding
        self.writer: Final = RecordWriter(place.broker, place.node, binding.executor)
        self.released: Final = asyncio.Event()
        """Its process is gone and its last record is on its way."""
        self.life: Final = Life(binding, limits, time.time())
        self._place: Final = place
        self._log = log.bind(executor=binding.executor, session=binding.session, application=binding.application)
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._preparing: asyncio.Timeout | None = None
        self._start: Start | None = None
        self._doom: tuple[Reason, float] | None = None
        """Why it is to end, with the grace, if that was said before there was a process."""
        self._service: ExitWatch | None = None
        self._assignment: Assignment | None = None
        self._lost_consumer = False
        self._heard_at = self._loop.time()
        self._alarm = Alarm(self._overdue)
        self._terminating = False
        self._unwanted = False
        self._share = Share(binding, place.berths.gpus, place.enforcement, self._exceeded)

    @property
    def must_be_reminded(self) -> bool:
        """Whether it should report, since there is something for it to hear."""
        return self.life.must_be_reminded or self._lost_consumer

    @property
    def _process(self) -> Process | None:
        return None if self._start is None else self._start.process

    @property
    def consumer(self) -> tuple[str, str]:
        """The stream and the consumer that it pulls from."""
        return subjects.task_stream(self.binding.application), self.binding.consumer

    # ---- what is wanted of it

    def start(self) -> None:
        """Begin to carry the binding out."""
        self._task = asyncio.create_task(self._live(), name=f"executor {self.binding.executor}")

    def leave(self) -> None:
        """Have it leave its session and end; tasks that run may finish. `nudge` lets it know soon."""
        if not self.life.leaving:
            self.life.leaving = True
            self._log.debug("told to leave")
        if self._preparing is not None and not self._preparing.expired():
            self._preparing.reschedule(self._loop.time())

    def force(self) -> None:
        """Have it leave now: what runs in it is stopped, by itself or with its process."""
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
        names = {self.binding.executor} | (set() if self._start is None else {self._start.known_as})
        with contextlib.suppress(FlameError):
            for name in names:
                subject = subjects.control(self.binding.application, self.binding.session)
                await self._place.broker.publish(subject, Control(name).encode())

    def drop(self) -> None:
        """End it and remove its record: its binding is gone."""
        self._unwanted = True
        if self.released.is_set():
            self.writer.delete()
        else:
            self.terminate(UNBOUND)

    def terminate(self, cause: Reason, grace_s: float = KILL_AFTER_S) -> None:
        """End it through no fault of its own: SIGTERM to its processes now, SIGKILL after the grace."""
        self.leave()
        self._place.leases.excuse(self.binding.executor)
        self._terminate(cause, grace_s, blameless=True)

    def end_if_mute(self) -> None:
        """End it if it says nothing any more, although no task keeps it from that."""
        silent = self._loop.time() - self._heard_at > MUTE_S and self.life.state in _REPORTING
        if silent and self._place.leases.runs_nothing(self.binding.executor):
            self.end_stuck(mute(MUTE_S))

    def end_stuck(self, cause: Reason) -> None:
        """End it, since something in it does not stop."""
        if not self._terminating:
            self._terminate(cause, KILL_AFTER_S)

    def kill(self) -> None:
        """End its processes now."""
        if self._process is not None:
            self._process.signal(signal.SIGKILL)

    def allow_more_time(self) -> None:
        """Begin its present time limit anew: the broker was away, and it could not report meanwhile."""
        self._heard_at = self._loop.time()
        if self._alarm.armed is not None and self._alarm.armed.ask_first and not self._terminating:
            self._alarm.begin_anew()

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
        if self._start is None:
            return Orders(LEAVE)
        await self._start.certain.wait()
        if not self._is_ours(report.pid):
            return Orders(LEAVE)
        self._heard_at = self._loop.time()
        self._start.heard(report)
        self.life.tell_start(self._start.how)
        try:
            self.life.hear(report, time.time())
        except IllegalTransition as error:
            self._log.warning("report ignored", pid=report.pid, reason=str(error))
        self._follow_life()
        self._lost_consumer = report.lost_consumer
        if self.life.leaving or self._assignment is None:
            return Orders(LEAVE, force=self.life.forced)
        if report.lost_consumer:
            return await self._repair(self._assignment)
        if report.state is ExecutorState.IDLE:
            self.life.assign(time.time())
            self._follow_life()
            if self._start.known_as != self.binding.executor:
                return Orders(SERVE, self._assignment, self.binding.executor, self._start.new_folder)
            return Orders(SERVE, self._assignment)
        orders = Orders(SERVE)
        if report.common_data_wanted:
            with contextlib.suppress(FlameError):  # it asks again
                await add_common_data(self._place.broker, self.binding.session, report, orders)
        return orders

    def _is_ours(self, pid: int) -> bool:
        """Whether a report comes from the process that runs the service; the first one decides which that is."""
        process, known = self._process, self.life.record.pid
        if process is None or self.released.is_set():
            return False
        if known:
            if pid != known:
                self._log.warning("report refused: it comes from another process", pid=pid, service=known)
            return pid == known
        if not process.owns(pid):
            self._log.warning("report refused: the process is none of this executor's", pid=pid)
            return False
        self.life.identify(pid, started_at(pid))
        if pid != process.pid:
            self._service = ExitWatch(pid, self._service_ended, lambda: not is_alive(pid))
        return True

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

    # ---- its life

    async def _live(self) -> None:
        try:
            prepared = await self._prepare()
            if prepared is None or self.life.leaving:
                self.life.release(None, clean=True, now=time.time())
                return
            process = await self._start_process(*prepared)
            status = await process.ended
            self._share.look()
            await self._place.leases.hand_over(self.binding.executor)
            await process.vanished(_VANISH_S)
            tail = last_lines(self._last_output())
            self.life.end(status, tail, time.time())
        except Superseded as error:
            self.life.release(Reason(ReasonCode.UNBOUND, str(error)), clean=True, now=time.time())
        except LaunchRefused as error:
            self.life.release(Reason(ReasonCode.STARTING_REFUSED, str(error)), clean=False, now=time.time())
        except Exception:  # noqa: BLE001 (of ours, whatever it is: the process must end and the cluster know)
            self._log.exception("an executor can't be looked after any more")
        finally:
            self._release()

    async def _prepare(self) -> tuple[Briefing, Stock, Template | None] | None:
        """Read what the binding refers to, and wait for its GPUs and a template that is just being started.

        That takes as long as it takes; ``None`` if it is to leave before.
        """
        try:
            async with asyncio.timeout(0 if self.life.leaving else None) as self._preparing:
                briefing = await self._read_briefing()
                await self._share.take_devices()
                stock = self._place.stocks.of(briefing.application)
                return briefing, stock, await stock.ready_template()
        except TimeoutError:
            return None
        finally:
            self._preparing = None

    async def _read_briefing(self) -> Briefing:
        told = False
        while True:
            try:
                known = self._place.stocks.registered(self.binding.application)
                return await read_briefing(self._place.broker, self.binding, known)
            except (Superseded, LaunchRefused):
                raise
            except FlameError as error:
                if not told:
                    self._log.warning("can't be started yet; trying on", reason=str(error))
                told = True
            await asyncio.sleep(_RETRY_S)

    async def _start_process(self, briefing: Briefing, stock: Stock, template: Template | None) -> Process:
        ledger = self._place.leases.open(self.binding, briefing.assignment.ack_wait_s)
        self._assignment = replace(briefing.assignment, ledger=ledger)
        start = self._start = Start(self._place, self.binding, stock, self._assignment, self._share.devices)
        has_session = await start.run(template, self._began)
        process = start.process
        assert process is not None
        self.life.tell_start(start.how)
        self._log.info("started", pid=process.pid, started=start.how)
        if has_session:
            self.life.identify(process.pid, started_at(process.pid))
            self.life.start_with_session(time.time())
            self._follow_life()
            self._loop.call_later(_BRIEF_S, self._tell_entering)
        forked = start.how == FORKED
        # A fork is held a moment later, since its first result should not wait for that.
        self._loop.call_later(_HOLD_S if forked else 0, partial(self._share.hold, process, forked=forked))
        if self._doom is not None:
            self.terminate(*self._doom)
        return process

    def _exceeded(self, used: int) -> None:
        """End it at once: it uses more memory than it may. What runs in it fails; what it only holds goes back."""
        cause = out_of_memory(used, self.binding.resources.memory)
        self._log.warning("ending it for its memory", reason=cause.text)
        self._place.leases.condemn(self.binding.executor, fault_of_memory(cause.text))
        self.life.leaving = True
        self.life.give_up(cause)
        self._terminating = True
        self.kill()

    def _tell_entering(self) -> None:
        """Tell the cluster that it is entering, unless it has: mostly that is over before anybody could care."""
        self.life.tell_entering(time.time())
        self._follow_life()

    def _began(self) -> None:
        """There is a process, and what it reports is awaited."""
        self.life.start(time.time())
        self._follow_life()

    def _last_output(self) -> bytes:
        captured = None if self._start is None else self._start.captured
        return b"" if captured is None else captured.last_output()

    def _release(self) -> None:
        """Let go of everything. Also on the way out of a failure of ours: no process stays."""
        life = self.life
        self.kill()
        if life.state is not ExecutorState.RELEASED:
            life.release(FAULT_OF_OURS, clean=False, now=time.time())
        if self._service is not None:
            self._service.stop()
        self._share.give_back()
        self._place.leases.drop(self.binding.executor)
        if self._start is not None:
            self._start.clean_up()
        self._follow_life()
        self._alarm.set(None)
        record = life.record
        told = self._log.info if record.clean else self._log.warning
        # The first line is ours; what follows is what the service wrote, which is not for this log.
        told("released", pid=record.pid, clean=record.clean, reason=record.reason.partition("\n")[0])
        self.released.set()
        if self._unwanted:
            self.writer.delete()

    # ---- its end

    def _follow_life(self) -> None:
        """Tell the cluster what has changed, and watch the time that it has."""
        for record in self.life.take_changes():
            self.writer.put(record)
        if not self._terminating:
            self._alarm.follow(self.life.deadline)

    def _overdue(self) -> None:
        deadline = self._alarm.armed
        if self._terminating or deadline is None:
            self.kill()
        elif deadline.ask_first and not self._place.broker.connected:
            self.allow_more_time()
        elif deadline.ask_first:
            self._terminate(deadline.cause, KILL_AFTER_S)
        else:
            self.life.give_up(deadline.cause)
            self.kill()

    def _terminate(self, cause: Reason, grace_s: float, *, blameless: bool = False) -> None:
        if self.released.is_set():
            return
        if self._process is None:
            self._doom = (cause, grace_s)
            return
        self.life.give_up(cause, blameless=blameless)
        self.life.leaving = True
        if not self._terminating:
            self._log.info("ending its processes", pid=self._process.pid, reason=cause.text)
            self._terminating = True
        self._process.signal(signal.SIGTERM)
        self._alarm.set(grace_s)

    def _service_ended(self) -> None:
        """The service is gone, but not the program that we started, which wraps it."""
        cause = service_ended(self.life.record.pid, self.life.state)
        self._loop.call_later(_WRAPPER_S, lambda: self._terminate(cause, KILL_AFTER_S))
