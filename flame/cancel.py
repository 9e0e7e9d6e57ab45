"""Ending asyncio tasks for certain.

A single ``task.cancel()`` can get lost: on Python 3.11 `asyncio.wait_for` returns normally when its result arrives
together with the cancellation, and nats-py swallows a cancellation that hits it while it flushes. So whoever must know
that a task has ended asks until it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

_AGAIN_S: Final = 0.05


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks, but not the one that calls, and return when all have ended.

    What they raised is theirs: look at them if it matters.
    """
    living = {task for task in tasks if not task.done() and task is not asyncio.current_task()}
    while living:
        for task in living:
            task.cancel()
        _, living = await asyncio.wait(living, timeout=_AGAIN_S)


async def end_task(task: asyncio.Task[Any] | None) -> None:
    """Cancel one task, if there is one, and return when it has ended."""
    if task is not None:
        await end_tasks((task,))
