"""A service that uses what there is, with credentials of its own: it is told of them as of its endpoint."""

import asyncio
import json
import os
from typing import Any

import flame


class Guarded(flame.FlameService):
    def on_session_enter(self, context: flame.SessionContext) -> None:
        self.common = context.common_data

    def on_common_data_update(self, context: flame.SessionContext) -> None:
        self.common = context.common_data

    async def on_task_invoke(self, context: flame.TaskContext) -> Any:
        verb, *arguments = json.loads(context.input)
        return await getattr(self, verb)(context, *arguments)

    async def emit(self, context: flame.TaskContext, *chunks: str) -> str:
        for done, chunk in enumerate(chunks, 1):
            await context.emit(chunk)
            context.progress(done, len(chunks))
        await asyncio.sleep(0.3)  # progress is told at intervals
        return "emitted"

    async def remember(self, context: flame.TaskContext, key: str, value: str) -> str:
        before = await context.state.get(key)
        await context.state.put(key, value)
        await context.state.put("other", 1)
        await context.state.delete("other")
        return json.dumps([before, (await context.state.entry(key)).value, await context.state.keys()])

    async def common_data(self, context: flame.TaskContext) -> bytes:
        return self.common

    async def again(self, context: flame.TaskContext) -> str:
        if context.attempt == 1:
            raise ValueError("not yet")
        return f"attempt {context.attempt}"

    async def sleep(self, context: flame.TaskContext) -> None:
        await asyncio.sleep(600)


if __name__ == "__main__":
    os.environ["FLAME_ENDPOINT"] = os.environ["GUARDED_ENDPOINT"]
    os.environ.pop("FLAME_TEMPLATE", None)  # a template's executors are told the manager's endpoint
    asyncio.run(flame.run(Guarded()))
