"""A process that somebody has started by hand, as a node of a cluster.

A debugger stops the whole process, for minutes. So what must go on meanwhile, heartbeats and the leases of tasks, is
done by an executor manager of its own, which is started here as a child. Neither needs the other to end: each notices
by a pair of sockets (`flame.protocol.attaching`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from flame.config import ENDPOINT_VARIABLE, Target
from flame.errors import ConfigurationError, Unavailable
from flame.protocol.attaching import ATTACHED, END, GONE, LEAVE, READY
from flame.protocol.subjects import to_token

MANAGER: Final = "flame_services.executor_manager.attaching"
READY_S: Final = 30.0
"""How long the manager may take to be a node of the cluster."""
END_S: Final = 25.0
"""How long it may take to end: it goes on for some seconds without a broker."""
_HOST_MOST: Final = 40
_LOOK_S: Final = 0.01
_READ: Final = 64
_TOLD_LINES: Final = 3


class Attachment:
    """The manager of this process, from `start` to `close`."""

    def __init__(self, target: Target, application: str) -> None:
        """Plan to be a node of a cluster for one application; nothing is touched."""
        self.node: Final = (
            f"{ATTACHED}-{to_token(socket.gethostname())[:_HOST_MOST]}-{os.getpid()}-{secrets.token_hex(3)}"
        )
        self.executor: Final = f"w{secrets.token_hex(6)}"
        """What this process reports as until it has a session."""
        self.lost: Final[asyncio.Future[None]] = asyncio.get_running_loop().create_future()
        """Done when the manager has ended."""
        self._target: Final = target
        self._application: Final = application
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Future[None] = self._loop.create_future()
        """Done when the manager has said anything, or has ended."""
        self._ready = False
        self._must_end = False
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    # ---- its beginning

    async def start(self) -> None:
        """Start the manager, and return when it answers this process's reports.

        Raises `ConfigurationError` if it is not installed or refuses, `Unavailable` if it ends, or is not ready in
        time.
        """
        if importlib.util.find_spec("flame_services") is None:
            raise ConfigurationError(
                "flame.run: attaching a process needs the programs of Flame in the same environment:"
                " pip install 'flame-engine[server]'"
            )
        self._folder = Path(tempfile.mkdtemp(prefix="flame-attached-"))
        self._channel, other = socket.socketpair()
        with other:
            self._channel.setblocking(False)
            self._loop.add_reader(self._channel, self._hear)
            self._process = self._start_manager(self._folder, other.fileno())
        await asyncio.wait([self._heard], timeout=READY_S)
        if self.lost.done():
            raise await self.explain_loss()
        if not self._ready:
            raise Unavailable(
                f"flame.run: process {self._process.pid}, which is to look after this one, was not ready within"
                f" {READY_S:g} s{self._last_words()}"
            )

    def _start_manager(self, folder: Path, channel: int) -> subprocess.Popen[bytes]:
        settings = {
            "node": self.node,
            "work-dir": str(folder),
            "application": self._application,
            "executor": self.executor,
            "pid": str(os.getpid()),
            "channel-fd": str(channel),
        }
        # Debuggers that follow the Python processes which a process starts don't recognize one that is started by env.
        through = filter(None, (shutil.which("env"),))
        python = (sys.executable, "-P", "-m", MANAGER)  # what lies in this folder is the service's
        with (folder / "manager.log").open("ab") as log:
            return subprocess.Popen(
                [*through, *python, *(text for name, value in settings.items() for text in (f"--{name}", value))],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(channel,),
                start_new_session=True,  # Ctrl-C in the terminal is for this process alone
            )

    def _environment(self) -> dict[str, str]:
        """Return this process's own, without what Flame would take for the manager's settings."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        return {**kept, ENDPOINT_VARIABLE: self._target.endpoint, **self._target.security.to_environment()}

    # ---- what is said

    def leave(self) -> None:
        """Say that this process wants to leave: the manager tells its executor so, and to its end if it must."""
        self._say(LEAVE)

    def let_go(self) -> None:
        """Say that this process serves nothing any more: the manager ends."""
        self._say(GONE)

    def must_end(self) -> bool:
        """Whether the manager says that this process has to end. May be asked at any moment, also by a signal."""
        if not self._must_end and self._channel is not None:
            with contextlib.suppress(OSError):  # nothing was said
                self._must_end = END in self._channel.recv(_READ, socket.MSG_PEEK)
        return self._must_end

    def _say(self, word: bytes) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):  # it has ended, which is noticed
                self._channel.send(word)

    def _hear(self) -> None:
        assert self._channel is not None
        try:
            words = self._channel.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        if not self._heard.done():
            self._heard.set_result(None)
        self._ready = self._ready or READY in words
        self._must_end = self._must_end or END in words
        if not words:
            self._loop.remove_reader(self._channel)
            if not self.lost.done():
                self.lost.set_result(None)

    # ---- its end

    async def explain_loss(self) -> ConfigurationError | Unavailable:
        """Return what to raise for a manager that has ended before this process did."""
        assert self._process is not None
        status = await self._exited()
        kind = Unavailable if self._ready else ConfigurationError
        return kind(
            f"flame.run: process {self._process.pid}, which looked after this one in the cluster, has ended"
            f" (status {status}); tasks that ran here are run elsewhere{self._last_words()}"
        )

    async def close(self) -> None:
        """Say that this process serves nothing any more, and return when the manager has ended. Safe at any time."""
        try:
            if self._process is not None:
                self.let_go()
                await asyncio.wait([self.lost], timeout=END_S)
                await self._exited()
        finally:
            if self._channel is not None:
                self._loop.remove_reader(self._channel)
                self._channel.close()
                self._channel = None
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    async def _exited(self) -> int | None:
        """Return the manager's status once it has ended, which takes a moment when it has closed its socket."""
        assert self._process is not None
        deadline = self._loop.time() + 1.0
        while self._process.poll() is None and self._loop.time() < deadline:  # noqa: ASYNC110 (no loop tells of children alike)
            await asyncio.sleep(_LOOK_S)
        return self._process.returncode

    def _last_words(self) -> str:
        if self._folder is None:
            return ""
        with contextlib.suppress(OSError):
            lines = (self._folder / "manager.log").read_text(errors="replace").splitlines()[-_TOLD_LINES:]
            return "".join(f"\n  {line}" for line in lines)
        return ""
