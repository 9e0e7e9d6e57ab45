"""One connection's live messages: sending them, listening, asking and answering."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from flame.broker.errors import NoResponders, NotAcknowledged
from flame.broker.memory.calls import Calls, fail
from flame.broker.memory.exchange import Exchange, Interest, Message, Unanswered
from flame.cancel import end_tasks
from flame.errors import FlameError
from flame.logs import get_logger

log = get_logger("flame.broker.memory")


class MemorySubscription:
    """Something that is listened to."""

    def __init__(self, exchange: Exchange, interest: Interest, interests: dict[Interest, None]) -> None:
        """Made by `Live.listen`; ``interests`` are all those of its connection."""
        self._exchange = exchange
        self._interest = interest
        self._interests = interests

    def end(self) -> None:
        """Hear nothing more."""
        self._interests.pop(self._interest, None)
        self._exchange.remove(self._interest)

    async def stop(self) -> None:
        """See `flame.broker.seam.Subscription.stop`."""
        self.end()


class MemoryService:
    """Several subscriptions that are stopped together."""

    def __init__(self, subscriptions: list[MemorySubscription]) -> None:
        """Hold them."""
        self._subscriptions = subscriptions

    async def stop(self) -> None:
        """See `flame.broker.seam.Subscription.stop`."""
        for subscription in self._subscriptions:
            subscription.end()


class Live:
    """The live side of a connection."""

    def __init__(self, calls: Calls) -> None:
        """Send and listen over a connection."""
        self._calls = calls
        self._server = calls.server
        self._loop = asyncio.get_running_loop()
        self._interests: dict[Interest, None] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._asking: dict[asyncio.Future[bytes], str] = {}

    def restore(self) -> None:
        """Listen again, after the connection had broken."""
        for interest in self._interests:
            self._server.exchange.add(interest)

    def restored(self) -> None:
        """Fail requests that were under way: their answers can't come any more."""
        for future, what in list(self._asking.items()):
            fail(NotAcknowledged(f"{what}: the connection was lost meanwhile; it may have been carried out"), future)

    async def close(self) -> None:
        """Stop listening and answering."""
        for interest in self._interests:
            self._server.exchange.remove(interest)
        self._interests.clear()
        await end_tasks(self._answering)

    def publish(self, subject: str, data: bytes) -> None:
        """Send a message to whoever listens and to its stream, if it has one."""

        def arrive() -> None:
            with contextlib.suppress(FlameError, Unanswered):
                self._server.publish(subject, data)

        self._calls.send(f"publish on {subject}", arrive, len(data))

    def listen(self, subject: str, receive: Callable[[Message], None], group: str = "") -> MemorySubscription:
        """Call ``receive`` for every message; of those with the same ``group`` one is called."""
        interest = Interest(subject, self._calls.link, receive, group)
        self._calls.send(f"subscribe to {subject}", lambda: self._server.exchange.add(interest))
        self._interests[interest] = None
        return MemorySubscription(self._server.exchange, interest, self._interests)

    def request(self, subject: str, data: bytes, timeout_s: float) -> asyncio.Future[bytes]:
        """Ask whoever listens; the future brings the first answer."""
        what = f"request to {subject}"
        future: asyncio.Future[bytes] = self._loop.create_future()
        chance = self._server.chance

        def answered(answer: bytes) -> None:
            if not future.done():
                future.set_result(answer)

        def reply(answer: bytes) -> None:
            if not chance.happens(chance.faults.lose_answers):
                self._calls.link.deliver(partial(answered, answer))

        def arrive() -> None:
            if chance.happens(chance.faults.lose_requests):
                return
            if not self._server.exchange.send(Message(subject, data, reply=reply)):
                error = NoResponders(f"{what}: nobody answers there")
                self._calls.link.deliver(partial(fail, error, future))

        self._calls.send(what, arrive, len(data))
        self._calls.expect(future, what, timeout_s)
        self._asking[future] = what
        future.add_done_callback(lambda _: self._asking.pop(future))
        return future

    def answer(
        self, subject: str, handler: Callable[[Message], Awaitable[bytes]], group: str = ""
    ) -> MemorySubscription:
        """Answer messages with what ``handler`` returns, several at once."""

        def receive(message: Message) -> None:
            task: asyncio.Task[None] = self._loop.create_task(self._answer(message, handler))
            self._answering.add(task)
            task.add_done_callback(self._answered)

        return self.listen(subject, receive, group)

    async def _answer(self, message: Message, handler: Callable[[Message], Awaitable[bytes]]) -> None:
        answer = await handler(message)
        reply = message.reply
        if reply is not None:
            with contextlib.suppress(FlameError):  # too large, or closed: whoever asked hears nothing
                self._calls.send(f"answer on {message.subject}", lambda: reply(answer), len(answer))

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request handler failed", error=repr(error), exc_info=error)
