"""One executor: its process, its record and its reports, from the binding to the release."""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace
from functools import partial
from typing import Final

from flame.logs import get_logger
from flame.protocol import defaults
from flame.protocol.records import BindingRecord
from flame.protocol.states import ExecutorState
from flame.protocol.supervision import LEAVE, SERVE, Assignment, ExecutorReport, Orders
from flame_services.executor_manager.assignment import Briefing, Registered
from flame_services.executor_manager.bound import BoundExecutor
from flame_services.executor_manager.life import Limits
from flame_services.executor_manager.place import Place
from flame_services.executor_manager.process import ExitWatch, Process, is_alive, started_at
from flame_services.executor_manager.reasons import Reason, last_lines, mute, out_of_memory, service_ended
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
MUTE_S: Final = 60.0
"""One that runs no task and has not reported for this long is of no use any more."""
_REPORTING: Final = (ExecutorState.BOUND, ExecutorState.UNBINDING)
_BRIEF_S: Final = 0.05
"""That an executor is entering its session after it was forked, or leaving it, is told if it takes longer than this."""
_HOLD_S: Final = 0.1
"""A forked executor is held to its resources from then on."""


class Executor(BoundExecutor[Place]):
    """Carries one binding out with a process, which is never used for another."""

    def __init__(self, place: Place, binding: BindingRecord) -> None:
        """Take a binding; `start` begins."""
        settings = place.settings
        limits = Limits(settings.ready_timeout_s, settings.enter_timeout_s, defaults.LEAVE_TIMEOUT_S)
        super().__init__(place, binding, limits, log)
        self._preparing: asyncio.Timeout | None = None
        self._start: Start | None = None
        self._doom: tuple[Reason, float] | None = None
        """Why it is to end, with the grace, if that was said before there was a process."""
        self._service: ExitWatch | None = None
        self._heard_at = self._loop.time()
        self._share = Share(binding, place.berths.gpus, place.enforcement, self._exceeded)

    @property
    def _process(self) -> Process | None:
        return None if self._start is None else self._start.process

    # ---- what is wanted of it

    def leave(self) -> None:
        """Have it leave its session and end; tasks that run may finish. `nudge` lets it know soon."""
        super().leave()
        if self._preparing is not None and not self._preparing.expired():
            self._preparing.reschedule(self._loop.time())

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
        return await super().report(report)

    def _assign(self, assignment: Assignment) -> Orders:
        if self._start is None or self._start.known_as == self.binding.executor:
            return super()._assign(assignment)
        return Orders(SERVE, assignment, self.binding.executor, self._start.new_folder)

    def _names(self) -> set[str]:
        return {self.binding.executor} | (set() if self._start is None else {self._start.known_as})

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

    # ---- its life

    async def _carry_out(self) -> tuple[int, str] | None:
        prepared = await self._prepare()
        if prepared is None or self.life.leaving:
            return None
        process = await self._start_process(*prepared)
        status = await process.ended
        self._share.look()
        await self._place.leases.hand_over(self.binding.executor)
        await process.vanished(_VANISH_S)
        return status, last_lines(self._last_output())

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

    def _known(self) -> Registered | None:
        return self._place.stocks.registered(self.binding.application)

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

    def _clean_up(self) -> None:
        self.kill()
        if self._service is not None:
            self._service.stop()
        self._share.give_back()
        if self._start is not None:
            self._start.clean_up()

    def _release(self) -> None:
        super()._release()
        record = self.life.record
        told = self._log.info if record.clean else self._log.warning
        # The first line is ours; what follows is what the service wrote, which is not for this log.
        told("released", pid=record.pid, clean=record.clean, reason=record.reason.partition("\n")[0])

    # ---- its end

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
