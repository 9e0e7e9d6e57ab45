"""A service that breaks rules.

MODE says what its process does, common data what entering does, an input what a task does. The latter are JSON lists
of a verb and its arguments.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import flame

MODE = os.environ.get("MODE", "")
MEBIBYTE = 1024**2
kept: list[Any] = []


def note(word: str) -> None:
    if "NOTES" in os.environ:
        with Path(os.environ["NOTES"]).open("a", encoding="utf-8") as file:
            file.write(f"{word}\n")


class Rogue(flame.FlameService):
    def __init__(self) -> None:
        if MODE == "has loaded much":
            kept.append(os.urandom(96 * MEBIBYTE))

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        note(f"entered {os.getpid()}")
        if context.common_data:
            verb, *arguments = json.loads(context.common_data)
            await getattr(self, f"do_{verb}")(*arguments)

    async def on_task_invoke(self, context: flame.TaskContext) -> str | None:
        verb, *arguments = json.loads(context.input)
        note(f"ran {verb} {context.attempt}")
        result: object = await getattr(self, f"do_{verb}")(*arguments)
        return None if result is None else json.dumps(result)

    async def on_session_leave(self) -> None:
        note("leaving")
        if MODE == "fails to leave":
            raise RuntimeError("no goodbyes")
        if MODE == "leaves slowly":
            await asyncio.sleep(0.5)
        if MODE == "leaves for ever":
            await asyncio.sleep(600)
        if MODE == "blocks when leaving":
            time.sleep(600)

    async def do_who(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "processors": sorted(os.sched_getaffinity(0)),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "order": os.environ.get("CUDA_DEVICE_ORDER"),
        }

    async def do_echo(self, value: object) -> object:
        return value

    async def do_hog(self, mebibytes: int, seconds: float = 600.0) -> None:
        """Use so much memory, for so long."""
        kept.append(os.urandom(MEBIBYTE) * mebibytes)
        await asyncio.sleep(seconds)

    async def do_hog_in_children(self, mebibytes: int, children: int) -> None:
        """Use so much memory in each of some processes of its own."""
        code = f"import os, time; kept = os.urandom({MEBIBYTE}) * {mebibytes}; time.sleep(600)"
        kept.extend(subprocess.Popen([sys.executable, "-c", code]) for _ in range(children))
        await asyncio.sleep(600)

    async def do_read_what_was_loaded(self) -> int:
        return sum(len(each) for each in kept)

    async def do_sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def do_block(self, seconds: float) -> None:
        time.sleep(seconds)

    async def do_block_soon(self, seconds: float) -> None:
        """Block between tasks."""
        asyncio.get_running_loop().call_later(1.0, time.sleep, seconds)

    async def do_insist(self) -> None:
        """Go on whatever happens."""
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                note("not yet")

    async def do_exit(self, status: int) -> None:
        os._exit(status)

    async def do_exit_soon(self, status: int, after_s: float) -> None:
        """End between tasks, or before there is one."""
        threading.Timer(after_s, os._exit, [status]).start()

    async def do_garbage(self, mebibytes: int) -> None:
        """Write what is no text, and no lines, to both streams."""
        for _ in range(mebibytes):
            for descriptor in (1, 2):
                os.write(descriptor, b"\xff\xfe\x00\x1b[" + os.urandom(MEBIBYTE).replace(b"\n", b"\x80"))

    async def do_fork(self) -> int:
        """Leave a process behind."""
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    async def do_cut_connections(self) -> int:
        """Shut every connection of this process down."""
        cut = 0
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (a descriptor, not a file, is wanted)
            try:
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                        copy.shutdown(socket.SHUT_RDWR)
                        cut += 1
            except OSError:
                continue
        return cut

    async def do_close_everything(self) -> None:
        """Close what is not this service's: its connection among it."""
        os.closerange(3, 1024)


if __name__ == "__main__":
    if MODE == "exits":
        sys.stderr.write("I have better things to do\n")
        sys.exit(0)
    if MODE == "is no service":
        while True:
            time.sleep(600)
    if MODE == "is not ready":
        time.sleep(600)
    if MODE == "is late":
        time.sleep(1.0)
    asyncio.run(flame.run(Rogue()))
