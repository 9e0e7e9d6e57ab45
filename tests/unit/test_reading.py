"""When a reading of a bucket is complete: when the leader says so, whatever its consumer believes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from flame.broker import watch
from flame.broker.errors import NotAcknowledged
from flame.broker.seam import Entry
from flame.broker.watch import LOOKS, Reading
from tests.support.cluster import eventually


@dataclass
class Message:
    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None = None


@dataclass
class Leader:
    """Says what is stored, and stands in for the client."""

    newest: int = 0
    unreachable: bool = False
    asked: int = 0
    counted: int = 0
    """What a new consumer says there is for it."""
    is_connected: bool = True
    on_message: Callable[[Message], Any] = field(default=print)
    delivered: int = 0

    def new_inbox(self) -> str:
        return "inbox"

    async def subscribe(self, _subject: str, cb: Callable[[Message], Any]) -> Leader:
        self.on_message = cb
        return self

    async def unsubscribe(self) -> None:
        """Stand in for the subscription, too."""

    async def publish(self, _subject: str) -> None:
        """Take the request to forget the consumer."""

    async def deliver(self, sequence: int, pending: int) -> None:
        self.delivered += 1
        reply = f"$JS.ACK.S.C.1.{sequence}.{self.delivered}.0.{pending}"
        await self.on_message(Message("$KV.b.key", b"value", reply))

    async def beat(self) -> None:
        await self.on_message(Message("inbox", b"", "", {"Status": "100"}))


@pytest.fixture
def leader(monkeypatch: pytest.MonkeyPatch) -> Leader:
    leader = Leader()

    async def call(_nc: Leader, what: str, *_: object) -> dict[str, Any]:
        state = {"state": {"last_seq": leader.newest}}
        return state if what.startswith("STREAM.INFO") else {"name": "C", "num_pending": leader.counted}

    async def newest_sequence(*_: object) -> int:
        leader.asked += 1
        if leader.unreachable:
            raise NotAcknowledged("nobody answers")
        return leader.newest

    monkeypatch.setattr(watch, "call", call)
    monkeypatch.setattr(watch, "newest_sequence", newest_sequence)
    return leader


@pytest.fixture
def entries() -> list[Entry]:
    return []


@pytest.fixture
async def reading(leader: Leader, entries: list[Entry]) -> Reading:
    return Reading(leader, "KV_b", "$KV.b.", ">", entries.append)  # type: ignore[arg-type]  # what it needs of a client


async def asked(leader: Leader, times: int) -> None:
    await eventually(lambda: leader.asked == times, f"the leader was asked {times} times")


async def test_an_empty_bucket_is_read_when_the_leader_says_that_it_is_empty(leader: Leader, reading: Reading) -> None:
    await reading.start()
    await reading.complete
    assert leader.asked == 1
    await reading.stop()


async def test_a_consumer_that_is_behind_is_waited_for(leader: Leader, reading: Reading) -> None:
    leader.newest, leader.counted = 7, 1
    await reading.start()
    await leader.deliver(3, pending=0)
    await asked(leader, 1)
    assert not reading.complete.done()
    await leader.deliver(5, pending=0)
    assert leader.asked == 1, "what the leader told of is not there yet"
    await leader.deliver(7, pending=4)
    await reading.complete
    assert leader.asked == 2
    await reading.stop()


async def test_a_value_that_was_written_again_meanwhile_is_waited_for(
    leader: Leader, reading: Reading, entries: list[Entry]
) -> None:
    leader.newest, leader.counted = 9, 2  # of the two that were counted, 3 has become 9
    await reading.start()
    await leader.deliver(4, pending=0)
    await asked(leader, 1)
    assert not reading.complete.done()
    await leader.deliver(9, pending=0)
    await reading.complete
    assert [entry.revision for entry in entries] == [4, 9]
    await reading.stop()


async def test_values_that_went_meanwhile_are_not_waited_for(leader: Leader, reading: Reading) -> None:
    leader.newest, leader.counted = 5, 2
    await reading.start()
    await leader.deliver(4, pending=1)
    assert leader.asked == 0
    leader.newest = 4
    await leader.beat()
    await reading.complete
    await reading.stop()


async def test_what_comes_while_the_leader_is_asked_counts_as_no_look(leader: Leader, reading: Reading) -> None:
    leader.newest, leader.counted = 500, 1
    await reading.start()
    for sequence in range(1, LOOKS + 3):
        await leader.deliver(sequence, pending=0)
    await asked(leader, 1)
    assert not reading.complete.done()
    await leader.deliver(500, pending=0)
    await reading.complete
    await reading.stop()


async def test_a_bucket_that_is_written_without_end_is_read_all_the_same(leader: Leader, reading: Reading) -> None:
    leader.newest, leader.counted = 2, 1
    await reading.start()
    for look in range(1, LOOKS + 1):
        assert not reading.complete.done()
        leader.newest = leader.delivered + 2
        await leader.deliver(leader.delivered + 1, pending=0)
        await asked(leader, look)
    await reading.complete
    await reading.stop()


async def test_a_replica_that_stays_behind_is_not_given_up(leader: Leader, reading: Reading) -> None:
    leader.newest = 1
    await reading.start()
    await asked(leader, 1)
    for look in range(2, 2 * LOOKS):
        await leader.beat()
        await asked(leader, look)
    assert not reading.complete.done()
    await leader.deliver(1, pending=0)
    await reading.complete
    await reading.stop()


async def test_a_leader_that_can_not_be_asked_breaks_the_reading(leader: Leader, reading: Reading) -> None:
    leader.unreachable = True
    await reading.start()
    await reading.broken.wait()
    assert not reading.complete.done()
    await reading.stop()
