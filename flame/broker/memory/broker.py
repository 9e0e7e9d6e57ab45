"""One connection to the in-memory server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING

from flame.broker.errors import ConsumerMissing, Duplicate, NoResponders, StreamMissing
from flame.broker.memory.bucket import MemoryBucket
from flame.broker.memory.calls import Calls, Loss
from flame.broker.memory.exchange import Message
from flame.broker.memory.live import Live, MemoryService, MemorySubscription
from flame.broker.memory.puller import MemoryPuller
from flame.broker.memory.reader import read_stream
from flame.broker.seam import (
    ConsumerState,
    Listener,
    LiveHandler,
    LiveMessage,
    OnStored,
    RequestHandler,
    StoredMessage,
    StreamState,
    SubjectHandler,
)
from flame.errors import BrokerUnavailable, FlameError
from flame.logs import get_logger
from flame.protocol.topology import BucketSpec, ConsumerSpec, StreamSpec

if TYPE_CHECKING:
    from flame.broker.memory.consumer import MemoryConsumer
    from flame.broker.memory.server import MemoryServer


log = get_logger("flame.broker.memory")


class MemoryBroker:
    """One connection; see `flame.broker.seam.Broker` for what each operation does. Made by `MemoryServer.connect`.

    Operations are carried out by the server in the order of the calls, never while a call is being made.
    """

    def __init__(self, server: MemoryServer, name: str) -> None:
        """Connect to a server."""
        self._server = server
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._on_reconnect: list[Listener] = []
        self.calls = Calls(server, self._restored)
        """What is asked of the server."""
        self._live = Live(self.calls)

    # ---- the connection

    @property
    def endpoint(self) -> str:
        """See `flame.broker.seam.Broker.endpoint`."""
        return f"memory://{self._name}"

    @property
    def connected(self) -> bool:
        """See `flame.broker.seam.Broker.connected`."""
        return self.calls.link.connected

    async def close(self) -> None:
        """See `flame.broker.seam.Broker.close`."""
        if not self.calls.link.closed:
            self.calls.close()
            self._server.forget(self)
            await self._live.close()

    def on_reconnect(self, listener: Listener) -> Callable[[], None]:
        """See `flame.broker.seam.Broker.on_reconnect`."""
        self._on_reconnect.append(listener)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._on_reconnect.remove(listener)

        return forget

    def _restored(self) -> None:
        self._live.restore()
        self._loop.call_soon(self._tell_reconnected)

    def _tell_reconnected(self) -> None:
        if self.connected:
            self._live.restored()
            for listener in tuple(self._on_reconnect):
                try:
                    listener()
                except Exception:
                    log.exception("a listener for reconnects failed")

    # ---- live messages

    async def publish(self, subject: str, data: bytes) -> None:
        """See `flame.broker.seam.Broker.publish`."""
        self._live.publish(subject, data)

    async def subscribe(self, subject: str, handler: LiveHandler) -> MemorySubscription:
        """See `flame.broker.seam.Broker.subscribe`."""

        def receive(message: Message) -> None:
            handler(LiveMessage(message.subject, message.data, message.stored_as))

        return self._live.listen(subject, receive)

    async def first(self, subject: str) -> tuple[asyncio.Future[bytes], MemorySubscription]:
        """See `flame.broker.seam.Broker.first`."""
        future: asyncio.Future[bytes] = self._loop.create_future()

        def receive(message: Message) -> None:
            subscription.end()
            if not future.done():
                future.set_result(message.data)

        subscription = self._live.listen(subject, receive)
        return future, subscription

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """See `flame.broker.seam.Broker.request`."""
        return await self._live.request(subject, data, timeout_s)

    async def answer(self, subject: str, handler: SubjectHandler) -> MemorySubscription:
        """See `flame.broker.seam.Broker.answer`."""
        return self._live.answer(subject, lambda message: handler(message.subject, message.data))

    async def serve(self, name: str, version: str, prefix: str, verbs: Mapping[str, RequestHandler]) -> MemoryService:
        """See `flame.broker.seam.Broker.serve`."""
        endpoints = [{"name": verb, "subject": f"{prefix}.{verb}"} for verb in verbs]
        about = {"type": "io.nats.micro.v1.info_response", "name": name, "version": version, "endpoints": endpoints}

        async def tell(_: Message) -> bytes:
            return json.dumps(about).encode()

        found_by = [self._live.answer(subject, tell) for subject in ("$SRV.INFO", f"$SRV.INFO.{name}")]
        return MemoryService(found_by + [self._serve(f"{prefix}.{verb}", handler) for verb, handler in verbs.items()])

    def _serve(self, subject: str, handler: RequestHandler) -> MemorySubscription:
        return self._live.answer(subject, lambda message: handler(message.data), group="service")

    # ---- streams

    async def ensure_stream(self, spec: StreamSpec) -> None:
        """See `flame.broker.seam.Broker.ensure_stream`."""
        await self.calls.ask(f"create stream {spec.name}", lambda: self._server.ensure_stream(spec))

    async def delete_stream(self, name: str) -> None:
        """See `flame.broker.seam.Broker.delete_stream`."""
        await self.calls.ask(f"delete stream {name}", lambda: self._server.delete_stream(name))

    async def stream_state(self, name: str) -> StreamState:
        """See `flame.broker.seam.Broker.stream_state`."""
        return await self.calls.ask(f"state of stream {name}", lambda: self._server.stream(name).state())

    async def subjects(self, stream: str, pattern: str) -> dict[str, int]:
        """See `flame.broker.seam.Broker.subjects`."""
        what = f"subjects of stream {stream}"
        return await self.calls.ask(what, lambda: self._server.stream(stream).subjects(pattern))

    async def first_stored(self, stream: str, pattern: str, after: int = 0) -> StoredMessage | None:
        """See `flame.broker.seam.Broker.first_stored`."""

        def first() -> StoredMessage | None:
            found = self._server.stream(stream).behind(pattern, after, 1)
            return found[0] if found else None

        return await self.calls.ask(f"read {pattern}", first)

    async def begin_store(
        self, subject: str, data: bytes, timeout_s: float, then_acknowledge: str = "", ttl_s: float = 0.0
    ) -> asyncio.Future[int]:
        """See `flame.broker.seam.Broker.begin_store`."""

        def acknowledge(error: FlameError | None) -> None:
            if error is None or isinstance(error, Duplicate):
                with contextlib.suppress(BrokerUnavailable):  # closed: it is delivered again
                    self._acknowledge(then_acknowledge)

        return self.calls.begin(
            f"store on {subject}",
            lambda: self._server.publish(subject, data, ttl_s),
            timeout_s,
            self.calls.loss_of_stores(),
            len(data),
            acknowledge if then_acknowledge else None,
        )

    async def store_then(
        self, subject: str, data: bytes, timeout_s: float, on_done: OnStored, then_acknowledge: str = ""
    ) -> None:
        """See `flame.broker.seam.Broker.store_then`."""

        def done(future: asyncio.Future[int]) -> None:
            error = future.exception()
            if error is None:
                on_done(future.result(), None)
            else:
                on_done(0, error if isinstance(error, FlameError) else FlameError(str(error)))

        (await self.begin_store(subject, data, timeout_s, then_acknowledge)).add_done_callback(done)

    async def store(self, subject: str, data: bytes, timeout_s: float) -> int:
        """See `flame.broker.seam.Broker.store`."""
        return await (await self.begin_store(subject, data, timeout_s))

    async def last(self, stream: str, subject: str) -> StoredMessage | None:
        """See `flame.broker.seam.Broker.last`."""
        return await self.calls.ask(f"read {subject}", lambda: self._server.stream(stream).last(subject))

    async def peek(self, stream: str, subject: str) -> bytes | None:
        """See `flame.broker.seam.Broker.peek`."""
        found = await self.calls.ask(f"read {subject}", lambda: self._server.stream(stream).last(subject))
        return None if found is None else found.data

    def read(
        self, stream: str, pattern: str, *, after: int = 0, follow: bool = False
    ) -> AsyncGenerator[StoredMessage, None]:
        """See `flame.broker.seam.Broker.read`."""
        return read_stream(self.calls, stream, pattern, after, self.on_reconnect, follow=follow)

    async def purge(self, stream: str, pattern: str, up_to: int = 0) -> int:
        """See `flame.broker.seam.Broker.purge`."""
        return await self.calls.ask(f"purge {pattern}", lambda: self._server.stream(stream).purge(pattern, up_to))

    # ---- consumers

    async def create_consumer(self, spec: ConsumerSpec) -> None:
        """See `flame.broker.seam.Broker.create_consumer`."""
        what = f"create consumer {spec.name}"
        await self.calls.ask(what, lambda: self._server.stream(spec.stream).create_consumer(spec))

    async def delete_consumer(self, stream: str, name: str) -> None:
        """See `flame.broker.seam.Broker.delete_consumer`."""
        with contextlib.suppress(StreamMissing):
            await self.calls.ask(f"delete consumer {name}", lambda: self._server.stream(stream).delete_consumer(name))

    async def consumer_state(self, stream: str, name: str) -> ConsumerState:
        """See `flame.broker.seam.Broker.consumer_state`."""

        def read() -> ConsumerState:
            consumer = self._server.stream(stream).consumers.get(name)
            if consumer is None:
                raise ConsumerMissing("consumer not found (10014)")
            return consumer.state()

        return await self.calls.ask(f"state of consumer {name}", read)

    async def consumers(self, stream: str) -> list[ConsumerState]:
        """See `flame.broker.seam.Broker.consumers`."""

        def read() -> list[ConsumerState]:
            return [consumer.state() for consumer in self._server.stream(stream).consumers.values()]

        return await self.calls.ask(f"consumers of stream {stream}", read)

    async def pull(self, stream: str, consumer: str) -> MemoryPuller:
        """See `flame.broker.seam.Broker.pull`."""
        puller = MemoryPuller(self.calls, stream, consumer)
        puller.forget = self.on_reconnect(puller.interrupt)
        return puller

    async def acknowledge(self, handle: str) -> None:
        """See `flame.broker.seam.Broker.acknowledge`."""
        self._acknowledge(handle)

    def _acknowledge(self, handle: str) -> None:
        self._tell("acknowledge", handle, lambda consumer, sequence: consumer.acknowledge(sequence))

    async def acknowledge_surely(self, handle: str, timeout_s: float) -> None:
        """See `flame.broker.seam.Broker.acknowledge_surely`."""

        def acknowledge() -> None:
            found = self._server.consumer_of(handle)
            if found is None:
                raise NoResponders("nobody answers there")
            found[0].acknowledge(found[1])

        faults = self._server.faults
        loss = Loss(faults.lose_acknowledgements, faults.lose_answers)
        await self.calls.begin("acknowledge", acknowledge, timeout_s, loss)

    async def extend(self, handle: str) -> None:
        """See `flame.broker.seam.Broker.extend`."""
        self._tell("extend", handle, lambda consumer, sequence: consumer.extend(sequence))

    async def hand_back(self, handle: str, delay_s: float = 0.0) -> None:
        """See `flame.broker.seam.Broker.hand_back`."""
        self._tell("hand back", handle, lambda consumer, sequence: consumer.hand_back(sequence, delay_s))

    def _tell(self, what: str, handle: str, act: Callable[[MemoryConsumer, int], None]) -> None:
        def arrive() -> None:
            found = self._server.consumer_of(handle)
            chance = self._server.chance
            if found is not None and not chance.happens(chance.faults.lose_acknowledgements):
                act(*found)

        self.calls.send(what, arrive, len(handle))

    # ---- buckets

    async def ensure_bucket(self, spec: BucketSpec) -> None:
        """See `flame.broker.seam.Broker.ensure_bucket`."""
        await self.calls.ask(f"create bucket {spec.name}", lambda: self._server.ensure_bucket(spec))

    def bucket(self, name: str) -> MemoryBucket:
        """See `flame.broker.seam.Broker.bucket`."""
        return MemoryBucket(self.calls, name, self.on_reconnect)
