"""Values that are too large for one message: stored and read in parts, a few at once, straight from and into memory.

Clients and services share this. A value is stored on one side of its session, `subjects.IN` or `subjects.OUT`, which
says how long it is kept.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from flame.broker.errors import Duplicate, NotAcknowledged, StreamFull, StreamMissing
from flame.broker.seam import Broker
from flame.cancel import end_tasks
from flame.errors import ApplicationNotFound, QueueFull, Unavailable, ValueGone
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.ids import mint_value_id
from flame.protocol.values import ValueRef, check_size

log = get_logger("flame.values")

ATTEMPT_S: Final = 10.0
"""How long one attempt at storing a part waits for the broker's acknowledgement."""
PAUSE_MAX_S: Final = 2.0
READ_AT_ONCE: Final = 4
"""Values that are read at once over one connection, each with as many parts under way as may be."""

T = TypeVar("T")


async def store_value(
    broker: Broker,
    application: str,
    session: str,
    side: str,
    data: bytes | bytearray | memoryview,
    *,
    ttl_s: float = 0.0,
    digest: bytes = b"",
    task_id: str = "",
) -> ValueRef:
    """Store a value and return what names it, once all of it is stored. Only the parts under way are copied.

    Lost connections and changes of leaders are ridden out, as long as each part is stored within
    `defaults.VALUE_TIMEOUT_S`. What was stored of a value that could not be is removed with the session, or after
    ``ttl_s``.

    Args:
        broker: Where to.
        application: Whose stream takes it.
        session: Whose it is.
        side: `subjects.IN` or `subjects.OUT`.
        data: At least a byte, and at most 1 GiB. It must not change meanwhile.
        ttl_s: It is kept so long, in whole seconds; 0: until it is removed.
        digest: Goes into the reference.
        task_id: Of the task whose input it is: it may go when that has ended.

    Raises:
        PayloadTooLarge: ``data`` is over the limit; nothing was stored.
        BrokerUnavailable: The broker could not be reached for too long.
        QueueFull: The broker has no room for it.
        ApplicationNotFound: The application is not registered.
    """
    view = memoryview(data).cast("B")
    check_size("value", len(view))
    size = defaults.VALUE_PART_BYTES
    ref = ValueRef(id=mint_value_id(task_id), size=len(view), parts=math.ceil(len(view) / size), digest=digest)

    unacknowledged: set[asyncio.Future[int]] = set()

    async def attempt(subject: str, payload: bytes) -> None:
        stored = await broker.begin_store(subject, payload, ATTEMPT_S, ttl_s=ttl_s)
        unacknowledged.add(stored)
        try:
            await stored
        except Duplicate:
            pass  # an earlier attempt has stored it, and its acknowledgement was lost
        finally:
            unacknowledged.discard(stored)

    async def store(part: int) -> None:
        subject = subjects.blob(application, session, side, ref.id, part)
        payload = bytes(view[part * size : (part + 1) * size])
        await _insist(subject, partial(attempt, subject, payload))

    def reconnected() -> None:
        """Try again at once what may have been lost with the connection: to store it twice does no harm."""
        for stored in tuple(unacknowledged):
            if not stored.done():
                stored.set_exception(NotAcknowledged("the connection was lost meanwhile; it may have been stored"))

    forget = broker.on_reconnect(reconnected)
    try:
        await _in_turn(ref.parts, store, lambda _: None)
    except StreamFull as error:
        raise QueueFull(f"the broker has no room for a value of {ref.size:,} bytes: {error}") from error
    except StreamMissing as error:
        raise _unregistered(application) from error
    finally:
        forget()
    return ref


async def load_value(broker: Broker, application: str, session: str, side: str, ref: ValueRef) -> bytes:
    """Return a stored value. It is in memory once, besides the parts under way.

    Lost connections and changes of leaders are ridden out, as long as each part is read within
    `defaults.VALUE_TIMEOUT_S`. Raises `ValueGone` if not all of it is there, or no longer, `BrokerUnavailable`, and
    `ApplicationNotFound`.
    """
    stream = subjects.blob_stream(application)
    what = f"a value of session {session} ({ref.size:,} bytes, {side}.{ref.id})"
    # What this holds in the end is handed out as it is; joining a list of parts would take the memory twice.
    buffer = io.BytesIO()

    async def load(part: int) -> bytes:
        subject = subjects.blob(application, session, side, ref.id, part)
        data = await _find(partial(_insist, subject, partial(broker.peek, stream, subject)))
        if data is None:
            raise ValueGone(f"{what}: part {part} of {ref.parts} is not kept any more, or never was")
        return data

    def take(data: bytes) -> None:
        if buffer.tell() + len(data) > ref.size:
            raise ValueGone(f"{what}: its parts hold more than that")
        buffer.write(data)

    try:
        async with _places_of(broker):
            await _in_turn(ref.parts, load, take)
    except StreamMissing as error:
        raise _unregistered(application) from error
    if buffer.tell() != ref.size:
        raise ValueGone(f"{what}: its parts hold {buffer.tell():,} bytes")
    return buffer.getvalue()


def _places_of(broker: Broker) -> asyncio.Semaphore:
    """Return what bounds how many values are read at once over a connection.

    A server ends a connection for which it has to keep too much (64 MiB, unless it is told otherwise).
    """
    places = _places.get(broker)
    if places is None:
        places = _places[broker] = asyncio.Semaphore(READ_AT_ONCE)
    return places


_places: WeakKeyDictionary[Broker, asyncio.Semaphore] = WeakKeyDictionary()


def _unregistered(application: str) -> ApplicationNotFound:
    return ApplicationNotFound(f"application {application} is not registered any more")


async def _find(read: Callable[[], Awaitable[bytes | None]]) -> bytes | None:
    """Look for what was stored before anybody could name it, for some seconds: a replica may be behind."""
    loop = asyncio.get_running_loop()
    deadline = 0.0
    while (data := await read()) is None:
        now = loop.time()
        deadline = deadline or now + defaults.VALUE_MISSING_S
        if now >= deadline:
            break
        await asyncio.sleep(defaults.BACKOFF_FIRST_S)
    return data


async def _insist(what: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Return what an attempt brings, trying for a limited time while the broker is not available."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + defaults.VALUE_TIMEOUT_S
    pause_s = defaults.BACKOFF_FIRST_S
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            if loop.time() + pause_s >= deadline:
                raise
            log.debug("a part of a large value; trying again", part=what, error=str(error))
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, PAUSE_MAX_S)


async def _in_turn(parts: int, do: Callable[[int], Coroutine[Any, Any, T]], take: Callable[[T], None]) -> None:
    """Do something for every part, `defaults.VALUE_WINDOW` at once, and take what that brings in their order."""
    under_way: deque[asyncio.Task[T]] = deque()
    try:
        for part in range(parts):
            if len(under_way) >= defaults.VALUE_WINDOW:
                take(await under_way[0])
                under_way.popleft()
            under_way.append(asyncio.create_task(do(part)))
        while under_way:
            take(await under_way[0])
            under_way.popleft()
    finally:
        await end_tasks(under_way)
        for task in under_way:
            if not task.cancelled():
                task.exception()  # one that was first in turn was raised: no warning for the others
