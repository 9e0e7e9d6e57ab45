"""What belongs to one event loop, used in another one: all that a client has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import flame
from tests.support.cluster import Cluster

Act = Callable[[flame.Connection, flame.Session], Awaitable[Any]]
Prepare = Callable[[flame.Connection, flame.Session], Awaitable[Callable[[], Awaitable[Any]]]]

LATER = flame.TaskOptions(delay_s=60)
"""A task that does not end in a test."""


async def begun(items: AsyncIterator[Any]) -> Callable[[], Awaitable[Any]]:
    """Take one item here; the next is to be taken elsewhere."""
    await anext(items)
    return lambda: drain(items)


async def drain(items: AsyncIterator[Any]) -> None:
    async for _ in items:
        pass


async def awaited(handle: flame.TaskHandle) -> flame.Task:
    return await handle


async def handle_of(session: flame.Session) -> flame.TaskHandle:
    return await session.create_task(b"x", options=LATER)


async def awaiting_of(session: flame.Session) -> Callable[[], Awaitable[Any]]:
    handle = await handle_of(session)
    return lambda: awaited(handle)


async def cancelling_of(session: flame.Session) -> Callable[[], Awaitable[Any]]:
    handle = await handle_of(session)
    return handle.cancel


async def streaming_of(session: flame.Session) -> Callable[[], Awaitable[Any]]:
    handle = await handle_of(session)
    return lambda: drain(handle.stream())


async def begun_stream(session: flame.Session) -> Callable[[], Awaitable[Any]]:
    """Listen here to what a task emits, and be left there waiting."""
    stream = session.stream(b"x", options=LATER)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.wait([waiting], timeout=0.5)
    waiting.cancel()
    await asyncio.wait([waiting])
    return lambda: drain(stream)


def used(act: Act) -> Prepare:
    """Do the whole of it elsewhere."""

    async def prepare(connection: flame.Connection, session: flame.Session) -> Callable[[], Awaitable[Any]]:
        return lambda: act(connection, session)

    return prepare


USES: dict[str, tuple[Prepare, str]] = {
    "info": (used(lambda c, _: c.info()), "the connection to nats://"),
    "create a session": (used(lambda c, _: c.create_session("flmping")), "the connection to"),
    "open a session": (used(lambda c, s: c.open_session(s.id)), "the connection to"),
    "list sessions": (used(lambda c, _: c.list_sessions()), "the connection to"),
    "logs": (used(lambda c, s: drain(c.read_logs(session=s.id))), "the connection to"),
    "events": (used(lambda c, _: drain(c.events())), "the iterator over events of nats://"),
    "events of a block": (used(lambda c, _: c.events().__aenter__()), "the iterator over events"),
    "close the connection": (used(lambda c, _: c.close()), "the connection to"),
    "invoke": (used(lambda _, s: s.invoke(b"x")), "the connection to"),
    "create a task": (used(lambda _, s: s.create_task(b"x")), "the connection to"),
    "create tasks": (used(lambda _, s: s.create_tasks([b"x"])), "the connection to"),
    "create a keyed task": (used(lambda _, s: s.create_task(b"x", key="k")), "the connection to"),
    "a typed task": (used(lambda _, s: s.typed(int, int).invoke(1)), "the connection to"),
    "get a task": (used(lambda _, s: s.get_task("t")), "the connection to"),
    "list tasks": (used(lambda _, s: s.list_tasks()), "the connection to"),
    "cancel tasks": (used(lambda _, s: s.cancel_tasks(["t"])), "the connection to"),
    "update common data": (used(lambda _, s: s.update_common_data(b"x")), "the connection to"),
    "close": (used(lambda _, s: s.close()), "the connection to"),
    "map": (used(lambda _, s: drain(s.map([b"x"]))), "the connection to"),
    "stream": (used(lambda _, s: drain(s.stream(b"x"))), "the connection to"),
    "watch": (used(lambda _, s: drain(s.watch())), "the watch of session flmping-"),
    "go on with a map": (lambda _, s: begun(s.map([b"x", b"y"], in_flight=1)), "the connection to"),
    "wait for a map": (
        lambda _, s: begun(s.map([b"x"] * 2000, options=None, ordered=False, in_flight=2)),
        "the (iterator of a map|connection to)",
    ),
    "go on with a watch": (lambda _, s: begun(s.watch()), "the watch of session flmping-"),
    "await a handle": (lambda _, s: awaiting_of(s), "the handle of task "),
    "cancel a handle": (lambda _, s: cancelling_of(s), "the connection to"),
    "stream of a handle": (lambda _, s: streaming_of(s), "the stream of task "),
    "go on with a stream": (lambda _, s: begun_stream(s), "the stream of task "),
}
"""How each is prepared in its own loop, which returns what to do in the other; and what the error names."""


def in_another_loop(prepare: Prepare) -> Callable[[flame.Connection, Cluster], Awaitable[None]]:
    """Use something in the event loop of another thread."""

    async def act(connection: flame.Connection, cluster: Cluster) -> None:
        session = await connection.create_session("flmping")
        try:
            use = await prepare(connection, session)

            async def there() -> None:
                await use()

            await asyncio.to_thread(asyncio.run, there())
        finally:
            assert (await connection.info()).nodes == 1, "it goes on where it belongs"
            await session.close("force")

    return act
