"""What one connection asks of the server, and the answers that it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from flame.broker.errors import NotAcknowledged, TooLarge
from flame.broker.memory.exchange import Unanswered
from flame.broker.memory.link import Link
from flame.errors import BrokerUnavailable, FlameError

if TYPE_CHECKING:
    from flame.broker.memory.server import MemoryServer

T = TypeVar("T")

API_TIMEOUT_S: Final = 5.0
"""How long an operation waits for the server's answer."""


class Loss(NamedTuple):
    """How likely the two halves of an exchange get lost."""

    request: float
    answer: float


class Calls:
    """Has things carried out at the server, in the order of the calls."""

    def __init__(self, server: MemoryServer, on_restored: Callable[[], None]) -> None:
        """Connect; ``on_restored`` is called first thing whenever that had to be done again."""
        self.server = server
        self.link = Link(server.clock, server.chance, on_restored)
        self._loop = asyncio.get_running_loop()
        self._outstanding: dict[asyncio.Future[Any], str] = {}

    def send(self, what: str, action: Callable[[], None], size: int = 0) -> None:
        """Have something of ``size`` bytes carried out; raise `TooLarge` or `BrokerUnavailable`."""
        if size > self.server.max_payload_bytes:
            raise TooLarge(f"{what}: the message is larger than the server takes")
        try:
            self.link.send(action, size)
        except BrokerUnavailable as error:
            raise BrokerUnavailable(f"{what}: {error}") from error

    async def ask(self, what: str, action: Callable[[], T]) -> T:
        """Have ``action`` carried out and return what it returns, or raise what it raises."""
        faults = self.server.faults
        return await self.begin(what, action, API_TIMEOUT_S, Loss(faults.lose_requests, faults.lose_answers))

    async def write(self, what: str, action: Callable[[], T], size: int) -> T:
        """Do the same with something that is to be stored."""
        return await self.begin(what, action, API_TIMEOUT_S, self.loss_of_stores(), size)

    def loss_of_stores(self) -> Loss:
        """Return how likely what is to be stored gets lost, and its acknowledgement."""
        faults = self.server.faults
        return Loss(faults.lose_stores, faults.lose_store_answers)

    def begin(
        self,
        what: str,
        action: Callable[[], T],
        timeout_s: float,
        loss: Loss,
        size: int = 0,
        on_answer: Callable[[FlameError | None], None] | None = None,
    ) -> asyncio.Future[T]:
        """Have ``action`` carried out; the future brings what it returns or raises, `NotAcknowledged` if that is late.

        ``on_answer`` is called with an answer in time, also if nobody waits for the future any more.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        chance = self.server.chance

        def answered(settle: Callable[[asyncio.Future[T]], None], error: FlameError | None) -> None:
            if on_answer is not None and (future.cancelled() or not future.done()):
                on_answer(error)
            settle(future)

        def serve() -> None:
            if chance.happens(loss.request):
                return
            error: FlameError | None = None
            try:
                settle: Callable[[asyncio.Future[T]], None] = partial(_succeed, action())
            except Unanswered:
                return
            except FlameError as caught:
                error = type(caught)(f"{what}: {caught}")
                settle = partial(fail, error)
            if not chance.happens(loss.answer):
                self.link.deliver(lambda: answered(settle, error))

        self.send(what, serve, size)
        self.expect(future, what, timeout_s)
        return future

    def expect(self, future: asyncio.Future[Any], what: str, timeout_s: float) -> None:
        """Fail ``future`` with `NotAcknowledged` if it isn't done in time, or when the connection is closed."""

        def late() -> None:
            fail(NotAcknowledged(f"{what}: no answer in time; it may have been carried out"), future)

        timer = self.server.clock.call_later(timeout_s, late)
        self._outstanding[future] = what

        def done(_: asyncio.Future[Any]) -> None:
            timer.cancel()
            self._outstanding.pop(future, None)

        future.add_done_callback(done)

    def close(self) -> None:
        """Carry out what was sent, if connected, and fail what is outstanding then."""
        self.link.close()
        for future, what in list(self._outstanding.items()):
            fail(NotAcknowledged(f"{what}: the connection was closed; it may have been carried out"), future)


def _succeed(value: T, future: asyncio.Future[T]) -> None:
    if not future.done():
        future.set_result(value)


def fail(error: FlameError, future: asyncio.Future[Any]) -> None:
    """Fail a future, unless it is done."""
    if not future.done():
        future.set_exception(error)
        future.exception()  # whoever asked may be gone: no warning for that
