"""A service that emits as its input says: a JSON list of a verb and its arguments."""

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any

import flame


class Streamer(flame.FlameService):
    async def on_task_invoke(self, context: flame.TaskContext) -> Any:
        verb, *arguments = json.loads(context.input)
        return await getattr(self, f"do_{verb}")(context, *arguments)

    async def do_count(self, context: flame.TaskContext, count: int, pause_s: float = 0.0, size: int = 0) -> str:
        for number in range(count):
            await context.emit(f"{number}".ljust(size))
            if pause_s:
                await asyncio.sleep(pause_s)
        return f"counted {count}"

    async def do_try(self, context: flame.TaskContext, mark: str, *runs: list[Any]) -> str:
        """In each run emit so many chunks, then ``raise``, ``exit``, ``sleep`` or return."""
        with Path(mark).open("a") as file:
            file.write("run\n")
        count, outcome = runs[min(len(Path(mark).read_text().splitlines()), len(runs)) - 1]
        for number in range(count):
            await context.emit(f"{context.attempt}.{number}")
        if outcome == "raise":
            raise ValueError("not yet")
        if outcome == "exit":
            await asyncio.sleep(0.2)  # what it has emitted is stored
            os._exit(1)
        if outcome == "sleep":
            await asyncio.sleep(600)
        return f"attempt {context.attempt}"

    async def do_thread(self, context: flame.TaskContext, count: int) -> str:
        def emit() -> None:
            for number in range(count):
                context.emit(str(number))

        await asyncio.to_thread(emit)
        return "done"

    async def do_emit(self, context: flame.TaskContext, what: str) -> None:
        await context.emit({"number": 42, "large": b"x" * 262_144, "largest": b"x" * 262_016}[what])  # type: ignore[arg-type]

    async def do_late(self, context: flame.TaskContext, mark: str) -> None:
        async def late() -> None:
            await asyncio.sleep(0.1)
            try:
                await context.emit("too late")
            except flame.TaskEnded as error:
                Path(mark).write_text(str(error))

        self.late = asyncio.create_task(late())

    async def do_progress(self, context: flame.TaskContext, steps: int, pause_s: float) -> None:
        for step in range(steps + 1):
            context.progress(step, steps, f"step {step}")
            await asyncio.sleep(pause_s)

    async def do_wrong_progress(self, context: flame.TaskContext, *arguments: Any) -> None:
        context.progress(*arguments)


class Generating(flame.FlameService):
    """A generator that is not ``async``, as its input says: how many chunks, and what then."""

    def on_task_invoke(self, context: flame.TaskContext) -> Generator[str, None, str]:
        count, outcome = json.loads(context.input)
        for number in range(count):
            yield str(number)
            if outcome == "slow":
                context.progress(number, count)
                time.sleep(0.02)
        if outcome == "raise":
            raise ValueError("half-way")
        return "returned"


class GeneratingAsync(flame.FlameService):
    """The same, ``async``."""

    async def on_task_invoke(self, context: flame.TaskContext) -> AsyncGenerator[str, None]:
        count, outcome = json.loads(context.input)
        for number in range(count):
            yield str(number)
            if outcome == "slow":
                await asyncio.sleep(0.02)
        if outcome == "raise":
            raise ValueError("half-way")


KINDS = {"streamer": Streamer, "generating": Generating, "generating_async": GeneratingAsync}

if __name__ == "__main__":
    asyncio.run(flame.run(KINDS[os.environ.get("KIND", "streamer")]()))
