"""Returns what it gets: a task that does nothing."""

from __future__ import annotations

import asyncio

import flame


class Echo(flame.FlameService):
    """Echoes."""

    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        """Return the input."""
        return context.input


if __name__ == "__main__":
    asyncio.run(flame.run(Echo()))
