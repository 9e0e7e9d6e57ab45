"""Running a task for each of many inputs, with no more under way than wanted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from functools import partial

from flame.client.task import TaskHandle


async def finished(
    submit: Callable[[bytes | str], Awaitable[TaskHandle]],
    inputs: Iterable[bytes | str] | AsyncIterable[bytes | str],
    in_flight: int,
    *,
    ordered: bool,
) -> AsyncIterator[TaskHandle]:
    """Submit inputs and yield handles: the oldest one's turn, or one that has ended."""
    source = _each(inputs)
    waiting: deque[TaskHandle] = deque()
    ended: asyncio.Queue[TaskHandle] = asyncio.Queue()
    more = True
    outstanding = 0
    while more or outstanding:
        while more and outstanding < in_flight:
            try:
                handle = await submit(await anext(source))
            except StopAsyncIteration:
                more = False
                break
            outstanding += 1
            if ordered:
                waiting.append(handle)
            else:
                handle.future.add_done_callback(partial(_put, ended, handle))
        if outstanding:
            yield waiting.popleft() if ordered else await ended.get()
            outstanding -= 1


def _put(ended: asyncio.Queue[TaskHandle], handle: TaskHandle, _: object) -> None:
    ended.put_nowait(handle)


async def _each(inputs: Iterable[bytes | str] | AsyncIterable[bytes | str]) -> AsyncIterator[bytes | str]:
    if isinstance(inputs, AsyncIterable):
        async for data in inputs:
            yield data
    else:
        for data in inputs:
            yield data
