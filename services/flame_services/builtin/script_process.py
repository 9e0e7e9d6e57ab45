"""Running one script as a process with a group, a folder and limits of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

from flame.scripts import NOTE, RESULT_BYTES, Script, ScriptResult

KEPT_BYTES: Final = (RESULT_BYTES - 1024) // 2
"""Of each stream; of more, the beginning and the end."""
REST_S: Final = 1.0
"""How long the output of an ended script is waited for: what left its group may hold it open for ever."""
_OWN_VARIABLES: Final = "FLAME_"
_GUARD: Final = ("/bin/sh", "-c", "read _; kill -KILL -$$")
"""Leads the script's group, and ends it when this process does, however that happens: then its input ends.

It names the group by its own number: a shell that leads no group must not end the one that it is in.
"""


class Collector(asyncio.Protocol):
    """Keeps the beginning and the end of what comes out of a pipe."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._dropped = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """Keep a piece, or its part."""
        room = KEPT_BYTES // 2 - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if not data:
            return
        self._tail.append(data)
        self._tail_bytes += len(data)
        while self._tail_bytes - len(self._tail[0]) >= KEPT_BYTES // 2:
            gone = self._tail.popleft()
            self._tail_bytes -= len(gone)
            self._dropped += len(gone)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Note the end."""
        if not self.ended.done():
            self.ended.set_result(None)

    def result(self) -> tuple[bytes, int]:
        """Return what was kept, with `NOTE` where something is missing, and how much that is."""
        tail = b"".join(self._tail)
        surplus = max(0, len(tail) - KEPT_BYTES // 2) if self._dropped else 0
        dropped = self._dropped + surplus
        if not dropped:
            return bytes(self._head) + tail, 0
        return bytes(self._head) + NOTE + tail[surplus:], dropped


async def run_script(script: Script) -> ScriptResult:
    """Run a script to its end, or to that of its time; nothing of its group is alive afterwards."""
    with tempfile.TemporaryDirectory(prefix="script-", dir=Path.cwd(), ignore_cleanup_errors=True) as name:
        return await _run(script, Path(name))


async def _run(script: Script, folder: Path) -> ScriptResult:
    loop = asyncio.get_running_loop()
    work = folder / "work"
    work.mkdir()
    command = _write(script, folder)
    lifeline_end, lifeline = os.pipe()
    with os.fdopen(lifeline, "wb"), os.fdopen(lifeline_end, "rb") as end:
        guard = _start(_GUARD, stdin=end, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0, env={})
        waiting: asyncio.Future[int] | None = None
        transports: list[asyncio.BaseTransport] = []
        try:
            outputs = [await _collect(transports) for _ in range(2)]
            with (folder / "input").open("rb") as stdin, outputs[0][1] as stdout, outputs[1][1] as stderr:
                process = _start(
                    command,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    cwd=work,
                    env=_environment(work),
                    process_group=guard.pid,
                )
            waiting = loop.run_in_executor(None, process.wait)
            timed_out = not (await asyncio.wait([waiting], timeout=script.timeout_s))[0]
        finally:
            # The group has its number as long as its leader is not reaped.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(guard.pid, signal.SIGKILL)
            guard.wait()
            if waiting is not None:
                await asyncio.wait([waiting])
                await asyncio.wait([collector.ended for collector, _ in outputs], timeout=REST_S)
            for transport in transports:
                transport.close()
        (stdout_bytes, cut_out), (stderr_bytes, cut_err) = (collector.result() for collector, _ in outputs)
        return ScriptResult(
            status=waiting.result(),
            stdout=stdout_bytes,
            stderr=stderr_bytes,
            cut=cut_out + cut_err,
            timed_out=timed_out,
        )


def _start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process: that blocks for a millisecond, and asyncio's own way would wait for the end of its pipes."""
    return subprocess.Popen(command, **options)


def _write(script: Script, folder: Path) -> list[str]:
    """Write a script and its input down, and return the command that runs it in the folder beside them."""
    file, interpreter = ("script.py", sys.executable) if script.language == "python" else ("script.sh", "/bin/sh")
    (folder / file).write_bytes(script.code.encode("utf-8", "surrogatepass"))
    (folder / "input").write_bytes(script.input)
    return [interpreter, f"../{file}"]


async def _collect(transports: list[asyncio.BaseTransport]) -> tuple[Collector, IO[bytes]]:
    """Return a collector and the end of a pipe that fills it."""
    reading, writing = os.pipe()
    write_end = os.fdopen(writing, "wb")
    transport, collector = await asyncio.get_running_loop().connect_read_pipe(Collector, os.fdopen(reading, "rb"))
    transports.append(transport)
    return collector, write_end


def _environment(folder: Path) -> dict[str, str]:
    """Return what a script finds in its environment: who this executor is to its cluster is none of its business."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OWN_VARIABLES)}
    return {**kept, "PWD": str(folder), "TMPDIR": str(folder)}
