"""Services that yield: what ``on_task_invoke`` yields is emitted."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, closing
from functools import wraps
from typing import Any

from flame.service.contexts import TaskContext


def emitting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return what emits what a generator function yields; any other function as it is."""
    if inspect.isasyncgenfunction(method):
        return _emitting_async(method)
    if inspect.isgeneratorfunction(method):
        return _emitting(method)
    return method


def _emitting_async(
    method: Callable[[TaskContext], AsyncGenerator[Any, None]],
) -> Callable[[TaskContext], Awaitable[None]]:
    @wraps(method)
    async def invoke(context: TaskContext) -> None:
        async with aclosing(method(context)) as chunks:
            async for chunk in chunks:
                await context.emit(chunk)

    return invoke


def _emitting(method: Callable[[TaskContext], Generator[Any, None, Any]]) -> Callable[[TaskContext], Any]:
    @wraps(method)
    def invoke(context: TaskContext) -> Any:
        with closing(method(context)) as chunks:
            while not context.cancelled:
                try:
                    chunk = next(chunks)
                except StopIteration as end:
                    return end.value
                context.emit(chunk)
        return None

    return invoke
