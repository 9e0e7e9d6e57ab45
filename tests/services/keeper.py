"""A service with a memory: what its session was given, what it has heard of, and what it keeps for its session."""

import asyncio
import json
import os
import time
from typing import Any

import flame


class Keeper(flame.FlameService):
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.context: flame.SessionContext | None = None

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        self.context = context
        if "enter" in context.credentials:
            raise RuntimeError(f"refused with {context.credentials['enter'].reveal()}")

    async def on_common_data_update(self, context: flame.SessionContext) -> None:
        self.heard.append(context.common_data.decode())
        if context.common_data == b"refuse":
            raise RuntimeError("not with me")

    async def on_task_invoke(self, context: flame.TaskContext) -> str:
        verb, *arguments = json.loads(context.input)
        return json.dumps(await getattr(self, f"do_{verb}")(context, *arguments))

    async def do_common(self, context: flame.TaskContext) -> Any:
        assert self.context is not None
        return [self.context.common_data_version, self.context.common_data.decode(), self.heard, os.getpid()]

    async def do_sleep(self, context: flame.TaskContext, seconds: float) -> Any:
        await asyncio.sleep(seconds)
        return await self.do_common(context)

    async def do_block(self, context: flame.TaskContext, seconds: float) -> Any:
        time.sleep(seconds)
        return await self.do_common(context)

    async def do_get(self, context: flame.TaskContext, key: str) -> Any:
        value = await context.state.get(key, "nothing")
        return value if not isinstance(value, bytes) else value.decode()

    async def do_put(self, context: flame.TaskContext, key: str, value: Any, expected: int | None = None) -> int:
        return await context.state.put(key, value, expected=expected)

    async def do_put_bytes(self, context: flame.TaskContext, key: str, size: int) -> int:
        return await context.state.put(key, b"x" * size)

    async def do_put_strange(self, context: flame.TaskContext) -> int:
        return await context.state.put("strange", {1, 2})

    async def do_delete(self, context: flame.TaskContext, key: str) -> None:
        await context.state.delete(key)

    async def do_keys(self, context: flame.TaskContext, prefix: str = "") -> list[str]:
        return await context.state.keys(prefix)

    async def do_add(self, context: flame.TaskContext, key: str) -> int:
        """Count by compare-and-set, however many do so at once."""
        while True:
            entry = await context.state.entry(key)
            try:
                await context.state.put(key, (entry.value or 0) + 1, expected=entry.revision)
            except flame.StaleVersion:
                continue
            return int(entry.value or 0) + 1

    async def do_in_thread(self, context: flame.TaskContext) -> Any:
        state = context.state.sync

        def use() -> Any:
            state.put("from a thread", [1, None, "ü"])
            return state.get("from a thread"), state.keys()

        try:
            state.get("from the loop")
        except flame.WrongThread:
            return await asyncio.to_thread(use)
        raise AssertionError("state.sync works in the loop")

    async def do_secrets(self, context: flame.TaskContext) -> Any:
        """Tell how long the secrets are: that they came, and not what they are."""
        assert self.context is not None
        groups = (self.context.credentials, self.context.delegations, context.credentials, context.delegations)
        return [{name: len(secret.reveal()) for name, secret in group.items()} for group in groups]

    async def do_show(self, context: flame.TaskContext) -> Any:
        assert self.context is not None
        return f"{self.context} {context} {dict(self.context.credentials)} {context.credentials!s}"

    async def do_leak(self, context: flame.TaskContext) -> None:
        """Raise with every secret in the message, in what caused it, and in the details."""
        assert self.context is not None
        groups = (self.context.credentials, self.context.delegations, context.credentials, context.delegations)
        texts = [secret.reveal() for group in groups for secret in group.values()]
        try:
            raise ValueError(f"first {texts}")
        except ValueError as first:
            error = RuntimeError(" and ".join(texts))
            error.details = "\n".join(texts).encode()  # type: ignore[attr-defined]
            raise error from first

    async def do_print(self, context: flame.TaskContext) -> None:
        assert self.context is not None
        for secret in self.context.credentials.values():
            print(f"printed {secret.reveal()}")

    async def do_wait(self, context: flame.TaskContext, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return os.getpid()

    async def do_exit(self, context: flame.TaskContext) -> None:
        os._exit(1)


if __name__ == "__main__":
    asyncio.run(flame.run(Keeper()))
