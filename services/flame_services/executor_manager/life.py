"""The rules of one executor's life: what its reports mean, how long each step may take, how its end is judged.

No process, no broker and no clock here: `flame_services.executor_manager.executor` brings those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from flame.errors import IllegalTransition
from flame.protocol import defaults
from flame.protocol.codes import ReasonCode
from flame.protocol.records import BindingRecord, ExecutorRecord
from flame.protocol.states import EXECUTOR, ExecutorEvent, ExecutorState
from flame.protocol.supervision import ExecutorReport
from flame_services.executor_manager import reasons
from flame_services.executor_manager.reasons import Reason

GO_S: Final = 5.0
"""How long a process may take to end where nothing is left to do."""
SILENT_S: Final = 7.5
"""One that reports every 5 s and has not for this long is busy, whatever it said last."""
HOW_MOST: Final = 300
"""Of what a service says about its own start, so many characters are told."""
NOTABLE: Final = 0.2
"""The part by which a backlog must have changed to be worth a record."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the steps of a life may take."""

    ready_s: float
    enter_s: float
    leave_s: float
    """For ``on_session_leave`` itself; the executor keeps this one, we only see to it."""


_NOT_STOPPED: Final = Reason(ReasonCode.TASK_STUCK, "its session was closed by force, and a task did not stop")


@dataclass(frozen=True, slots=True, eq=False)
class Deadline:
    """A step that is under way must be over in time."""

    after_s: float
    cause: Reason
    """What is said if it is not."""
    ask_first: bool = True
    """SIGTERM before SIGKILL."""


