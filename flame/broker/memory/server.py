"""The in-memory server: streams, buckets, whoever listens, and the connections to it.

It differs from JetStream in these points, on none of which a program of ours relies:

- What NATS may leave unsaid is said at once: a pull that doesn't wait is always answered.
- A request to a subject that only a stream listens to gets no answer; JetStream acknowledges its storing.
- A watch is told of changes directly, without a consumer, and notices a lost one at the next or after 2 s. Keys that
  it finds gone are told with the bucket's newest revision.
- Nothing is asked again behind the caller's back: an answer that is lost is `NotAcknowledged` after its time limit.
- Consumers can't be updated: another specification under the same name is refused.
- Sizes are those of subject and data, without headers, and there is one server: replicas mean nothing.
"""

from __future__ import annotations

from typing import TypeVar

from flame.broker.errors import BrokerError, StreamMissing
from flame.broker.memory.broker import MemoryBroker
from flame.broker.memory.clock import Clock, LoopClock
from flame.broker.memory.consumer import MemoryConsumer, read_handle
from flame.broker.memory.exchange import Exchange, Message, Unanswered
from flame.broker.memory.faults import Chance, Faults
from flame.broker.memory.patterns import collide, matches, rewrite
from flame.broker.memory.stream import MemoryStream
from flame.broker.memory.table import MemoryTable
from flame.protocol import defaults
from flame.protocol.topology import BucketSpec, StreamSpec

T = TypeVar("T")


class MemoryServer:
    """A server for the programs of one event loop.

    Args:
        seed: Decides when a fault happens.
        clock: By which leases, ages and time limits pass; ``None`` takes the running loop's.
        faults: What may go wrong.
        max_payload_bytes: The largest message.
    """

    def __init__(
        self,
        seed: int = 0,
        clock: Clock | None = None,
        faults: Faults | None = None,
        *,
        max_payload_bytes: int = defaults.MAX_PAYLOAD_BYTES,
    ) -> None:
        self.clock: Clock = LoopClock() if clock is None else clock
        self.chance = Chance(seed, Faults() if faults is None else faults)
        self.max_payload_bytes = max_payload_bytes
        self.exchange = Exchange(self.clock, self.chance)
        self.streams: dict[str, MemoryStream] = {}
        self.tables: dict[str, MemoryTable] = {}
        self._brokers: dict[MemoryBroker, None] = {}

    # ---- for tests

    @property
    def faults(self) -> Faults:
        """What may go wrong from now on."""
        return self.chance.faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self.chance.faults = faults

    def connect(self, name: str = "flame") -> MemoryBroker:
        """Return a new connection. Called in the loop that it will be used in."""
        broker = MemoryBroker(self, name)
        self._brokers[broker] = None
        return broker

    def interrupt(self, broker: MemoryBroker | None = None) -> None:
        """Break a connection, or all: what is under way is lost, and what is sent from now on waits."""
        for connection in self._brokers if broker is None else (broker,):
            connection.calls.link.interrupt()

    def restore(self, broker: MemoryBroker | None = None) -> None:
        """Connect again what is not connected, one connection or all; their listeners for reconnects are called."""
        for connection in list(self._brokers) if broker is None else (broker,):
            connection.calls.link.restore()

    def restart(self, *, lose_consumers: bool = True) -> None:
        """Break and restore every connection; a server that stands alone comes back without its consumers."""
        broken = [broker for broker in self._brokers if broker.connected]
        for broker in broken:
            self.interrupt(broker)
        if lose_consumers:
            for stream in self.streams.values():
                for name in list(stream.consumers):
                    stream.delete_consumer(name)
        for broker in broken:
            self.restore(broker)

    # ---- for connections

    def forget(self, broker: MemoryBroker) -> None:
        """Drop a connection that was closed."""
        self._brokers.pop(broker, None)

    def publish(self, subject: str, data: bytes, ttl_s: float = 0.0) -> int:
        """Send to whoever listens and store where a stream takes it; return the sequence there.

        Raises `StreamMissing` if nobody is there at all, `Unanswered` if there are just listeners, and what storing
        raises.
        """
        heard = self.exchange.send(Message(subject, data))
        stream = self._taking(subject)
        if stream is None:
            if heard:
                raise Unanswered
            raise StreamMissing("no stream takes it")
        sequence = stream.store(subject, data, ttl_s)
        if stream.spec.republish is not None:
            announced = rewrite(*stream.spec.republish, subject)
            if announced is not None:
                self.exchange.send(Message(announced, data, stored_as=subject))
        return sequence

    def _taking(self, subject: str) -> MemoryStream | None:
        for stream in self.streams.values():
            if any(matches(pattern, subject) for pattern in stream.spec.subjects):
                return stream
        return None

    def stream(self, name: str) -> MemoryStream:
        """Return a stream; raise `StreamMissing`."""
        return _found(self.streams, name, "stream")

    def table(self, name: str) -> MemoryTable:
        """Return a bucket; raise `StreamMissing`."""
        return _found(self.tables, name, "bucket")

    def consumer_of(self, handle: str) -> tuple[MemoryConsumer, int] | None:
        """Return the consumer that a delivery came from, or the one that has its name now, and the sequence."""
        named = read_handle(handle)
        if named is None:
            return None
        stream = self.streams.get(named[0])
        consumer = None if stream is None else stream.consumers.get(named[1])
        return None if consumer is None else (consumer, named[2])

    def ensure_stream(self, spec: StreamSpec) -> None:
        """Create a stream, or bring it to ``spec``."""
        for other in self.streams.values():
            if other.spec.name == spec.name:
                continue
            if any(collide(ours, theirs) for ours in spec.subjects for theirs in other.spec.subjects):
                raise BrokerError(f"create stream {spec.name}: subjects overlap with an existing stream (10065)")
        stream = self.streams.get(spec.name)
        if stream is None:
            self.streams[spec.name] = MemoryStream(spec, self.clock, self.chance)
        else:
            stream.change(spec)

    def delete_stream(self, name: str) -> None:
        """Remove a stream with all it holds, if it is there."""
        stream = self.streams.pop(name, None)
        if stream is not None:
            for consumer in list(stream.consumers):
                stream.delete_consumer(consumer)

    def ensure_bucket(self, spec: BucketSpec) -> None:
        """Create a bucket, or bring it to ``spec``."""
        table = self.tables.get(spec.name)
        if table is None:
            self.tables[spec.name] = MemoryTable(spec, self.clock)
        else:
            table.spec = spec


def _found(things: dict[str, T], name: str, noun: str) -> T:
    thing = things.get(name)
    if thing is None:
        raise StreamMissing(f"{noun} {name} not found (10059)")
    return thing
