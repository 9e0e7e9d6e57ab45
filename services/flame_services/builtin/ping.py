"""``flmping``: echoes its input, for timing a cluster."""

from __future__ import annotations

import asyncio

import flame


class Ping(flame.FlameService):
    """Returns what it gets."""

    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        """Echo."""
        return context.input


def main() -> None:
    """Run the service; an executor manager starts it."""
    asyncio.run(flame.run(Ping()))


if __name__ == "__main__":
    main()
