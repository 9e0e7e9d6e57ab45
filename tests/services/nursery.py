"""A service that tells of its process: how it was made, what it shares. MODE says what it does while it is loaded."""

import asyncio
import atexit
import json
import os
import random
import secrets
import socket
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import flame

MODE = os.environ.get("MODE", "")
LOADED_IN = os.getpid()
os.environ["SET_WHILE_LOADING"] = "yes"
kept: list[Any] = []


def note(line: str) -> None:
    with Path(os.environ["NOTES"]).open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {line}\n")


class Nursery(flame.FlameService):
    def __init__(self) -> None:
        self.value = "untouched"
        self.forked_in = 0

    def on_fork(self) -> None:
        self.forked_in = os.getpid()
        if MODE == "fails to renew":
            raise RuntimeError("no new identity")

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        if "NOTES" in os.environ:
            atexit.register(note, "its own exit function")

    async def on_task_invoke(self, context: flame.TaskContext) -> str | None:
        verb, *arguments = json.loads(context.input)
        result: object = getattr(self, f"do_{verb}")(*arguments)
        return None if result is None else json.dumps(result)

    def do_who(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "group": os.getpgrp(),
            "loaded_in": LOADED_IN,
            "forked_in": self.forked_in,
            "folder": str(Path.cwd()),
            "executor": os.environ["FLAME_EXECUTOR"],
            "template": os.environ.get("FLAME_TEMPLATE"),
            "set_while_loading": os.environ.get("SET_WHILE_LOADING"),
            "threads": threading.active_count(),
            "descriptors": len(list(Path("/proc/self/fd").iterdir())),
            "loop": type(asyncio.get_running_loop()).__module__,
        }

    def do_draw(self) -> list[str]:
        drawn = [str(random.random()), secrets.token_hex(8), str(uuid.uuid4()), Path(tempfile.mktemp()).name]
        numpy = sys.modules.get("numpy")
        return [*drawn, str(numpy.random.random())] if numpy is not None else drawn

    def do_set(self, value: str) -> None:
        self.value = value

    def do_get(self) -> str:
        return self.value

    def do_print(self, text: str) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.write(f"{text}\n")

    def do_block(self, seconds: float) -> None:
        time.sleep(seconds)


async def main() -> None:
    if MODE == "runs a task":
        kept.append(asyncio.create_task(asyncio.sleep(3600), name="ticking"))
    await flame.run(Nursery())


if __name__ == "__main__":
    sys.stdout.write("loading\n")
    if MODE == "starts a thread":
        threading.Thread(target=time.sleep, args=(3600,), name="ticker", daemon=True).start()
    if MODE == "listens":
        kept.append(socket.create_server(("127.0.0.1", 0)))
    if MODE == "imports numpy":
        import numpy  # type: ignore[import-not-found]  # noqa: F401
    if MODE == "takes its time":
        time.sleep(1)
    if MODE == "is broken":
        sys.exit("this can't be loaded")
    if "NOTES" in os.environ:
        atexit.register(note, "the template's exit function")
    asyncio.run(main())
