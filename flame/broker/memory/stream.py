"""A stream: messages in the order in which they were stored, within its limits."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from flame.broker.errors import BrokerError, ConsumerConflict, Duplicate, StreamFull
from flame.broker.memory.clock import Clock
from flame.broker.memory.consumer import MemoryConsumer
from flame.broker.memory.faults import Chance
from flame.broker.memory.patterns import PatternTree, collide, is_literal, matches
from flame.broker.seam import StoredMessage, StreamState
from flame.protocol.topology import ConsumerSpec, Retention, StreamSpec

_OVERHEAD_BYTES: Final = 30
"""Of a stored message, beyond its subject and its data, in nats-server's files."""


class _Stored(NamedTuple):
    message: StoredMessage
    at: float
    size: int


class MemoryStream:
    """One stream and its consumers. Nothing here waits or sends: callers do."""

    def __init__(self, spec: StreamSpec, clock: Clock, chance: Chance) -> None:
        """Make an empty one."""
        self.spec = spec
        self._clock = clock
        self._chance = chance
        self._stored: OrderedDict[int, _Stored] = OrderedDict()
        self._by_subject: dict[str, dict[int, None]] = {}
        self._bytes = 0
        self._last = 0
        self._ends: list[tuple[float, int]] = []
        """When messages with a time to live of their own go, the next one first, and their sequences."""
        self._by_filter: PatternTree[MemoryConsumer] = PatternTree()
        self.consumers: dict[str, MemoryConsumer] = {}
        self.followers: PatternTree[Callable[[], None]] = PatternTree()
        """Called when something was stored."""

    def change(self, spec: StreamSpec) -> None:
        """Bring it to another specification; raise `BrokerError` if that can't be done."""
        if spec.retention is not self.spec.retention:
            raise BrokerError(f"update stream {spec.name}: its retention can't change to or from work (10052)")
        self.spec = spec
        self._make_room()

    # ---- messages

    def store(self, subject: str, data: bytes, ttl_s: float = 0.0) -> int:
        """Store a message and return its sequence; raise `Duplicate`, `StreamFull` or `BrokerError`."""
        self._expire()
        spec = self.spec
        if ttl_s and not spec.message_ttl:
            raise BrokerError("per-message TTL is disabled (10166)")
        size = _OVERHEAD_BYTES + len(subject) + len(data)
        taken = self._by_subject.get(subject) if spec.one_per_subject else None
        if spec.refuse_when_full:
            if taken:
                raise Duplicate("maximum messages per subject exceeded (10077)")
            if 0 <= spec.max_messages <= len(self._stored):
                raise StreamFull("maximum messages exceeded (10077)")
            if 0 <= spec.max_bytes < self._bytes + size:
                raise StreamFull("maximum bytes exceeded (10077)")
        elif taken:
            self.remove(next(iter(taken)))
        self._last += 1
        message = StoredMessage(subject, data, self._last, time.time())
        self._stored[self._last] = _Stored(message, self._clock.time(), size)
        self._by_subject.setdefault(subject, {})[self._last] = None
        if ttl_s:
            heapq.heappush(self._ends, (self._clock.time() + ttl_s, self._last))
        self._bytes += size
        self._make_room()
        for consumer in self._by_filter.find(subject):
            consumer.offer(self._last)
        for tell in self.followers.find(subject):
            tell()
        return self._last

    def message(self, sequence: int) -> StoredMessage | None:
        """Return a message that is still there."""
        stored = self._stored.get(sequence)
        return None if stored is None else stored.message

    def remove(self, sequence: int) -> None:
        """Drop a message, if it is still there."""
        stored = self._stored.pop(sequence, None)
        if stored is None:
            return
        subject = stored.message.subject
        sequences = self._by_subject[subject]
        del sequences[sequence]
        if not sequences:
            del self._by_subject[subject]
        self._bytes -= stored.size
        for consumer in self._by_filter.find(subject):
            consumer.forget(sequence)

    def state(self) -> StreamState:
        """Tell how much it holds."""
        self._expire()
        return StreamState(len(self._stored), self._last)

    def subjects(self, pattern: str) -> dict[str, int]:
        """Count messages by subject."""
        self._expire()
        return {subject: len(found) for subject, found in self._by_subject.items() if matches(pattern, subject)}

    def last(self, pattern: str) -> StoredMessage | None:
        """Return the newest message whose subject matches."""
        self._expire()
        if is_literal(pattern):
            found = self._by_subject.get(pattern)
            return self.message(next(reversed(found))) if found else None
        stored = reversed(self._stored.values())
        return next((s.message for s in stored if matches(pattern, s.message.subject)), None)

    def behind(self, pattern: str, after: int, most: int) -> list[StoredMessage]:
        """Return the oldest messages behind a sequence whose subject matches."""
        self._expire()
        found = (
            stored.message
            for sequence, stored in self._stored.items()
            if sequence > after and matches(pattern, stored.message.subject)
        )
        return list(itertools.islice(found, most))

    def purge(self, pattern: str, up_to: int) -> int:
        """Drop messages whose subject matches, up to a sequence if that isn't 0, and return how many."""
        self._expire()
        found = [
            sequence
            for sequence, stored in self._stored.items()
            if (not up_to or sequence <= up_to) and matches(pattern, stored.message.subject)
        ]
        for sequence in found:
            self.remove(sequence)
        return len(found)

    def matching(self, pattern: str) -> list[int]:
        """Return the sequences of messages whose subject matches, oldest first."""
        self._expire()
        return [sequence for sequence, stored in self._stored.items() if matches(pattern, stored.message.subject)]

    def _expire(self) -> None:
        while self._ends and self._ends[0][0] <= self._clock.time():
            self.remove(heapq.heappop(self._ends)[1])
        if self.spec.max_age_s <= 0:
            return
        oldest = self._clock.time() - self.spec.max_age_s
        while self._stored and (first := next(iter(self._stored.values()))).at <= oldest:
            self.remove(first.message.sequence)

    def _make_room(self) -> None:
        """Drop the oldest while over a limit, where new messages are not refused instead."""
        spec = self.spec
        while not spec.refuse_when_full and (
            0 <= spec.max_messages < len(self._stored) or 0 <= spec.max_bytes < self._bytes
        ):
            self.remove(next(iter(self._stored)))

    # ---- consumers

    def create_consumer(self, spec: ConsumerSpec) -> None:
        """Make a consumer, unless it is there; raise `ConsumerConflict` or `BrokerError`."""
        same = self.consumers.get(spec.name)
        if same is not None:
            if same.spec != spec:
                raise BrokerError(f"create consumer {spec.name}: it exists with another specification (10012)")
            return
        if self.spec.retention is Retention.WORK:
            for other in self.consumers.values():
                if collide(other.spec.filter_subject, spec.filter_subject):
                    raise ConsumerConflict(
                        f"create consumer {spec.name}: filtered consumer not unique on workqueue stream (10100)"
                    )
        consumer = self.consumers[spec.name] = MemoryConsumer(spec, self, self._clock, self._chance)
        self._by_filter.add(spec.filter_subject, consumer)

    def delete_consumer(self, name: str, why: str = "Consumer Deleted") -> None:
        """Drop a consumer, if it is there; whoever waits for it hears ``why``."""
        consumer = self.consumers.pop(name, None)
        if consumer is not None:
            self._by_filter.remove(consumer.spec.filter_subject, consumer)
            consumer.end(why)
