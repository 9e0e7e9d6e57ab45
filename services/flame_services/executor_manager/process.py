"""An executor's process, as a group that ends together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import psutil

from flame_services.executor_manager import orphans
from flame_services.executor_manager.launch import Launch

_LOOK_S: Final = 0.05
"""Between looks, where the system can't tell when a process ends."""
_VANISH_LOOK_S: Final = 0.01


class Process(Protocol):
    """A process group that is looked after, however it came into being."""

    @property
    def pid(self) -> int:
        """Of its leader, and of the group."""

    @property
    def identity(self) -> str:
        """See `identity`."""

    @property
    def ended(self) -> asyncio.Future[int]:
        """Brings the status, negative after a signal, once the process has ended and the group was killed."""

    def owns(self, pid: int) -> bool:
        """Whether a process is one of this executor's."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group, unless it has ended."""

    async def vanished(self, limit_s: float) -> None:
        """Wait until the killed group is gone; a process that hangs in the kernel is given up after ``limit_s``."""


class ExecutorProcess:
    """The first process of an executor and all that it starts: a session and a process group of their own."""

    def __init__(self, launch: Launch, stdout: int, stderr: int, pass_fds: Sequence[int]) -> None:
        """Start it; raise `OSError` if the system refuses. Takes a millisecond, within which nothing else runs."""
        self._process = subprocess.Popen(
            launch.command,
            cwd=launch.folder,
            env=launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            start_new_session=True,
        )
        self.pid: Final = self._process.pid
        orphans.claim(self.pid)
        self.identity: Final = identity(self.pid) or ""
        self.ended: Final[asyncio.Future[int]] = asyncio.get_running_loop().create_future()
        """Brings the status, negative after a signal, once the process has ended and the group was killed."""
        self._watch = ExitWatch(self.pid, self._end, lambda: not is_alive(self.pid))

    def owns(self, pid: int) -> bool:
        """Whether a process is one of this executor's."""
        return owned_by(self.pid, pid)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group, unless it has ended."""
        if not self.ended.done():
            signal_group(self.pid, number)

    async def vanished(self, limit_s: float) -> None:
        """Wait until the killed group is gone; a process that hangs in the kernel is given up after ``limit_s``."""
        await group_vanished(self.pid, limit_s)

    def _end(self) -> None:
        # The group first: until its leader is reaped, nobody else can get its number.
        signal_group(self.pid, signal.SIGKILL)
        status = self._process.wait()
        orphans.disclaim(self.pid)
        if not self.ended.done():
            self.ended.set_result(status)


class ExitWatch:
    """Calls back once, when a process has ended: told by the system where it can, otherwise by looking."""

    def __init__(self, pid: int, ended: Callable[[], None], look: Callable[[], bool]) -> None:
        """Watch ``pid``; ``look`` tells whether it has ended."""
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        self._look = look
        self._timer: asyncio.TimerHandle | None = None
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._timer = self._loop.call_later(0, self._poll)
        except (AttributeError, OSError):  # not Linux, an old kernel, or no descriptor left
            self._timer = self._loop.call_later(_LOOK_S, self._poll)
        else:
            self._loop.add_reader(self._pidfd, self._fire)

    def stop(self) -> None:
        """Don't call back any more. Safe to call again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _poll(self) -> None:
        if self._look():
            self._fire()
        else:
            self._timer = self._loop.call_later(_LOOK_S, self._poll)

    def _fire(self) -> None:
        self.stop()
        self._ended()


def signal_group(leader: int, number: signal.Signals) -> bool:
    """Send a signal to the process group that a process leads; tell whether it leads one that may be signalled.

    A process that is gone for good leads none, and neither does one that is still in the group of its parent. Never
    reached are this process's own group, and what the system takes for many processes at once.
    """
    if leader <= 1 or leader == os.getpgrp() or group_of(leader) != leader:
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)
    return True


def owned_by(leader: int, pid: int) -> bool:
    """Whether a process is in the session or the group of a leader."""
    with contextlib.suppress(OSError):
        return pid > 0 and leader in (os.getsid(pid), os.getpgid(pid))
    return False


async def group_vanished(leader: int, limit_s: float) -> None:
    """Wait until a killed group is gone; a process that hangs in the kernel is given up after ``limit_s``."""
    deadline = time.monotonic() + limit_s
    while group_is_alive(leader) and time.monotonic() < deadline:  # noqa: ASYNC110 (nobody tells of a group)
        await asyncio.sleep(_VANISH_LOOK_S)


def group_is_alive(leader: int) -> bool:
    """Whether a process of a group still runs."""
    if leader <= 1:
        return False
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # Some are left, but may be dead: where nobody asks for the status of orphans they stay for ever.
    return any(group_of(pid) == leader and is_alive(pid) for pid in psutil.pids())


def group_of(pid: int) -> int:
    """Return the group of a process; -1 if it is gone."""
    try:
        return os.getpgid(pid)
    except OSError:
        return -1


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and only waits for its parent does not."""
    try:
        return bool(psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.Error:
        return False


def started_at(pid: int) -> float:
    """Return when a process started, Unix seconds; 0 if it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def identity(pid: int) -> str | None:
    """Return what tells a process from any other that had or will have its number; ``None`` if it is gone.

    Counted in ticks since the machine's start where that is known: setting the clock must not change it.
    """
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        return f"{_boot()} {ticks}"
    except OSError:
        started = started_at(pid)
        return f"{started:.2f}" if started else None


@functools.cache
def _boot() -> str:
    """Return what tells the machine's present run from any other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
