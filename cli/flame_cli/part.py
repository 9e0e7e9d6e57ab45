"""One process of a cluster that runs in a terminal."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from flame_cli.errors import CommandFailed

if TYPE_CHECKING:
    import psutil

_TAIL_BYTES: Final = 16 * 1024
_TAIL_LINES: Final = 15
_KILLED_LIMIT_S: Final = 5.0


class Part:
    """A Python program that is started, watched and ended.

    It runs in a session of its own, so that a terminal's Ctrl-C does not reach it, and inherits the read end of
    the lifetime pipe, so that it stops when this process is gone.
    """

    def __init__(self, name: str, module: str, arguments: Sequence[str], log: Path | None) -> None:
        """Say what to run; nothing is started before `start`.

        Args:
            name: How to call it in messages.
            module: The Python module to run.
            arguments: Its command line.
            log: Where its output goes; that of the run before is kept beside it. ``None``: standard error.
        """
        self.name = name
        self.log = log
        self._module = module
        self._arguments = list(arguments)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, lifetime_fd: int) -> None:
        """Start the process."""
        # -P: a folder called flame where the user happens to be must not hide the package.
        command = [
            sys.executable,
            "-P",
            "-m",
            self._module,
            *self._arguments,
            "--lifetime-fd",
            str(lifetime_fd),
        ]
        output = self._open_log()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(lifetime_fd,),
                start_new_session=True,
            )
        except OSError as error:
            raise CommandFailed(f"can't start the {self.name}: {error}") from None
        finally:
            if output is not sys.stderr:
                output.close()

    async def ended(self) -> int:
        """Return its exit status when it has ended; negative: by that signal."""
        if self._process is None:
            raise RuntimeError(f"the {self.name} was not started")
        return await self._process.wait()

    async def stop(self, limit_s: float) -> None:
        """End it: SIGTERM, and after ``limit_s`` SIGKILL. Safe before `start`, and again."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(limit_s):
                await process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """End it and everything that it started, at once. Safe before `start`, and again."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        descendants = _descendants(process.pid)
        with suppress(ProcessLookupError):
            process.kill()
        for descendant in descendants:
            with suppress(Exception):  # it has ended, which is what is wanted
                descendant.kill()
        with suppress(TimeoutError):
            async with asyncio.timeout(_KILLED_LIMIT_S):
                await process.wait()

    def tail(self) -> str:
        """Return the last lines of its log; empty if there are none."""
        if self.log is None:
            return ""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:])
        return ""

    def failure(self, what: str) -> CommandFailed:
        """Return the error that this part is the reason of, with the end of its log."""
        if self.log is None:
            return CommandFailed(f"the {self.name} {what}, see its log above")
        return CommandFailed(f"the {self.name} {what}, see {self.log}", self.tail())

    def _open_log(self) -> IO[bytes] | IO[str]:
        if self.log is None:
            return sys.stderr
        try:
            if self.log.exists():
                self.log.replace(self.log.with_name(f"{self.log.name}.1"))
            return self.log.open("wb")
        except OSError as error:
            raise CommandFailed(f"can't write {self.log}: {error.strerror}") from None


def _descendants(pid: int) -> list[psutil.Process]:
    import psutil

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
