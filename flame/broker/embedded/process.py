"""The server's process and its guard, as their owner sees them.

Bound to no event loop: what one started another may wait for or stop, and `kill` needs none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flame.broker.embedded import guard

_GUARD = Path(guard.__file__)

_GUARD_LIMIT_S = 1.0
"""How long a guard may take to kill its server; then both are killed from here."""

_REAP_LIMIT_S = 5.0
"""How long the kernel may take to end a killed process."""


class GuardedServer:
    """A server that ends when `request_stop` or `kill` is called, or when this process does."""

    def __init__(self, command: Sequence[str], *, log_file: Path, store_lock: int, grace_s: float) -> None:
        """Start guard and server in a session of their own, so that a terminal's Ctrl-C does not reach them.

        Both inherit ``store_lock``; the caller closes its own copy. ``pid`` is known when the guard has told,
        ``exit_status`` when both have ended; ``stopping`` tells whether that was asked for here.
        """
        self.pid: int | None = None
        self.exit_status: int | None = None
        self.stopping = False
        lifetime, self._lifetime = os.pipe()
        self._status, status = os.pipe()
        os.set_blocking(self._status, False)
        self._status_text = b""
        self._reported: int | None = None
        log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUARD), str(grace_s), *command],
                stdin=lifetime,
                stdout=status,
                stderr=log,
                pass_fds=(store_lock,),
                cwd=log_file.parent,
                start_new_session=True,
            )
        except BaseException:
            self._close()
            raise
        finally:
            for descriptor in (lifetime, status, log):
                os.close(descriptor)

    @property
    def guard_pid(self) -> int:
        """Process id of the guard, and process group of both."""
        return self._guard.pid

    async def started(self) -> int | None:
        """Return the server's process id, or None if it ended before it had one."""
        while self.poll() is None and self.pid is None:
            await _readable(self._status)
        return self.pid

    async def ended(self) -> int:
        """Return the server's exit status when it has ended; negative: by that signal."""
        while (status := self.poll()) is None:
            await _readable(self._status)
        return status

    def poll(self) -> int | None:
        """Take note of what the guard said and return the exit status, None while the server runs."""
        if self.exit_status is not None:
            return self.exit_status
        with contextlib.suppress(BlockingIOError):
            while said := os.read(self._status, 4096):
                self._status_text += said
                self._note()
            self._reap()
        return self.exit_status

    def request_stop(self) -> None:
        """Have the guard end the server: SIGTERM, then SIGKILL after the grace. Returns at once."""
        self.stopping = True
        self._close_lifetime()

    def kill(self) -> None:
        """End server and guard now and return when both are gone; safe to call again."""
        self.stopping = True
        if self.exit_status is None:
            # The guard can't miss its own child, and reaps it before it ends itself.
            # Not `Popen.send_signal`: that reaps a guard that is dead, and `_reap` has to come first.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._guard.pid, guard.KILL)
            deadline = time.monotonic() + _GUARD_LIMIT_S
            poller = select.poll()
            poller.register(self._status)
            while self.poll() is None and (left := deadline - time.monotonic()) > 0:
                poller.poll(left * 1000)
        if self.exit_status is None:
            self._reap()

    def abandon(self) -> None:
        """Forget both in a forked child: they belong to the parent."""
        self._close()
        self.exit_status = self._guard.returncode = 0

    def _note(self) -> None:
        *lines, self._status_text = self._status_text.split(b"\n")
        for line in lines:
            what, _, number = line.partition(b" ")
            if what == b"pid":
                self.pid = int(number)
            elif what == b"exit":
                self._reported = int(number)

    def _reap(self) -> None:
        """Take the guard's exit status, having made sure that no server survives a killed guard.

        The group is killed before the guard is reaped: until then nobody else can have its number.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._guard.pid, signal.SIGKILL)
        try:
            status = self._guard.wait(_REAP_LIMIT_S)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL  # stuck in the kernel; the store's lock tells when it is gone
        self._close()
        self.exit_status = status if self._reported is None else self._reported

    def _close(self) -> None:
        self._close_lifetime()
        if self._status >= 0:
            os.close(self._status)
            self._status = -1

    def _close_lifetime(self) -> None:
        if self._lifetime >= 0:
            os.close(self._lifetime)
            self._lifetime = -1


async def _readable(descriptor: int) -> None:
    """Wait until there is something to read, or nothing any more. Any number of callers may."""
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()
    # A descriptor of its own: a loop has one reader for each, and the owner may close this one meanwhile.
    own = os.dup(descriptor)
    loop.add_reader(own, woken.set)
    try:
        await woken.wait()
    finally:
        loop.remove_reader(own)
        os.close(own)