class Life:
    """One executor's life so far."""

    def __init__(self, binding: BindingRecord, limits: Limits, now: float) -> None:
        """Begin with a binding. Times are Unix seconds."""
        self.record = ExecutorRecord(
            id=binding.executor,
            node=binding.node,
            application=binding.application,
            session=binding.session,
            epoch=binding.epoch,
            state=ExecutorState.STARTING,
            created=now,
            updated=now,
        )
        self.leaving = binding.leave
        """Its orders are to leave."""
        self.forced = binding.leave and binding.force
        """Its tasks are to be stopped for that."""
        self.deadline: Deadline | None = None
        """What it must do in time; a new object each time that begins anew."""
        self._limits = limits
        self._changes: list[ExecutorRecord] = []
        self._heard_at = now
        self._told_pending = 0
        self._left = False
        self._fault: Reason | None = None
        self._cause: Reason | None = None
        self._blameless = False

    @property
    def state(self) -> ExecutorState:
        """Where in its life it is."""
        return self.record.state

    @property
    def must_be_reminded(self) -> bool:
        """Whether it has not shown yet that it knows it is to leave."""
        return self.leaving and not self._fault and self.state in (ExecutorState.BINDING, ExecutorState.BOUND)

    def take_changes(self) -> list[ExecutorRecord]:
        """Return the records that came into being since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    # ---- its beginning

    def start(self, now: float) -> None:
        """Its process was started."""
        self._change(now)
        self.deadline = Deadline(self._limits.ready_s, reasons.not_ready(self._limits.ready_s))

    def start_with_session(self, now: float) -> None:
        """Its process was started and has its session: it is entering. Not told yet; see `tell_entering`."""
        told = len(self._changes)
        self._move(ExecutorEvent.READY, now)
        self.assign(now)
        del self._changes[told:]

    def tell_entering(self, now: float) -> None:
        """Have it told that it is entering, if it still is."""
        if self.state is ExecutorState.BINDING:
            self._change(now)

    def identify(self, pid: int, process_started: float) -> None:
        """Say which process runs its service; told to the cluster with the next change."""
        self.record = self.record.changed(pid=pid, process_started=process_started)

    def tell_start(self, how: str) -> None:
        """Say how its process was started; told to the cluster with the next change."""
        self.record = self.record.changed(started=how[:HOW_MOST])

    def assign(self, now: float) -> None:
        """It is given its session; once more if it did not hear that."""
        if self.state is ExecutorState.IDLE:
            self._move(ExecutorEvent.ASSIGN, now)
            self.deadline = Deadline(self._limits.enter_s, reasons.enter_too_long(self._limits.enter_s))

    # ---- what it reports

    def hear(self, report: ExecutorReport, now: float) -> None:
        """Take note of a report; raise `IllegalTransition`, having changed nothing, if it can't be true."""
        self._heard_at = now
        if report.state is ExecutorState.IDLE:
            self._hear_idle(now)
        elif report.state is ExecutorState.BINDING:
            self._hear_binding(report)
        elif report.state is ExecutorState.BOUND:
            self._hear_bound(report, now)
        elif report.state is ExecutorState.UNBINDING:
            self._hear_unbinding(report, now)
        elif report.state is ExecutorState.RELEASED:
            self._hear_released(report, now)
        else:
            self._refuse(report)

    def _hear_idle(self, now: float) -> None:
        if self.state not in (ExecutorState.IDLE, ExecutorState.BINDING):  # else it did not get our answer
            self._move(ExecutorEvent.READY, now)
        if self.leaving:
            self._must_go("did not end when told to leave")
        elif self.state is ExecutorState.IDLE:
            self.deadline = None

    def _hear_binding(self, report: ExecutorReport) -> None:
        if self.state is not ExecutorState.BINDING:
            self._refuse(report)
        if report.error is not None:
            self._fault = self._fault or reasons.enter_failed(report.error)
            self.leaving = True
            self._must_go("did not end after it had failed to enter")

    def _hear_bound(self, report: ExecutorReport, now: float) -> None:
        if self.state is ExecutorState.BINDING:
            self._move(ExecutorEvent.ENTERED, now, entered=True)
            self.deadline = None
        elif self.state is not ExecutorState.BOUND:
            self._refuse(report)
        self._count(report, now)
        if self.leaving:
            self._bound_leaving(report)

    def _hear_unbinding(self, report: ExecutorReport, now: float) -> None:
        if self.state is not ExecutorState.UNBINDING:
            self._move(ExecutorEvent.LEAVE, now)
        self.leaving = True
        self._count(report, now)
        self._bound_leaving(report)

    def _hear_released(self, report: ExecutorReport, now: float) -> None:
        self._left = True
        self.leaving = True
        if report.error is not None:
            told = reasons.leave_failed if self.record.entered else reasons.enter_failed
            self._fault = self._fault or told(report.error)
        self._count(report, now)
        self._must_go("did not end after it had left")

    def _bound_leaving(self, report: ExecutorReport) -> None:
        """Running tasks may finish without limit unless they are to be stopped; leaving after the last has one."""
        if report.running:
            if not self.forced:
                self.deadline = None
        elif self.deadline is None or self.deadline.cause is _NOT_STOPPED:
            limit_s = self._limits.leave_s
            self.deadline = Deadline(limit_s + GO_S, reasons.leave_too_long(limit_s))

    def force(self) -> None:
        """It is to leave now, its tasks stopped: they have a moment for that."""
        self.leaving = self.forced = True
        if self.state in (ExecutorState.BOUND, ExecutorState.UNBINDING) and not self._left:
            self.deadline = Deadline(defaults.TASK_STOP_S, _NOT_STOPPED)

    def _must_go(self, what: str) -> None:
        if self.deadline is None or self.deadline.ask_first:
            self.deadline = Deadline(GO_S, Reason(ReasonCode.STUCK, what), ask_first=False)

    def _refuse(self, report: ExecutorReport) -> None:
        raise IllegalTransition(f"executor is {self.state.value}: it can't be {report.state.value}")

    # ---- how much it does

    def _count(self, report: ExecutorReport, now: float) -> None:
        idle = report.idle_s > 0 and report.running == 0 and report.state is ExecutorState.BOUND
        # A backlog that it has told before is what it saw then; the consumer, asked since, knows better.
        told, self._told_pending = self._told_pending, report.pending
        pending = report.pending if idle or report.pending != told else self.record.pending
        if not notable(self.record.pending, pending):
            pending = self.record.pending
        self._change_counts(
            now,
            succeeded=report.succeeded,
            failed=report.failed,
            cancelled=report.cancelled,
            counted_to=report.counted_to,
            running=report.running,
            pending=pending,
            idle=idle,
        )

    def note_backlog(self, pending: int, now: float) -> None:
        """Take note of what waits in its session, as the consumer says."""
        if self.state is ExecutorState.BOUND and notable(self.record.pending, pending):
            self._change_counts(now, pending=pending)

    def note_silence(self, now: float) -> None:
        """Don't believe that it is idle any more, if it should have said so again: a blocked one reports nothing."""
        if self.record.idle and now - self._heard_at > SILENT_S:
            self._change_counts(now, idle=False)

    @property
    def is_busy(self) -> bool:
        """Whether it takes tasks and has something to do."""
        return self.state is ExecutorState.BOUND and not self.record.idle

    # ---- its end

    def give_up(self, cause: Reason, *, blameless: bool = False) -> None:
        """Say why its process is ended by us; the first cause counts, and none after it has left.

        ``blameless``: neither it nor its session can help it.
        """
        if not (self._cause or self._left or self._fault):
            self._cause = cause
            self._blameless = blameless

    def end(self, status: int, tail: str, now: float) -> None:
        """Its process has ended: judge how. ``tail`` is what it wrote last to standard error."""
        reason, clean = self._fault, False
        if reason:
            pass
        elif self._cause and not self._blameless:
            reason = self._cause.with_tail(tail)
        elif self._left:
            clean = True
        elif self._cause:
            reason, clean = self._cause, not self.record.entered
        elif self.leaving and status == 0 and not self.record.entered:
            clean = True
        else:
            reason = reasons.ended_by_itself(status, self.state).with_tail(tail)
        self.release(reason, clean=clean, now=now)

    def release(self, reason: Reason | None, *, clean: bool, now: float) -> None:
        """It has no process, any more or at all; ``None``: it ended in order."""
        self.deadline = None
        told = {} if reason is None else {"reason": reason.text, "code": str(reason.code)}
        self._move(ExecutorEvent.GONE, now, clean=clean, running=0, pending=0, idle=False, **told)

    # ---- records

    def _move(self, event: ExecutorEvent, now: float, **fields: Any) -> None:
        self._change(now, state=EXECUTOR.next(self.state, event), **fields)

    def _change_counts(self, now: float, **fields: Any) -> None:
        if any(getattr(self.record, name) != value for name, value in fields.items()):
            self._change(now, **fields)

    def _change(self, now: float, **fields: Any) -> None:
        self.record = self.record.changed(**fields, updated=now)
        self._changes.append(self.record)


def notable(old: int, new: int) -> bool:
    """Whether a backlog changed enough to matter to scheduling."""
    return (old == 0) != (new == 0) or (old != new and abs(new - old) >= NOTABLE * old)
