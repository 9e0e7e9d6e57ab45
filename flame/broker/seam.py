"""The seam to the broker: the few operations that everything else is written against.

`flame.broker.jetstream.connect` returns the implementation on NATS. Nothing outside `flame.broker` knows NATS.
Operations raise the classes of `flame.broker.errors`, and `flame.errors.BrokerUnavailable` where the connection
is gone for good.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from flame.errors import FlameError
from flame.protocol.topology import BucketSpec, ConsumerSpec, StreamSpec


class LiveMessage(NamedTuple):
    """A message that passed by; nobody keeps it for a listener that was away."""

    subject: str
    data: bytes
    stored_as: str
    """The subject under which a stream stored it, if a stream announced it; otherwise empty."""


class StoredMessage(NamedTuple):
    """A message in a stream."""

    subject: str
    data: bytes
    sequence: int
    stored_at: float = 0.0
    """When the broker stored it, Unix seconds by its clock."""


class Delivery(NamedTuple):
    """A task handed to this executor for as long as its lease lasts."""

    subject: str
    data: bytes
    handle: str
    """What acknowledging, extending and handing back name it by."""
    delivered: int
    """How often this consumer has delivered it, this time included."""
    sequence: int
    """Its place in the stream."""
    pending: int
    """Messages of the consumer that were not delivered yet."""

    @property
    def stored_at(self) -> float:
        """When the broker stored it, Unix seconds by its clock; found out each time, since hardly anybody asks."""
        raise NotImplementedError  # each broker's deliveries say so; a named tuple can't be abstract


class Entry(NamedTuple):
    """A value in a bucket."""

    key: str
    value: bytes | None
    """``None``: it was deleted."""
    revision: int


class StreamState(NamedTuple):
    """How much a stream holds."""

    messages: int
    last_sequence: int


class ConsumerState(NamedTuple):
    """What a consumer has to do."""

    name: str
    pending: int
    """Not delivered yet."""
    unacknowledged: int
    """Delivered and not finished."""


LiveHandler = Callable[[LiveMessage], None]
RequestHandler = Callable[[bytes], Awaitable[bytes]]
SubjectHandler = Callable[[str, bytes], Awaitable[bytes]]
EntryHandler = Callable[[Entry], None]
Listener = Callable[[], None]
OnStored = Callable[[int, FlameError | None], None]
"""Gets the sequence of what was stored, or 0 and why it wasn't."""


class Subscription(Protocol):
    """Something that is listened to until it is stopped."""

    async def stop(self) -> None:
        """Hear nothing more. Safe to call twice and after the connection has closed."""


class Bucket(Protocol):
    """Values by key. Reads are answered by the leader: they see every write that was acknowledged before."""

    async def get(self, key: str) -> Entry | None:
        """Return the value, or ``None`` if there is none."""

    async def create(self, key: str, value: bytes) -> int:
        """Write a key that has no value and return its revision; otherwise raise `RevisionConflict`."""

    async def update(self, key: str, value: bytes, revision: int) -> int:
        """Write a key that still has ``revision`` and return the new one; otherwise raise `RevisionConflict`."""

    async def put(self, key: str, value: bytes) -> int:
        """Write a key whatever it holds and return its revision: for keys with one writer."""

    async def delete(self, key: str, revision: int | None = None) -> None:
        """Remove a key and its history; with ``revision`` only if it still has that."""

    async def clear(self, pattern: str) -> int:
        """Remove all keys that match, with their history; return how many there were. Watchers hear nothing of it."""

    async def entries(self, pattern: str = ">") -> list[Entry]:
        """Read all values whose keys match, in the order of their last change."""

    async def watch(self, pattern: str, handler: EntryHandler, on_repair: Listener | None = None) -> Subscription:
        """Call ``handler`` for every value there is, return, and go on calling it for every change.

        A value that is overwritten at once may be skipped, the last one never.
        After a reconnect or a lost message everything is read again: a handler may hear a value twice, and hears
        of keys that vanished meanwhile as deletions. ``on_repair`` is called after each such reading.
        """


class Puller(Protocol):
    """Takes tasks from one consumer, in bursts."""

    async def burst(self, most: int, wait_s: float) -> Sequence[Delivery]:
        """Wait up to ``wait_s`` for one message, then take what is there too, up to ``most`` in all.

        Returns when nothing more is on its way: an executor that blocks afterwards keeps nothing from others.
        Empty if nothing came or the connection was interrupted. Raises `ConsumerMissing`.
        """

    async def stop(self) -> Sequence[Delivery]:
        """Ask for nothing more and return what still arrived: it must be handed back."""


