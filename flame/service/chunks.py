"""Storing what a run emits, in order and without waiting for each chunk."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from functools import partial
from typing import Final

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker
from flame.errors import BrokerUnavailable, FlameError, InvalidArgument, PayloadTooLarge, TaskEnded
from flame.protocol import defaults
from flame.protocol.chunks import ChunkMessage
from flame.service.bell import Bell
from flame.service.running import Run, Stop

STORE_ATTEMPT_S: Final = 5.0
LAST_S: Final = 2.0
"""For how long the chunks of a run that failed are waited for: its record is to come after them, but soon."""
ENVELOPE_BYTES: Final = 128
"""What a chunk needs besides its data, generously."""
QUEUED: Final = 64
"""Chunks of threads that were not looked at yet; then the threads wait."""


def chunk_bytes(chunk: object) -> bytes:
    """Return what is to be stored; raise `InvalidArgument` or `PayloadTooLarge`."""
    if isinstance(chunk, str):
        chunk = chunk.encode()
    elif isinstance(chunk, bytearray | memoryview):
        chunk = bytes(chunk)
    if not isinstance(chunk, bytes):
        raise InvalidArgument(f"emit: expected bytes or str, got {type(chunk).__name__}")
    if len(chunk) > defaults.INLINE_LIMIT_BYTES - ENVELOPE_BYTES:
        raise PayloadTooLarge(
            f"emit: a chunk of {len(chunk)} bytes: the limit is {defaults.INLINE_LIMIT_BYTES - ENVELOPE_BYTES};"
            " emit it in parts"
        )
    return chunk


class ChunkWriter:
    """The chunks of one run. They are sent without waiting for one another.

    None is sent that is `defaults.CHUNK_WINDOW` later than one that may not be stored: so far a listener puts them in
    order.
    One whose acknowledgement doesn't come is sent again: a listener tells by its index what it has heard. When that
    takes longer than `defaults.EMIT_TIMEOUT_S`, whoever emits gets the error.
    """

    def __init__(self, broker: Broker, subject: str, run: Run) -> None:
        """Store on ``subject``. Made in the executor's loop, or in a thread while that runs."""
        self._broker = broker
        self._subject = subject
        self._run = run
        self._unstored: dict[int, bytes] = {}
        """By their indexes, the earliest first."""
        self._error: FlameError | None = None
        self._over = False
        self._retries: set[asyncio.Task[None]] = set()
        self._queued: deque[bytes] = deque()
        self._places = threading.BoundedSemaphore(QUEUED)
        self._moving: asyncio.Task[None] | None = None
        self._called = False
        """The loop was asked to look at what threads have put into the queue."""
        self._bell: Bell
        self.count = 0
        """How many were emitted."""

    def check(self) -> None:
        """Raise why nothing more can be emitted, if that is so."""
        if self._error is not None:
            raise self._error
        if self._over or self._run.stop is not None:
            raise TaskEnded(f"task {self._run.task} has ended: nothing can be emitted any more")

    async def write(self, data: bytes) -> None:
        """Send a chunk, once there is room among those that are on their way."""
        self.check()
        while self._unstored and self.count - next(iter(self._unstored)) >= defaults.CHUNK_WINDOW:
            await self._rung()
            self.check()
        index = self.count
        message = ChunkMessage(index, self._run.attempt, self._run.started, data).encode()
        self.count += 1
        self._unstored[index] = message
        try:
            await self._broker.store_then(self._subject, message, STORE_ATTEMPT_S, partial(self._on_stored, index))
        except FlameError as error:
            self._on_stored(index, 0, error)

    def write_from_thread(self, data: bytes, loop: asyncio.AbstractEventLoop) -> None:
        """Do the same from another thread: it waits while the broker takes nothing, for a limited time."""
        self.check()
        if not self._places.acquire(timeout=defaults.EMIT_TIMEOUT_S):
            raise BrokerUnavailable(f"emit: nothing could be stored for {defaults.EMIT_TIMEOUT_S:g} s")
        self._queued.append(data)
        if not self._called:
            self._called = True
            loop.call_soon_threadsafe(self._look)

    async def finish(self) -> None:
        """Return when everything that was emitted is stored; raise why that can't be."""
        while self._error is None and (self._unstored or self._queued or self._moving is not None):
            await self._rung()
        if self._error is not None:
            raise self._error

    async def end(self) -> int:
        """Take no more, wait a little for what is on its way, and return how many were emitted."""
        self._over = True
        try:
            async with asyncio.timeout(LAST_S):
                while self._error is None and self._unstored:
                    await self._rung()
        except TimeoutError:
            pass
        return self.count

    # ---- what threads emit

    def _look(self) -> None:
        self._called = False
        if self._moving is None and self._queued:
            self._moving = asyncio.get_running_loop().create_task(self._move(), name="emitted in threads")

    async def _move(self) -> None:
        try:
            while self._queued:
                data = self._queued.popleft()
                self._places.release()
                await self.write(data)
        except FlameError:
            while self._queued:  # whoever emits next is told
                self._queued.popleft()
                self._places.release()
        finally:
            self._moving = None
            self._ring()

    # ---- their ends

    def _on_stored(self, index: int, _sequence: int, error: FlameError | None) -> None:
        if error is None:
            del self._unstored[index]
            self._ring()
        elif isinstance(error, StreamMissing):
            self._fail(
                BrokerUnavailable(
                    f"emit: no stream takes {self._subject}: the application is not registered any more, or its"
                    " scheduler is older than this service"
                )
            )
        else:
            retry = asyncio.get_running_loop().create_task(self._store_again(index, error))
            self._retries.add(retry)
            retry.add_done_callback(self._retries.discard)

    async def _store_again(self, index: int, error: FlameError) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + defaults.EMIT_TIMEOUT_S - STORE_ATTEMPT_S
        pause_s = defaults.BACKOFF_FIRST_S
        while self._error is None and self._run.stop is not Stop.CANCELLED:
            if loop.time() > deadline:
                self._fail(BrokerUnavailable(f"emit: a chunk could not be stored: {error}"))
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, defaults.BACKOFF_MAX_S)
            try:
                await self._broker.store(self._subject, self._unstored[index], STORE_ATTEMPT_S)
            except FlameError as again:
                error = again
                continue
            self._on_stored(index, 0, None)
            return

    def _fail(self, error: FlameError) -> None:
        self._error = error
        self._ring()

    # ---- waiting

    async def _rung(self) -> None:
        if not hasattr(self, "_bell"):
            self._bell = Bell()
        await self._bell.wait()

    def _ring(self) -> None:
        if hasattr(self, "_bell"):
            self._bell.ring()
