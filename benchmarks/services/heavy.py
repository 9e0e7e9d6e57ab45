"""Imports what the variable BENCHMARK_IMPORT names, as agents do, and otherwise returns what it gets."""

from __future__ import annotations

import asyncio
import importlib
import os

import flame

for _name in os.environ["BENCHMARK_IMPORT"].split(","):
    importlib.import_module(_name)


class Heavy(flame.FlameService):
    """Echoes."""

    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        """Return the input."""
        return context.input


if __name__ == "__main__":
    asyncio.run(flame.run(Heavy()))
