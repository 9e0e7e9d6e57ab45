"""An executor's process that a template has forked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from typing import Final

from flame_services.executor_manager import orphans
from flame_services.executor_manager.process import group_vanished, identity, owned_by, signal_group
from flame_services.executor_manager.reasons import UNKNOWN

_TOLD_S: Final = 1.0
"""How long the template may take to tell how a process ended."""


class ForkedProcess:
    """A session and a process group of their own, as `flame_services.executor_manager.process.ExecutorProcess` is.

    It is a child of its template, which tells how it ended. When that is gone it is ours, if the system does that.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        """Watch a process by its descriptor, which is closed with its end."""
        self.pid: Final = pid
        self.identity: Final = identity(pid) or ""
        self._loop = asyncio.get_running_loop()
        self.ended: Final[asyncio.Future[int]] = self._loop.create_future()
        """Brings the status, negative after a signal, once the process has ended and the group was killed."""
        self._descriptor = descriptor
        self._told: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        orphans.claim(pid)
        self._loop.add_reader(descriptor, self._exited)

    def owns(self, pid: int) -> bool:
        """Whether a process is one of this executor's."""
        return owned_by(self.pid, pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group, unless it has ended."""
        if self.ended.done() or self._is_dead():
            return
        if not signal_group(self.pid, number):  # just forked: it is still in its template's group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._descriptor, number)

    async def vanished(self, limit_s: float) -> None:
        """Wait until the killed group is gone; a process that hangs in the kernel is given up after ``limit_s``."""
        await group_vanished(self.pid, limit_s)

    def tell(self, status: int) -> None:
        """Say what the template knows: it has ended like this, and its group was killed."""
        self._told = status
        if self._timer is not None or self._is_dead():
            self._end(status)

    def lose_template(self) -> None:
        """Say that the template is gone, and tells nothing any more."""
        if self._timer is not None:
            self._exited()

    def _is_dead(self) -> bool:
        """Whether it runs no more, so that its number may be somebody else's."""
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        return bool(poller.poll(0))

    def _exited(self) -> None:
        """Find out how it ended, or wait to be told."""
        self._loop.remove_reader(self._descriptor)
        status = self._told
        if status is None:
            status = self._reap()
        if status is not None:
            self._end(status)
        elif self._timer is None:
            self._timer = self._loop.call_later(_TOLD_S, self._give_up)

    def _reap(self) -> int | None:
        """Ask for its status, which only its parent is told."""
        try:
            if os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            # The group first: until its leader is reaped, nobody else can get its number.
            signal_group(self.pid, signal.SIGKILL)
            result = os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return None
        if result is None:
            return None
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status

    def _give_up(self) -> None:
        status = self._reap()
        if status is None:
            signal_group(self.pid, signal.SIGKILL)  # its parent may be stopped, so that nobody has killed its group
        self._end(UNKNOWN if status is None else status)

    def _end(self, status: int) -> None:
        if self.ended.done():
            return
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        orphans.disclaim(self.pid)
        self.ended.set_result(status)