class Broker(Protocol):
    """A connection to a broker."""

    @property
    def endpoint(self) -> str:
        """Where it is connected to, without credentials."""

    @property
    def connected(self) -> bool:
        """Whether it is connected now."""

    async def close(self) -> None:
        """Send what is buffered and end the connection. Idempotent."""

    def on_reconnect(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` after every reconnect; returns what takes that back."""

    # ---- live messages

    async def publish(self, subject: str, data: bytes) -> None:
        """Send to whoever listens now. Nothing tells whether anybody did."""

    async def subscribe(self, subject: str, handler: LiveHandler) -> Subscription:
        """Call ``handler`` for every message from now on, in order."""

    async def first(self, subject: str) -> tuple[asyncio.Future[bytes], Subscription]:
        """Return a future that brings the data of the first message from now on; cheap to hold for a long time."""

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """Ask whoever serves ``subject``. Raises `NoResponders` or `NotAcknowledged`."""

    async def answer(self, subject: str, handler: SubjectHandler) -> Subscription:
        """Serve requests on ``subject``, several at once; the handler gets the subject and the request."""

    async def serve(self, name: str, version: str, prefix: str, verbs: Mapping[str, RequestHandler]) -> Subscription:
        """Serve a discoverable service, sharing its requests with every other process that does."""

    # ---- streams

    async def ensure_stream(self, spec: StreamSpec) -> None:
        """Create a stream, or bring it to ``spec``."""

    async def delete_stream(self, name: str) -> None:
        """Remove a stream with all it holds; no error if there is none."""

    async def stream_state(self, name: str) -> StreamState:
        """Tell how much a stream holds, by its leader."""

    async def subjects(self, stream: str, pattern: str) -> dict[str, int]:
        """Count the stored messages by subject, by the stream's leader; at most 100,000 subjects."""

    async def first_stored(self, stream: str, pattern: str, after: int = 0) -> StoredMessage | None:
        """Read the oldest message behind the sequence ``after`` whose subject matches, by the stream's leader."""

    async def begin_store(
        self, subject: str, data: bytes, timeout_s: float, then_acknowledge: str = "", ttl_s: float = 0.0
    ) -> asyncio.Future[int]:
        """Send a message to its stream; the future brings its sequence once it is stored.

        With ``ttl_s``, in whole seconds, it is gone after that; only for a stream with `StreamSpec.message_ttl`.

        With ``then_acknowledge``, the delivery of that handle is acknowledged as soon as the subject holds a message,
        this one or (`Duplicate`) an earlier one. The future fails with `Duplicate`, `StreamFull`, `StreamMissing`, or
        `NotAcknowledged` after ``timeout_s``. Many may be under way at once; they are stored in the order of the calls.
        """

    async def store_then(
        self, subject: str, data: bytes, timeout_s: float, on_done: OnStored, then_acknowledge: str = ""
    ) -> None:
        """As `begin_store`, but call ``on_done`` instead of bringing a future: for the hot path. It must not raise."""

    async def store(self, subject: str, data: bytes, timeout_s: float) -> int:
        """Store a message and return its sequence. Errors as in `begin_store`."""

    async def last(self, stream: str, subject: str) -> StoredMessage | None:
        """Read the last message of a subject, by the stream's leader: what it doesn't find was not there."""

    async def peek(self, stream: str, subject: str) -> bytes | None:
        """Read the data of the last message of a subject, by any replica of a stream with `StreamSpec.direct`.

        Cheaper than `last`, above all for large messages; a replica may be behind, and not have it yet. Asks once:
        raises `BrokerUnavailable` where no replica answers, and `StreamMissing`.
        """

    def read(
        self, stream: str, pattern: str, *, after: int = 0, follow: bool = False
    ) -> AsyncGenerator[StoredMessage, None]:
        """Read the stored messages whose subject matches, in order, from the one behind the sequence ``after``.

        Ends with the last one that was there when it began; with ``follow`` it goes on with what is stored from then
        on. It survives reconnects: each message comes once, unless a limit of the stream removed it before. Whoever
        takes messages slowly holds the broker back and loses none. Raises `StreamMissing`, also later, and
        `BrokerUnavailable` where the connection is closed for good or, without ``follow``, interrupted for long.
        """

    async def purge(self, stream: str, pattern: str, up_to: int = 0) -> int:
        """Remove the stored messages whose subject matches and return how many.

        With ``up_to``, only those with that sequence or a lower one.
        """

    # ---- consumers

    async def create_consumer(self, spec: ConsumerSpec) -> None:
        """Create a consumer; one of the same name and specification is left as it is.

        Raises `ConsumerConflict` if another one has its filter, `StreamMissing` if there is no stream.
        """

    async def delete_consumer(self, stream: str, name: str) -> None:
        """Remove a consumer; no error if there is none. What it had delivered waits again."""

    async def consumer_state(self, stream: str, name: str) -> ConsumerState:
        """Tell what a consumer has to do; raises `ConsumerMissing`."""

    async def consumers(self, stream: str) -> list[ConsumerState]:
        """Tell of every consumer of a stream."""

    async def pull(self, stream: str, consumer: str) -> Puller:
        """Begin to take tasks from a consumer."""

    async def acknowledge(self, handle: str) -> None:
        """Say that a delivery is finished; the stream drops it. Nothing tells whether that arrived."""

    async def acknowledge_surely(self, handle: str, timeout_s: float) -> None:
        """Acknowledge, and return when the broker has taken this and every earlier acknowledgement.

        Raises `NotAcknowledged`, or `NoResponders` if the consumer is gone.
        """

    async def extend(self, handle: str) -> None:
        """Ask for another ``ack_wait`` for a delivery."""

    async def hand_back(self, handle: str, delay_s: float = 0.0) -> None:
        """Give a delivery back to be delivered again: at once, or after ``delay_s``, once it is nobody's.

        The delay is its consumer's: it ends when that is deleted, or when somebody extends the delivery.
        """

    # ---- buckets

    async def ensure_bucket(self, spec: BucketSpec) -> None:
        """Create a bucket, or bring it to ``spec``."""

    def bucket(self, name: str) -> Bucket:
        """Return a bucket; its operations raise `StreamMissing` if it does not exist."""
