"""Processes that live no longer than this one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_STOP_S: Final = 30.0
_POLL_S: Final = 0.01


class Lifetime:
    """A pipe whose other end children watch: they end themselves when this process is gone, however it went."""

    def __init__(self) -> None:
        """Make it."""
        self.read_end, self._write_end = os.pipe()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have every child that is left end itself."""
        os.close(self._write_end)
        os.close(self.read_end)


class Child:
    """A Python module that runs as a program with ``--lifetime-fd``, in a session of its own.

    A terminal's Ctrl-C does not reach it.
    """

    def __init__(self, module: str, arguments: Sequence[str], lifetime: Lifetime, log: Path) -> None:
        """Say what to run; `start` runs it."""
        self.log = log
        self._command = [sys.executable, "-m", module, *arguments, "--lifetime-fd", str(lifetime.read_end)]
        self._lifetime = lifetime
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, "it was not started"
        return self._process.pid

    async def start(self) -> None:
        """Start the process."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: ASYNC220  # a few milliseconds, and nothing is measured now
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(self._lifetime.read_end,),
                start_new_session=True,
            )

    async def said(self, word: str, limit_s: float) -> None:
        """Return when its output has a word; raise `RuntimeError` if it ends before that, or says nothing for long."""
        deadline = time.monotonic() + limit_s
        while word not in self.log.read_text(errors="replace"):
            self.check()
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._command[2]} did not say {word!r} within {limit_s:g} s")
            await asyncio.sleep(_POLL_S)

    def check(self) -> None:
        """Raise `RuntimeError` with its last words if it has ended."""
        if self._process is not None and self._process.poll() is not None:
            words = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self._command[2]} ended with status {self._process.returncode}:\n{words}")

    async def stop(self) -> None:
        """End it, by force if need be. Safe before `start`, and again."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, _STOP_S)
        finally:
            process.kill()
            process.wait()
