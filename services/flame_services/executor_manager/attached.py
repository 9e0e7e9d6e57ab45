"""A process that somebody has started by hand, as the one executor of its node.

It is nobody's child here, and may be stopped by a debugger for as long as somebody looks at it. So it is told what is
wanted of it, at most gets SIGTERM, and only it: its process group is a shell's, and what else runs there is the
user's. What doesn't end then is let go of: what it held is run elsewhere, and its process goes on without us.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol.attaching import ATTACHED, END, GONE, LEAVE, READY
from flame.protocol.codes import ReasonCode
from flame.protocol.records import BindingRecord
from flame.protocol.supervision import LEAVE as TO_LEAVE
from flame.protocol.supervision import SERVE, Assignment, ExecutorReport, Orders
from flame_services.executor_manager.bound import BoundExecutor, Misplaced
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.keeper import LeaseKeeper
from flame_services.executor_manager.life import Limits
from flame_services.executor_manager.process import ExitWatch, is_alive, started_at
from flame_services.executor_manager.reasons import Reason
from flame_services.executor_manager.warm import HOLD_S

log = get_logger("flame.manager.attached")

AS_LONG_AS_IT_TAKES_S: Final = 1e9
ASK_S: Final = 5.0
"""Between asking it to end, SIGTERM, and letting go of it."""
_READ: Final = 64
LEFT: Final = Reason(ReasonCode.MANAGER_STOPPED, "the process that was attached for it has left")
DIED: Final = Reason(ReasonCode.EXITED, "the process that was attached for it has ended")


class Attached:
    """The process, seen from the manager of its node."""

    def __init__(self, application: str, name: str, pid: int, channel: socket.socket) -> None:
        """Look after process ``pid``, which reports as ``name`` until it has a session of ``application``."""
        self.application: Final = application
        self.name: Final = name
        self.pid: Final = pid
        self.over: Final = asyncio.Event()
        """It has ended, or wants to leave: the node has nothing more to do."""
        self.ended: Final = asyncio.Event()
        """It serves nothing any more."""
        self.leaves = False
        """It wants to leave, or has: what becomes of its tasks is no fault of theirs."""
        self.given: Final[dict[str, str]] = {}
        """The executor that it has become, by its own name."""
        self._taken = False
        self._told = asyncio.Event()
        self._channel: Final = channel
        self._loop = asyncio.get_running_loop()
        channel.setblocking(False)
        self._loop.add_reader(channel, self._hear)
        self._watch: Final = ExitWatch(pid, self.let_go, lambda: not is_alive(pid))

    # ---- before it has a session

    async def wait_in(self, name: str, report: ExecutorReport) -> bool:
        """Hold the answer to a report back while there is no session; tell whether it can be answered now."""
        if name == self.name and report.pid == self.pid and not self.given:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLD_S):
                    await self._told.wait()
            return self._told.is_set()
        return True

    def take(self, binding: BindingRecord) -> None:
        """Take it for an executor; raise `Misplaced` if it can't be that one."""
        if binding.application != self.application:
            raise Misplaced(f"node {binding.node} serves no application but {self.application}")
        if self._taken or self.over.is_set():
            raise Misplaced(f"node {binding.node} serves one session only, and has had it")
        self._taken = True

    def put_back(self) -> None:
        """Say that nothing came of `take`."""
        self._taken = False

    def give(self, executor: str) -> None:
        """Let its question be answered: it is an executor from now on."""
        self.given[self.name] = executor
        self._told.set()

    # ---- what is said

    def say_ready(self) -> None:
        """Tell it that its reports are answered."""
        self._say(READY)

    def end(self) -> None:
        """Have it end, whatever it does."""
        if not self.ended.is_set():
            self._say(END)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGTERM)

    def _say(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # it is gone, which is noticed
            self._channel.send(word)

    def _hear(self) -> None:
        try:
            words = self._channel.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        if LEAVE in words or GONE in words:
            self.leaves = True
            self.over.set()
        if GONE in words or not words:
            self.let_go()

    # ---- its end

    def let_go(self) -> None:
        """Have nothing to do with it any more: it has ended, or has done what it was for. Safe to call again."""
        self._watch.stop()
        if not self.ended.is_set():
            self._loop.remove_reader(self._channel)
            self.ended.set()
            self.over.set()
            self._told.set()

    def stop_waiting(self) -> None:
        """Have it told to leave if it waits for a session."""
        self.over.set()
        self._told.set()

    def close(self) -> None:
        """Close the pair of sockets: it learns that the manager is gone."""
        self.let_go()
        self._channel.close()


@dataclass(frozen=True, slots=True)
class AttachedPlace:
    """The node of such a process, for its executor."""

    node: str
    broker: Broker
    consumers: Consumers
    leases: LeaseKeeper
    stocks: Attached


class AttachedExecutor(BoundExecutor[AttachedPlace]):
    """Carries one binding out with the process. It has the time that it takes, since somebody may be looking at it."""

    def __init__(self, place: AttachedPlace, binding: BindingRecord) -> None:
        """Take a binding; `start` begins."""
        limits = Limits(AS_LONG_AS_IT_TAKES_S, AS_LONG_AS_IT_TAKES_S, AS_LONG_AS_IT_TAKES_S)
        super().__init__(place, binding, limits, log)
        self._attached: Final = place.stocks
        self._signalled = False

    # ---- what is wanted of it

    def terminate(self, cause: Reason, grace_s: float = ASK_S) -> None:
        """End it through no fault of its own: it is asked to, then gets SIGTERM, and is let go of in the end."""
        self.leave()
        self._place.leases.excuse(self.binding.executor)
        if self.released.is_set():
            return
        self.life.give_up(cause, blameless=True)
        if not self._terminating:
            self._terminating = True
            self._alarm.set(grace_s)

    def end_if_mute(self) -> None:
        """Do nothing: whoever stopped it with a debugger knows why it says nothing."""

    def end_stuck(self, cause: Reason) -> None:
        """Do nothing but say so: what it runs ends with the look that somebody takes at it."""
        self._log.warning("a task does not stop", reason=cause.text)

    def allow_more_time(self) -> None:
        """Do nothing: it has all the time."""

    def kill(self) -> None:
        """Let go of it."""
        self._attached.let_go()

    # ---- what it reports

    async def report(self, report: ExecutorReport) -> Orders:
        """Take note of a report and answer it."""
        if report.pid != self._attached.pid or self._assignment is None:
            return Orders(TO_LEAVE)
        if not self.life.record.pid:
            self.life.identify(report.pid, started_at(report.pid))
        return await super().report(report)

    def _assign(self, assignment: Assignment) -> Orders:
        return Orders(SERVE, assignment, self.binding.executor)

    def _names(self) -> Iterable[str]:
        return self.binding.executor, self._attached.name

    # ---- its life

    async def _carry_out(self) -> tuple[int, str] | None:
        self._attached.take(self.binding)
        try:
            briefing = await self._read_briefing()
        except FlameError:
            self._attached.put_back()
            raise
        if self.life.leaving:
            self._attached.put_back()
            return None
        ledger = self._place.leases.open(self.binding, briefing.assignment.ack_wait_s)
        self._assignment = replace(briefing.assignment, ledger=ledger, leave_timeout_s=AS_LONG_AS_IT_TAKES_S)
        self.life.tell_start(ATTACHED)
        self.life.start(time.time())
        self._follow_life()
        self._attached.give(self.binding.executor)
        await self._attached.ended.wait()
        leaves = self._attached.leaves
        if leaves:
            self._place.leases.excuse(self.binding.executor)
        await self._place.leases.hand_over(self.binding.executor)
        self.life.give_up(LEFT if leaves else DIED, blameless=True)
        return 0, ""

    def _clean_up(self) -> None:
        self._log.info("released")

    def _overdue(self) -> None:
        if self._signalled:
            self._attached.let_go()
        elif self._terminating or self.life.forced:
            self._signalled = self._terminating = True
            self._log.info("asking the process to end", pid=self._attached.pid)
            self._attached.end()
            self._alarm.set(ASK_S)
