"""One connection to the in-memory server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from flame.broker.errors import Duplicate, NoResponders, NotAcknowledged, TooLarge
from flame.broker.memory.bucket import MemoryBucket
from flame.broker.memory.exchange import Interest, Message
from flame.broker.memory.link import Link
from flame.broker.memory.puller import MemoryPuller
from flame.broker.seam import (
    ConsumerState,
    Listener,
    LiveHandler,
    LiveMessage,
    RequestHandler,
    StoredMessage,
    StreamState,
    SubjectHandler,
    Subscription,
)
from flame.errors import BrokerUnavailable, FlameError
from flame.logs import get_logger
from flame.protocol.topology import BucketSpec, ConsumerSpec, StreamSpec

if TYPE_CHECKING:
    from flame.broker.memory.consumer import MemoryConsumer
    from flame.broker.memory.server import MemoryServer

log = get_logger("flame.broker.memory")

T = TypeVar("T")

API_TIMEOUT_S: Final = 5.0
"""How long an operation waits for the server's answer."""


class MemoryBroker:
    """One connection; see `flame.broker.seam.Broker` for what each operation does. Made by `MemoryServer.connect`.

    Operations are carried out by the server in the order of the calls, never while a call is being made.
    """

    def __init__(self, server: MemoryServer, name: str) -> None:
        """Connect to a server."""
        self.server = server
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._interests: dict[Interest, None] = {}
        self._on_reconnect: list[Listener] = []
        self._outstanding: dict[asyncio.Future[Any], str] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self.link = Link(server.clock, server.chance, self._restored)
        """The way to the server."""

    # ---- the connection

    @property
    def endpoint(self) -> str:
        """See `flame.broker.seam.Broker.endpoint`."""
        return f"memory://{self._name}"

    @property
    def connected(self) -> bool:
        """See `flame.broker.seam.Broker.connected`."""
        return self.link.connected

    async def close(self) -> None:
        """See `flame.broker.seam.Broker.close`."""
        if self.link.closed:
            return
        for task in self._answering:
            task.cancel()
        self.link.close()
        self.server.forget(self)
        for interest in self._interests:
            self.server.exchange.remove(interest)
        self._interests.clear()
        outstanding, self._outstanding = self._outstanding, {}
        for future, what in outstanding.items():
            _fail(future, NotAcknowledged(f"{what}: the connection was closed; it may have been carried out"))

    def on_reconnect(self, listener: Listener) -> Callable[[], None]:
        """See `flame.broker.seam.Broker.on_reconnect`."""
        self._on_reconnect.append(listener)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._on_reconnect.remove(listener)

        return forget

    def _restored(self) -> None:
        for interest in self._interests:
            self.server.exchange.add(interest)
        self._loop.call_soon(self._tell_reconnected)

    def _tell_reconnected(self) -> None:
        if self.connected:
            for listener in tuple(self._on_reconnect):
                listener()

    # ---- asking the server

    def begin(
        self,
        what: str,
        action: Callable[[], T],
        timeout_s: float = API_TIMEOUT_S,
        *,
        lost: tuple[float, float] | None = None,
        size: int = 0,
        on_answer: Callable[[FlameError | None], None] | None = None,
    ) -> asyncio.Future[T]:
        """Have ``action`` carried out at the server; the future brings what it returns or raises.

        ``lost`` is how likely the request and its answer get lost; ``None`` takes what `Faults` says of requests.
        ``on_answer`` is called when the answer comes, before the future is done.
        """
        from flame.broker.memory.server import Unanswered

        future: asyncio.Future[T] = self._loop.create_future()
        chance = self.server.chance
        request_lost, answer_lost = lost or (chance.faults.lose_requests, chance.faults.lose_answers)

        def answered(value: T | None, error: FlameError | None) -> None:
            if on_answer is not None and (not future.done() or future.cancelled()):
                on_answer(error)
            if error is not None:
                _fail(future, error)
            elif not future.done():
                future.set_result(value)  # type: ignore[arg-type]  # None only where T is

        def serve() -> None:
            if chance.happens(request_lost):
                return
            answer: Callable[[], None]
            try:
                answer = partial(answered, action(), None)
            except Unanswered:
                return
            except FlameError as error:
                answer = partial(answered, None, type(error)(f"{what}: {error}"))
            if not chance.happens(answer_lost):
                self.link.deliver(answer)

        self._send(what, serve, size)
        self.await_answer(future, what, timeout_s)
        return future

    def await_answer(self, future: asyncio.Future[Any], what: str, timeout_s: float) -> None:
        """Fail ``future`` with `NotAcknowledged` if it isn't done in time, or when the connection is closed."""
        late = NotAcknowledged(f"{what}: no answer in time; it may have been carried out")
        timer = self.server.clock.call_later(timeout_s, lambda: _fail(future, late))
        self._outstanding[future] = what

        def done(_: asyncio.Future[Any]) -> None:
            timer.cancel()
            self._outstanding.pop(future, None)

        future.add_done_callback(done)

    async def ask(self, what: str, action: Callable[[], T]) -> T:
        """Have ``action`` carried out at the server and return what it returns, or raise what it raises."""
        return await self.begin(what, action)

    def _send(self, what: str, action: Callable[[], None], size: int = 0) -> None:
        if size > self.server.max_payload_bytes:
            raise TooLarge(f"{what}: the message is larger than the server takes")
        try:
            self.link.send(action, size)
        except BrokerUnavailable as error:
            raise BrokerUnavailable(f"{what}: {error}") from error

    # ---- live messages

    async def publish(self, subject: str, data: bytes) -> None:
        """See `flame.broker.seam.Broker.publish`."""
        from flame.broker.memory.server import Unanswered

        def arrive() -> None:
            with contextlib.suppress(FlameError, Unanswered):
                self.server.publish(subject, data)

        self._send(f"publish on {subject}", arrive, len(data))

    async def subscribe(self, subject: str, handler: LiveHandler) -> Subscription:
        """See `flame.broker.seam.Broker.subscribe`."""
        return self._listen(subject, lambda message: handler(_live(message)))

    async def first(self, subject: str) -> tuple[asyncio.Future[None], Subscription]:
        """See `flame.broker.seam.Broker.first`."""
        future: asyncio.Future[None] = self._loop.create_future()

        def heard(_: Message) -> None:
            subscription.end()
            if not future.done():
                future.set_result(None)

        subscription = self._listen(subject, heard)
        return future, subscription

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """See `flame.broker.seam.Broker.request`."""
        what = f"request to {subject}"
        future: asyncio.Future[bytes] = self._loop.create_future()
        chance = self.server.chance

        def answered(answer: bytes) -> None:
            if not future.done():
                future.set_result(answer)

        def reply(answer: bytes) -> None:
            if not chance.happens(chance.faults.lose_answers):
                self.link.deliver(partial(answered, answer))

        def arrive() -> None:
            if chance.happens(chance.faults.lose_requests):
                return
            if not self.server.exchange.send(Message(subject, data, reply=reply)):
                self.link.deliver(partial(_fail, future, NoResponders(f"{what}: nobody answers there")))

        self._send(what, arrive, len(data))
        self.await_answer(future, what, timeout_s)
        return await future

    async def answer(self, subject: str, handler: SubjectHandler) -> Subscription:
        """See `flame.broker.seam.Broker.answer`."""
        return self._listen(subject, lambda message: self._answer(message, handler(message.subject, message.data)))

    async def serve(self, name: str, version: str, prefix: str, verbs: Mapping[str, RequestHandler]) -> Subscription:
        """See `flame.broker.seam.Broker.serve`. What NATS's tools discover services by is not answered."""
        subscriptions = [self._serve(f"{prefix}.{verb}", handler) for verb, handler in verbs.items()]
        return _Together(subscriptions)

    def _serve(self, subject: str, handler: RequestHandler) -> _Subscription:
        return self._listen(subject, lambda message: self._answer(message, handler(message.data)), group="service")

    def _answer(self, message: Message, answering: Any) -> None:
        task: asyncio.Task[None] = self._loop.create_task(self._reply(message, answering))
        self._answering.add(task)
        task.add_done_callback(self._answered)

    async def _reply(self, message: Message, answering: Coroutine[Any, Any, bytes]) -> None:
        answer = await answering
        reply = message.reply
        if reply is not None:
            with contextlib.suppress(BrokerUnavailable):
                self.link.send(lambda: reply(answer), len(answer))

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request handler failed", error=repr(error), exc_info=error)

    def _listen(self, subject: str, receive: Callable[[Message], None], group: str = "") -> _Subscription:
        interest = Interest(subject, self.link, receive, group)
        self._send(f"subscribe to {subject}", lambda: self.server.exchange.add(interest))
        self._interests[interest] = None
        return _Subscription(self, interest)

    def drop(self, interest: Interest) -> None:
        """Listen no more."""
        self._interests.pop(interest, None)
        self.server.exchange.remove(interest)

    # ---- streams

    async def ensure_stream(self, spec: StreamSpec) -> None:
        """See `flame.broker.seam.Broker.ensure_stream`."""
        await self.ask(f"create stream {spec.name}", lambda: self.server.ensure_stream(spec))

    async def delete_stream(self, name: str) -> None:
        """See `flame.broker.seam.Broker.delete_stream`."""
        await self.ask(f"delete stream {name}", lambda: self.server.delete_stream(name))

    async def stream_state(self, name: str) -> StreamState:
        """See `flame.broker.seam.Broker.stream_state`."""
        return await self.ask(f"state of stream {name}", lambda: self.server.stream(name).state())

    async def subjects(self, stream: str, pattern: str) -> dict[str, int]:
        """See `flame.broker.seam.Broker.subjects`."""
        return await self.ask(f"subjects of stream {stream}", lambda: self.server.stream(stream).subjects(pattern))

    async def first_stored(self, stream: str, pattern: str) -> StoredMessage | None:
        """See `flame.broker.seam.Broker.first_stored`."""
        return await self.ask(f"read {pattern}", lambda: self.server.stream(stream).first(pattern))

    async def begin_store(
        self, subject: str, data: bytes, timeout_s: float, then_acknowledge: str = ""
    ) -> asyncio.Future[int]:
        """See `flame.broker.seam.Broker.begin_store`."""

        def acknowledge(error: FlameError | None) -> None:
            if error is None or isinstance(error, Duplicate):
                with contextlib.suppress(BrokerUnavailable):
                    self._tell(then_acknowledge, "acknowledge")

        return self.begin(
            f"store on {subject}",
            lambda: self.server.publish(subject, data),
            timeout_s,
            lost=self.lost_stores,
            size=len(data),
            on_answer=acknowledge if then_acknowledge else None,
        )

    @property
    def lost_stores(self) -> tuple[float, float]:
        """How likely a store and its answer get lost."""
        faults = self.server.faults
        return faults.lose_stores, faults.lose_store_answers

    async def store(self, subject: str, data: bytes, timeout_s: float) -> int:
        """See `flame.broker.seam.Broker.store`."""
        return await (await self.begin_store(subject, data, timeout_s))

    async def last(self, stream: str, subject: str) -> StoredMessage | None:
        """See `flame.broker.seam.Broker.last`."""
        return await self.ask(f"read {subject}", lambda: self.server.stream(stream).last(subject))

    async def purge(self, stream: str, pattern: str, up_to: int = 0) -> int:
        """See `flame.broker.seam.Broker.purge`."""
        return await self.ask(f"purge {pattern}", lambda: self.server.stream(stream).purge(pattern, up_to))

    # ---- consumers

    async def create_consumer(self, spec: ConsumerSpec) -> None:
        """See `flame.broker.seam.Broker.create_consumer`."""
        await self.ask(f"create consumer {spec.name}", lambda: self.server.stream(spec.stream).create_consumer(spec))

    async def delete_consumer(self, stream: str, name: str) -> None:
        """See `flame.broker.seam.Broker.delete_consumer`."""
        ...
