"""Waiting for several things at once, with nothing left running afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from flame.cancel import end_tasks


async def first_of(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Run all until the first of them ends, raising what it raised; the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _end(tasks)
    for task in done:
        task.result()


async def all_of(coroutines: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Run all to their ends; the first that raises cancels the others, and its exception is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    await end_tasks(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # whoever waited got the first one: no warning for the rest
