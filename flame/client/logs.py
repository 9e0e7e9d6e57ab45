"""What executors wrote to their standard streams, as lines."""

from __future__ import annotations

import asyncio
import codecs
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker, StoredMessage
from flame.cancel import end_task
from flame.errors import (
    ApplicationNotFound,
    ExecutorNotFound,
    FlameError,
    InvalidArgument,
    MalformedMessage,
    NotFound,
    SessionNotFound,
    Unavailable,
)
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.states import ExecutorState
from flame.protocol.supervision import LogChunk

if TYPE_CHECKING:
    from flame.client.connection import Connection

log = get_logger("flame.client")

LOOK_S: Final = 1.0
"""Between two looks whether what is followed has ended."""
QUIET_S: Final = 1.0
"""For how long after that more is waited for: managers publish what an executor wrote last when it has ended."""
TAIL_FIRST: Final = 256
"""How many messages back the last lines are looked for at first."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line that a service wrote."""

    at: float
    """When it was read on its node, Unix seconds."""
    application: str
    session: str
    executor: str
    stream: str
    """``stdout`` or ``stderr``."""
    text: str
    """Without its end. A line that took its writer long, or of more than 64 KiB, may come in parts."""


class LineReader:
    """Turns stored chunks into lines. Characters that lie across two chunks of one writer are put together."""

    def __init__(self) -> None:
        """Know of no writer yet."""
        self._decoders: dict[tuple[str, str], codecs.IncrementalDecoder] = {}

    def lines(self, message: StoredMessage) -> list[LogLine]:
        """Return the lines of one message; none if it is no chunk."""
        try:
            address, chunk = subjects.parse_log(message.subject), LogChunk.decode(message.data)
        except MalformedMessage as error:
            log.warning("unreadable output is left out", subject=message.subject, error=str(error))
            return []
        decoder = self._decoders.get((address.executor, chunk.stream))
        if decoder is None:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            self._decoders[address.executor, chunk.stream] = decoder
        text = decoder.decode(chunk.data, final=chunk.data.endswith(b"\n"))
        parts = text.split("\n")
        if not parts[-1]:
            parts.pop()
        return [LogLine(chunk.at, *address, chunk.stream, part.removesuffix("\r")) for part in parts]


class _Source:
    """Where to read: a pattern of one application's stream, and how to learn that nothing more will come."""

    def __init__(self, application: str, session: str, executor: str, ended: Callable[[], Awaitable[bool]]) -> None:
        self.application = application
        self.stream = subjects.log_stream(application)
        self.pattern = subjects.log(application, session, executor)
        self.ended = ended


async def read_logs(
    connection: Connection, *, session: str | None, executor: str | None, follow: bool, tail: int | None
) -> AsyncGenerator[LogLine, None]:
    """See `flame.client.connection.Connection.read_logs`."""
    if tail is not None and (isinstance(tail, bool) or tail < 0):
        raise InvalidArgument(f"tail {tail!r}: expected a number of lines, or None for all")
    source = await _find(connection, session, executor)
    lines = LineReader()
    after = 0
    try:
        if tail is not None:
            found, after, lines = await _last_lines(connection.broker, source, tail)
            for line in found:
                yield line
            if not follow:
                return
        messages = _messages(connection.broker, source, after, follow=follow)
        async with aclosing(messages):
            async for message in messages:
                for line in lines.lines(message):
                    yield line
    except StreamMissing:
        raise ApplicationNotFound(f"application {source.application} is not registered any more") from None


async def _messages(
    broker: Broker, source: _Source, after: int, *, follow: bool
) -> AsyncGenerator[StoredMessage, None]:
    """Read, and follow until nothing more will come."""
    if follow:
        queue: asyncio.Queue[StoredMessage | Exception] = asyncio.Queue(256)
        pump = asyncio.create_task(_pump(broker, source, after, queue), name=f"follow {source.pattern}")
        try:
            async for message in _until_ended(source, queue):
                after = message.sequence
                yield message
        finally:
            await end_task(pump)
    async with aclosing(broker.read(source.stream, source.pattern, after=after)) as rest:
        async for message in rest:
            yield message


async def _pump(broker: Broker, source: _Source, after: int, queue: asyncio.Queue[StoredMessage | Exception]) -> None:
    try:
        async with aclosing(broker.read(source.stream, source.pattern, after=after, follow=True)) as reader:
            async for message in reader:
                await queue.put(message)
    except FlameError as error:
        await queue.put(error)


async def _until_ended(
    source: _Source, queue: asyncio.Queue[StoredMessage | Exception]
) -> AsyncGenerator[StoredMessage, None]:
    """Take from the queue until what is followed has ended and nothing came for a while."""
    ended = False
    while True:
        try:
            async with asyncio.timeout(QUIET_S if ended else LOOK_S):
                item = await queue.get()
        except TimeoutError:
            if ended:
                return
            ended = await source.ended()
            continue
        if isinstance(item, Exception):
            raise item
        yield item


async def _last_lines(broker: Broker, source: _Source, count: int) -> tuple[list[LogLine], int, LineReader]:
    """Return the last lines there are now, the sequence behind which to go on, and what reads the lines there."""
    last = (await broker.stream_state(source.stream)).last_sequence
    back = TAIL_FIRST
    while True:
        begin = max(0, last - back)
        kept: deque[LogLine] = deque(maxlen=count)
        reader = LineReader()
        end = begin
        async with aclosing(broker.read(source.stream, source.pattern, after=begin)) as messages:
            async for message in messages:
                kept.extend(reader.lines(message))
                end = message.sequence
        if len(kept) == count or begin == 0:
            return list(kept), max(end, last), reader
        back *= 8


async def _find(connection: Connection, session: str | None, executor: str | None) -> _Source:
    if session is None and executor is None:
        raise InvalidArgument("read_logs: expected a session, an executor or both, got neither")
    if session is not None:
        application = (await connection.get_session_record(session)).application
        if executor is not None:
            subjects.check_token("executor", executor)
            return _Source(application, session, executor, lambda: _executor_ended(connection, executor))
        return _Source(application, session, "*", lambda: _session_ended(connection, session))
    assert executor is not None
    try:
        record = await connection.get_executor(executor)
    except ExecutorNotFound as error:
        return await _find_ended(connection, executor, error)
    return _Source(record.application, record.session, executor, lambda: _executor_ended(connection, executor))


async def _find_ended(connection: Connection, executor: str, not_found: ExecutorNotFound) -> _Source:
    """Look for what an executor left behind that is not known any more."""
    for application in await connection.list_applications():
        pattern = subjects.log(application.name, "*", executor)
        try:
            found = await connection.broker.first_stored(subjects.log_stream(application.name), pattern)
        except StreamMissing:
            continue  # just unregistered
        if found is not None:
            session = subjects.parse_log(found.subject).session
            return _Source(application.name, session, executor, lambda: _executor_ended(connection, executor))
    raise not_found


async def _session_ended(connection: Connection, session: str) -> bool:
    try:
        return (await connection.get_session_record(session)).settled
    except SessionNotFound:
        return True
    except Unavailable:
        return False


async def _executor_ended(connection: Connection, executor: str) -> bool:
    try:
        return (await connection.get_executor(executor)).state is ExecutorState.RELEASED
    except NotFound:
        return True
    except Unavailable:
        return False
