"""Blocks its event loop for as many seconds as the input says, as careless code does."""

from __future__ import annotations

import asyncio
import time

import flame


class Blocking(flame.FlameService):
    """Sleeps without giving the loop back."""

    async def on_task_invoke(self, context: flame.TaskContext) -> None:
        """Sleep."""
        time.sleep(float(context.input))  # noqa: ASYNC251  # it is what is measured


if __name__ == "__main__":
    asyncio.run(flame.run(Blocking()))
