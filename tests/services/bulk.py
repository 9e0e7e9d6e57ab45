"""Takes and gives large values: the first word of an input says what to do.

- ``digest …``: return the SHA-256 of the input.
- ``make N``: return N bytes, those that `made` tells.
- ``zeros N``: return N zeros.
- ``back …``: return the input as it is.
- ``common``: return the SHA-256 of the common data.
- ``die N FILE``: end with the process while N bytes are on their way, but only if FILE is not there yet.
- ``memory``: return the largest memory of the process, in bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import flame


def made(size: int) -> bytes:
    """Return bytes of which no megabyte is like another."""
    block = random.Random(size).randbytes(1_048_573)
    return (block * (size // len(block) + 1))[:size]


def _die_soon(marker: str) -> None:
    """End the process as soon as some of the output may be stored."""
    if Path(marker).exists():
        return
    Path(marker).touch()

    def end() -> None:
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()


class Bulk:
    def __init__(self) -> None:
        self.common = b""

    def on_session_enter(self, context: flame.SessionContext) -> None:
        self.session = context

    def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        verb, *words = context.input[:200].split()
        if verb == b"digest":
            return hashlib.sha256(context.input).digest()
        if verb == b"make":
            return made(int(words[0]))
        if verb == b"zeros":
            return bytes(int(words[0]))
        if verb == b"common":
            return hashlib.sha256(self.session.common_data).digest()
        if verb == b"die":
            _die_soon(words[1].decode())
            return made(int(words[0]))
        if verb == b"memory":
            return b"%d" % (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return context.input


if __name__ == "__main__":
    asyncio.run(flame.run(Bulk()))
