"""The broker on NATS JetStream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from nats import errors as nats_errors

from flame.broker import fast
from flame.broker.bucket import JetStreamBucket, bucket_stream
from flame.broker.configs import bucket_config, consumer_state, stream_config
from flame.broker.errors import BrokerError, ConsumerMissing, NoResponders, StreamMissing
from flame.broker.fast import Sender
from flame.broker.leader import read_message
from flame.broker.live import LiveBroker, plain
from flame.broker.publisher import Publisher
from flame.broker.puller import JetStreamPuller
from flame.broker.reader import read_stream
from flame.broker.seam import (
    ConsumerState,
    Listener,
    OnStored,
    StoredMessage,
    StreamState,
)
from flame.broker.security import make_client, not_connected, security_options
from flame.broker.wire import (
    ACK,
    API,
    IN_PROGRESS,
    NAK,
    NAK_AFTER,
    NOT_FOUND,
    SECOND_NS,
    STATUS,
    TTL,
    call,
    has_stream,
    insist,
    map_client_error,
    request,
)
from flame.config import Security, check_endpoint
from flame.errors import BrokerUnavailable
from flame.logs import get_logger
from flame.protocol import defaults
from flame.protocol.topology import BucketSpec, ConsumerSpec, StreamSpec

if TYPE_CHECKING:
    from nats.aio.client import Client

log = get_logger("flame.broker")

PING_INTERVAL_S: Final = 5
SERVICE_STOP_S: Final = 2.0
RECONNECT_WAIT_S: Final = 0.1
PEEK_TIMEOUT_S: Final = 10.0
"""How long a replica has for an answer of some megabytes."""


async def connect(
    endpoint: str,
    *,
    name: str = "flame",
    timeout_s: float = defaults.CONNECT_TIMEOUT_S,
    security: Security | None = None,
    check: bool = True,
) -> JetStreamBroker:
    """Connect to a broker, or raise `BrokerUnavailable` within ``timeout_s`` that says what is wrong.

    ``security`` is by default what the environment says. A file of it that is no good raises `ConfigurationError`.
    A connection that is lost later is made again for as long as it takes. Without ``check`` it is not made sure that
    the server has JetStream: whoever has been given work that is stored there knows.
    """
    servers = check_endpoint(endpoint)
    if security is None:
        security = Security.from_environment()
    options = security_options(servers, security)
    broker = JetStreamBroker(make_client(servers, security), _without_credentials(servers), security)
    try:
        async with asyncio.timeout(timeout_s):
            await broker.open(servers, name, options, check=check)
    except TimeoutError:
        what = "no NATS server answered"
        if broker.connected:
            what = "JetStream did not answer (too few servers of the cluster are up?)"
        await broker.close()
        raise BrokerUnavailable(f"{what} at {broker.endpoint} within {timeout_s:g} s") from None
    except BaseException:
        await broker.close()
        raise
    return broker


def _without_credentials(servers: list[str]) -> str:
    return ",".join(f"{urlsplit(s).scheme}://{urlsplit(s).netloc.rpartition('@')[2]}" for s in servers)


class JetStreamBroker(LiveBroker):
    """One connection to NATS with JetStream; see `flame.broker.seam.Broker` for what each operation does."""

    def __init__(self, client: Client, endpoint: str, security: Security) -> None:
        """Hold an unconnected client; use `connect`."""
        super().__init__(client)
        self._endpoint = endpoint
        self._security = security
        self._publisher: Publisher
        self._on_reconnect: list[Listener] = []
        self._last_error: Exception | None = None
        self._closing = False

    # ---- the connection

    async def open(self, servers: list[str], name: str, options: Mapping[str, Any], *, check: bool) -> None:
        """Connect once, at every server, then keep reconnecting for ever."""
        fast.speed_up(self._nc)
        try:
            await self._nc.connect(
                servers,
                name=name,
                error_cb=self._report_error,
                reconnected_cb=self._reconnected,
                disconnected_cb=self._disconnected,
                closed_cb=self._closed,
                ping_interval=PING_INTERVAL_S,
                connect_timeout=2,
                reconnect_time_wait=0,
                max_reconnect_attempts=1,
                inbox_prefix="_INBOX",
                **options,
            )
        except (nats_errors.Error, OSError, asyncio.IncompleteReadError) as error:
            raise not_connected(self._endpoint, self._security, self._last_error or error) from error
        self._nc.options["max_reconnect_attempts"] = -1
        self._nc.options["reconnect_time_wait"] = RECONNECT_WAIT_S
        if check:
            await insist(self._nc, "INFO", None, f"connect to {self._endpoint}")
        self._sender = Sender(self._nc)
        self._publisher = Publisher(self._nc, self._sender)
        await self._publisher.start()

    @property
    def endpoint(self) -> str:
        """See `flame.broker.seam.Broker.endpoint`."""
        return self._endpoint

    @property
    def connected(self) -> bool:
        """See `flame.broker.seam.Broker.connected`."""
        return self._nc.is_connected

    async def close(self) -> None:
        """See `flame.broker.seam.Broker.close`."""
        if self._closing:
            return
        self._closing = True
        await self.answer_no_more()
        if hasattr(self, "_publisher"):
            self._publisher.stop("the connection was closed")
        # Cancelling its reconnection may be lost (asyncio.wait_for, before Python 3.12); then this is what ends it.
        self._nc.options["max_reconnect_attempts"] = 1
        with contextlib.suppress(nats_errors.Error, OSError):
            await self._nc.close()

    def on_reconnect(self, listener: Listener) -> Callable[[], None]:
        """See `flame.broker.seam.Broker.on_reconnect`."""
        self._on_reconnect.append(listener)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._on_reconnect.remove(listener)

        return forget

    async def _report_error(self, error: Exception) -> None:
        self._last_error = error
        if isinstance(error, nats_errors.SlowConsumerError):
            log.warning("a subscription fell behind and lost a message", subject=error.subject)
        else:
            log.debug("connection error", error=plain(error))

    async def _disconnected(self) -> None:
        if not self._closing:
            log.debug("disconnected", endpoint=self._endpoint)

    async def _reconnected(self) -> None:
        log.debug("reconnected", endpoint=self._endpoint)
        self.lose_requests()
        for listener in tuple(self._on_reconnect):
            try:
                listener()
            except Exception:
                log.exception("a listener for reconnects failed")

    async def _closed(self) -> None:
        if not self._closing:
            log.error("the connection is closed for good", endpoint=self._endpoint, error=plain(self._last_error))
            if hasattr(self, "_publisher"):
                self._publisher.stop("the connection is closed for good")

    # ---- streams

    async def ensure_stream(self, spec: StreamSpec) -> None:
        """See `flame.broker.seam.Broker.ensure_stream`."""
        await self._ensure(spec.name, stream_config(spec))

    async def _ensure(self, name: str, config: dict[str, Any]) -> None:
        what = f"create stream {name}"
        try:
            await insist(self._nc, f"STREAM.CREATE.{name}", config, what)
        except BrokerError as error:
            if "(10058)" not in str(error):  # in use with another configuration
                raise
            await call(self._nc, f"STREAM.UPDATE.{name}", config, f"update stream {name}")

    async def delete_stream(self, name: str) -> None:
        """See `flame.broker.seam.Broker.delete_stream`."""
        with contextlib.suppress(StreamMissing):
            await insist(self._nc, f"STREAM.DELETE.{name}", None, f"delete stream {name}")

    async def stream_state(self, name: str) -> StreamState:
        """See `flame.broker.seam.Broker.stream_state`."""
        state = (await insist(self._nc, f"STREAM.INFO.{name}", None, f"state of stream {name}"))["state"]
        return StreamState(int(state["messages"]), int(state["last_seq"]))

    async def subjects(self, stream: str, pattern: str) -> dict[str, int]:
        """See `flame.broker.seam.Broker.subjects`."""
        counts: dict[str, int] = {}
        while True:
            body = {"subjects_filter": pattern, "offset": len(counts)}
            answer = await insist(self._nc, f"STREAM.INFO.{stream}", body, f"subjects of stream {stream}")
            page = answer["state"].get("subjects") or {}
            counts.update(page)
            if not page or len(counts) >= int(answer.get("total", 0)):
                return counts

    async def first_stored(self, stream: str, pattern: str, after: int = 0) -> StoredMessage | None:
        """See `flame.broker.seam.Broker.first_stored`."""
        return await read_message(self._nc, stream, {"seq": after + 1, "next_by_subj": pattern}, f"read {pattern}")

    async def begin_store(
        self, subject: str, data: bytes, timeout_s: float, then_acknowledge: str = "", ttl_s: float = 0.0
    ) -> asyncio.Future[int]:
        """See `flame.broker.seam.Broker.begin_store`."""
        headers = {TTL: f"{ttl_s:.0f}s"} if ttl_s else None
        return await self._publisher.publish(subject, data, timeout_s, headers, then_acknowledge)

    async def store_then(
        self, subject: str, data: bytes, timeout_s: float, on_done: OnStored, then_acknowledge: str = ""
    ) -> None:
        """See `flame.broker.seam.Broker.store_then`."""
        await self._publisher.publish_then(subject, data, timeout_s, on_done, then_acknowledge=then_acknowledge)

    async def store(self, subject: str, data: bytes, timeout_s: float) -> int:
        """See `flame.broker.seam.Broker.store`."""
        return await (await self._publisher.publish(subject, data, timeout_s))

    async def last(self, stream: str, subject: str) -> StoredMessage | None:
        """See `flame.broker.seam.Broker.last`."""
        return await read_message(self._nc, stream, {"last_by_subj": subject}, f"read {subject}")

    async def peek(self, stream: str, subject: str) -> bytes | None:
        """See `flame.broker.seam.Broker.peek`."""
        what = f"read {subject}"
        try:
            message = await self._ask(f"{API}.DIRECT.GET.{stream}.{subject}", b"", PEEK_TIMEOUT_S, what)
        except NoResponders as error:
            if await has_stream(self._nc, subject):
                raise BrokerUnavailable(f"{what}: no replica of the stream answers now") from error
            raise StreamMissing(f"{what}: no stream holds it") from error
        data: bytes = message.data
        return None if message.headers and message.headers.get(STATUS) == NOT_FOUND else data

    def read(
        self, stream: str, pattern: str, *, after: int = 0, follow: bool = False
    ) -> AsyncGenerator[StoredMessage, None]:
        """See `flame.broker.seam.Broker.read`."""
        return read_stream(self._nc, stream, pattern, after, self.on_reconnect, follow=follow)

    async def purge(self, stream: str, pattern: str, up_to: int = 0) -> int:
        """See `flame.broker.seam.Broker.purge`."""
        body: dict[str, Any] = {"filter": pattern}
        if up_to:
            body["seq"] = up_to + 1
        answer = await call(self._nc, f"STREAM.PURGE.{stream}", body, f"purge {pattern}")
        return int(answer.get("purged", 0))

    # ---- consumers

    async def create_consumer(self, spec: ConsumerSpec) -> None:
        """See `flame.broker.seam.Broker.create_consumer`."""
        config = {
            "durable_name": spec.name,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": int(spec.ack_wait_s * SECOND_NS),
            "max_deliver": -1,
            "max_ack_pending": -1,
            "max_waiting": spec.max_waiting,
            "filter_subject": spec.filter_subject,
            "replay_policy": "instant",
            "mem_storage": True,
            "num_replicas": spec.replicas,
        }
        body = {"stream_name": spec.stream, "config": config}
        verb = f"CONSUMER.DURABLE.CREATE.{spec.stream}.{spec.name}"
        await insist(self._nc, verb, body, f"create consumer {spec.name}")

    async def delete_consumer(self, stream: str, name: str) -> None:
        """See `flame.broker.seam.Broker.delete_consumer`."""
        with contextlib.suppress(ConsumerMissing, StreamMissing):
            await insist(self._nc, f"CONSUMER.DELETE.{stream}.{name}", None, f"delete consumer {name}")

    async def consumer_state(self, stream: str, name: str) -> ConsumerState:
        """See `flame.broker.seam.Broker.consumer_state`."""
        info = await call(self._nc, f"CONSUMER.INFO.{stream}.{name}", None, f"state of consumer {name}")
        return consumer_state(info)

    async def consumers(self, stream: str) -> list[ConsumerState]:
        """See `flame.broker.seam.Broker.consumers`."""
        found: list[ConsumerState] = []
        while True:
            body = {"offset": len(found)}
            answer = await call(self._nc, f"CONSUMER.LIST.{stream}", body, f"consumers of stream {stream}")
            page = answer.get("consumers") or []
            found.extend(consumer_state(info) for info in page)
            if not page or len(found) >= int(answer.get("total", 0)):
                return found

    async def pull(self, stream: str, consumer: str) -> JetStreamPuller:
        """See `flame.broker.seam.Broker.pull`."""
        puller = JetStreamPuller(self._nc, self._sender, stream, consumer)
        try:
            await puller.start()
        except (nats_errors.Error, OSError) as error:
            raise map_client_error(f"pull from {stream}/{consumer}", error) from error
        puller.forget = self.on_reconnect(puller.interrupt)
        return puller

    async def acknowledge(self, handle: str) -> None:
        """See `flame.broker.seam.Broker.acknowledge`."""
        await self.publish(handle, ACK)

    async def acknowledge_surely(self, handle: str, timeout_s: float) -> None:
        """See `flame.broker.seam.Broker.acknowledge_surely`."""
        await request(self._nc, handle, ACK, timeout_s, "acknowledge")

    async def extend(self, handle: str) -> None:
        """See `flame.broker.seam.Broker.extend`."""
        await self.publish(handle, IN_PROGRESS)

    async def hand_back(self, handle: str, delay_s: float = 0.0) -> None:
        """See `flame.broker.seam.Broker.hand_back`."""
        await self.publish(handle, NAK if delay_s <= 0 else NAK_AFTER % int(delay_s * SECOND_NS))

    # ---- buckets

    async def ensure_bucket(self, spec: BucketSpec) -> None:
        """See `flame.broker.seam.Broker.ensure_bucket`."""
        await self._ensure(bucket_stream(spec.name), bucket_config(spec))

    def bucket(self, name: str) -> JetStreamBucket:
        """See `flame.broker.seam.Broker.bucket`."""
        return JetStreamBucket(self._nc, self._publisher, name, self.on_reconnect)
