"""The ``Log`` shim: records what it gets on its standard output and echoes it, for trying things out."""

from __future__ import annotations

import asyncio

import flame


class LogService(flame.FlameService):
    """Says what happens to it."""

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        """Record the session."""
        print(f"enter session={context.session_id} common_data={context.common_data[:200]!r}", flush=True)

    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        """Record and echo the task."""
        print(f"invoke task={context.task_id} input={context.input[:200]!r}", flush=True)
        return context.input

    async def on_session_leave(self) -> None:
        """Record the end."""
        print("leave", flush=True)


def main() -> None:
    """Run the service; an executor manager starts it."""
    asyncio.run(flame.run(LogService()))


if __name__ == "__main__":
    main()
