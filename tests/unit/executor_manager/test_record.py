"""An executor's record: every state, in order, and counts now and then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from flame.broker.errors import NotAcknowledged
from flame.broker.seam import Broker
from flame.protocol.records import ExecutorRecord
from flame.protocol.states import ExecutorState
from flame_services.executor_manager import record as module
from flame_services.executor_manager.record import RecordWriter


class Store:
    """A broker with one bucket, which can be away."""

    def __init__(self) -> None:
        self.connected = True
        self.refusals = 0
        self.written: list[ExecutorRecord | None] = []
        self.times: list[float] = []

    def bucket(self, name: str) -> Store:
        return self

    async def put(self, key: str, value: bytes) -> int:
        assert key == "n1.e1"
        await asyncio.sleep(0)
        self._maybe_refuse()
        self.written.append(ExecutorRecord.decode(value))
        self.times.append(time.monotonic())
        return len(self.written)

    async def delete(self, key: str, revision: int | None = None) -> None:
        self._maybe_refuse()
        self.written.append(None)

    def _maybe_refuse(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise NotAcknowledged("no answer in time")

    @property
    def states(self) -> list[str]:
        return [found.state.value if found else "deleted" for found in self.written]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(module, "COUNTS_S", 0.05)
    monkeypatch.setattr(module, "_RETRY_FIRST_S", 0.001)
    return Store()


@pytest.fixture
def writer(store: Store) -> RecordWriter:
    return RecordWriter(cast(Broker, store), "n1", "e1")


def record(state: ExecutorState, **fields: Any) -> ExecutorRecord:
    usual: dict[str, Any] = {
        "id": "e1",
        "node": "n1",
        "application": "a",
        "session": "s",
        "epoch": 1,
        "created": 1.0,
        "updated": 1.0,
    }
    return ExecutorRecord(**(usual | {"state": state} | fields))


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def test_every_state_is_written_in_order(store: Store, writer: RecordWriter) -> None:
    for state in ExecutorState:
        writer.put(record(state))
    await writer.settled()
    assert store.states == [state.value for state in ExecutorState]


async def test_of_several_records_in_one_state_the_last_is_written(store: Store, writer: RecordWriter) -> None:
    for count in range(100):
        writer.put(record(ExecutorState.BOUND, succeeded=count))
    await writer.settled()
    assert [found.succeeded for found in store.written if found] == [99]


async def test_counts_are_written_now_and_then(store: Store, writer: RecordWriter) -> None:
    writer.put(record(ExecutorState.BOUND))
    await writer.settled()
    for count in (1, 2, 3):
        writer.put(record(ExecutorState.BOUND, succeeded=count))
        await asyncio.sleep(0)
    await writer.settled()
    assert [found.succeeded for found in store.written if found] == [0, 3]
    assert store.times[1] - store.times[0] >= 0.04


async def test_a_new_state_does_not_wait_for_counts(
    store: Store, writer: RecordWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COUNTS_S", 60.0)
    writer.put(record(ExecutorState.BOUND))
    await writer.settled()
    writer.put(record(ExecutorState.BOUND, succeeded=5))
    await asyncio.sleep(0.01)
    assert store.states == ["bound"]
    writer.put(record(ExecutorState.UNBINDING, succeeded=6))
    async with asyncio.timeout(5):
        await writer.settled()
    assert store.states == ["bound", "unbinding"], "which brings the counts along"
    assert [found.succeeded for found in store.written if found] == [0, 6]


async def test_what_is_refused_is_written_again_with_the_newest_counts(store: Store, writer: RecordWriter) -> None:
    store.refusals = 3
    writer.put(record(ExecutorState.BOUND, succeeded=1))
    await until(lambda: store.refusals < 3)
    writer.put(record(ExecutorState.BOUND, succeeded=2))
    await writer.settled()
    assert [found.succeeded for found in store.written if found] == [2]


async def test_a_state_that_is_refused_is_written_again_before_the_next(store: Store, writer: RecordWriter) -> None:
    store.refusals = 3
    writer.put(record(ExecutorState.BOUND, succeeded=1))
    await until(lambda: store.refusals < 3)
    writer.put(record(ExecutorState.BOUND, succeeded=2))
    writer.put(record(ExecutorState.RELEASED, succeeded=3))
    await writer.settled()
    assert store.states == ["bound", "released"]
    assert store.written[-1] is not None
    assert store.written[-1].succeeded == 3


async def test_nothing_is_sent_into_a_connection_that_is_away(store: Store, writer: RecordWriter) -> None:
    store.connected = False
    writer.put(record(ExecutorState.BOUND))
    await asyncio.sleep(0.02)
    assert store.written == []
    store.connected = True
    await writer.settled()
    assert store.states == ["bound"]


async def test_a_deletion_is_the_last_word(store: Store, writer: RecordWriter) -> None:
    store.refusals = 2
    writer.put(record(ExecutorState.BOUND))
    await until(lambda: store.refusals < 2)
    writer.delete()
    writer.put(record(ExecutorState.RELEASED))
    await writer.settled()
    assert store.states == ["deleted"]


async def test_it_can_be_given_up(store: Store, writer: RecordWriter) -> None:
    store.connected = False
    writer.put(record(ExecutorState.BOUND))
    await writer.close()
    await writer.settled()
    assert store.written == []
