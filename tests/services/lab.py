"""A service that does what its input says: a JSON list of a verb and its arguments."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import flame


class Lab(flame.FlameService):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.context: flame.SessionContext | None = None

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        self.context = context
        self.seen.append(context.session_id)
        if context.common_data.startswith(b"{"):
            plan = json.loads(context.common_data)
            if "enter_fails" in plan:
                counter = Path(plan["enter_fails"])
                tried = int(counter.read_text()) if counter.exists() else 0
                counter.write_text(str(tried + 1))
                if tried < plan["times"]:
                    raise RuntimeError(f"not today ({tried + 1})")

    async def on_task_invoke(self, context: flame.TaskContext) -> flame.TaskOutput | bytes | str | None:
        assert self.context is not None
        verb, *arguments = json.loads(context.input)
        self.seen.append(context.task_id)
        output: flame.TaskOutput | bytes | str | None = await getattr(self, f"do_{verb}")(context, *arguments)
        return output

    async def do_echo(self, context: flame.TaskContext, value: Any) -> str:
        return json.dumps(value)

    async def do_who(self, context: flame.TaskContext) -> str:
        assert self.context is not None
        started = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
        return json.dumps(
            {
                "pid": os.getpid(),
                "started": started,
                "session": self.context.session_id,
                "common_data": self.context.common_data.decode(errors="replace"),
                "seen": self.seen,
            }
        )

    async def do_sleep(self, context: flame.TaskContext, seconds: float, mark: str = "") -> str:
        if mark:
            with Path(mark).open("a") as file:
                file.write(f"{os.getpid()} {context.task_id}\n")
        await asyncio.sleep(seconds)
        return str(os.getpid())

    async def do_block(self, context: flame.TaskContext, seconds: float, mark: str = "") -> str:
        if mark:
            with Path(mark).open("a") as file:
                file.write(f"{os.getpid()} {context.task_id}\n")
        time.sleep(seconds)
        return str(os.getpid())

    async def do_block_once(self, context: flame.TaskContext, seconds: float, mark: str) -> str:
        """Block where this is the first process that does it."""
        if not Path(mark).exists():
            Path(mark).touch()
            time.sleep(seconds)
        return str(os.getpid())

    async def do_fail(self, context: flame.TaskContext, text: str) -> None:
        raise ValueError(text)

    async def do_try(self, context: flame.TaskContext, mark: str, *outcomes: str) -> str:
        """Do what is said for this call: ``raise``, ``exit``, ``sleep``, or return which attempt it is."""
        with Path(mark).open("a") as file:
            file.write(f"{context.attempt} {time.time()}\n")
        outcome = [*outcomes, "return"][min(len(Path(mark).read_text().splitlines()) - 1, len(outcomes))]
        if outcome == "raise":
            raise ValueError("not yet")
        if outcome == "exit":
            os._exit(1)
        if outcome == "sleep":
            await asyncio.sleep(600)
        return str(context.attempt)

    async def do_exit(self, context: flame.TaskContext, status: int) -> None:
        os._exit(status)

    async def do_large(self, context: flame.TaskContext, size: int) -> bytes:
        return bytes(size)

    async def do_wrong(self, context: flame.TaskContext) -> Any:
        return 42

    async def do_print(self, context: flame.TaskContext, text: str) -> None:
        print(text)
        print(text, file=sys.stderr)


if __name__ == "__main__":
    asyncio.run(flame.run(Lab()))
