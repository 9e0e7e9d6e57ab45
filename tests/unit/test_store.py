"""The control plane's records in the buckets and in the view: what is written here counts at once, and stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from flame.broker.errors import RevisionConflict
from flame.broker.memory import MemoryServer
from flame.broker.seam import Broker, Entry
from flame.protocol import subjects
from flame.protocol.records import BindingRecord, SessionRecord
from flame.protocol.states import SessionState
from flame.protocol.topology import BucketSpec
from flame_services.scheduler.store import Table
from tests.unit.test_plan import binding

BUCKET = subjects.BINDINGS
KEY = "n.x"
BOUND = binding("s", "n", "x")
LEAVING = BOUND.changed(leave=True)


class Fed:
    """What a view would have been told."""

    def __init__(self) -> None:
        self.now: dict[str, BindingRecord] = {}
        self.changes = 0
        self._changed = asyncio.Event()

    def __call__(self, key: str, record: BindingRecord | None, _revision: int) -> None:
        self.changes += 1
        if record is None:
            self.now.pop(key, None)
        else:
            self.now[key] = record
        self._changed.set()

    async def until(self, expected: dict[str, BindingRecord]) -> None:
        async with asyncio.timeout(10):
            while self.now != expected:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    made = MemoryServer().connect()
    await made.ensure_bucket(BucketSpec(name=BUCKET))
    yield made
    await made.close()


@pytest.fixture
def fed() -> Fed:
    return Fed()


@pytest.fixture
def table(broker: Broker, fed: Fed) -> Table[BindingRecord]:
    return Table(broker, BUCKET, BindingRecord, "*.*", fed)


async def test_what_is_written_here_is_known_at_once_and_not_told_twice(
    table: Table[BindingRecord], fed: Fed, broker: Broker
) -> None:
    watch = await table.follow()
    await table.create(KEY, BOUND)
    assert fed.now == {KEY: BOUND}
    await table.put(KEY, LEAVING)
    assert fed.now == {KEY: LEAVING}
    await broker.bucket(BUCKET).put("n.y", BOUND.encode())
    await fed.until({KEY: LEAVING, "n.y": BOUND})
    assert fed.changes == 3
    await watch.stop()


async def test_what_is_deleted_here_is_gone_at_once_and_not_brought_back_by_what_was_under_way(
    table: Table[BindingRecord], fed: Fed
) -> None:
    first = await table.create(KEY, BOUND)
    await table.put(KEY, LEAVING)
    await table.delete(KEY)
    assert fed.now == {}
    for late in (Entry(KEY, BOUND.encode(), first), Entry(KEY, LEAVING.encode(), first + 1)):
        table._on_entry(late)
        assert fed.now == {}
    table._on_entry(Entry(KEY, None, first + 2))
    assert fed.now == {}


async def test_a_key_that_was_deleted_can_be_written_again(table: Table[BindingRecord], fed: Fed) -> None:
    first = await table.create(KEY, BOUND)
    await table.delete(KEY)
    await table.create(KEY, LEAVING)
    table._on_entry(Entry(KEY, None, first + 1))  # the deletion is heard of only now
    assert fed.now == {KEY: LEAVING}
    await table.delete(KEY)
    assert fed.now == {}


async def test_a_key_that_somebody_else_deleted_and_wrote_again_is_there(
    table: Table[BindingRecord], fed: Fed, broker: Broker
) -> None:
    bucket = broker.bucket(BUCKET)
    watch = await table.follow()
    await table.create(KEY, BOUND)
    await bucket.delete(KEY)
    await bucket.create(KEY, LEAVING.encode())
    await fed.until({KEY: LEAVING})
    await watch.stop()


async def test_what_can_not_be_read_is_ignored(table: Table[BindingRecord], fed: Fed, broker: Broker) -> None:
    await broker.bucket(BUCKET).put(KEY, b"rubbish")
    await broker.bucket(BUCKET).put("n.y", BOUND.encode())
    watch = await table.follow()
    assert fed.now == {"n.y": BOUND}
    assert await table.get(KEY) is None
    await watch.stop()


async def test_a_change_is_tried_again_when_somebody_else_was_quicker(broker: Broker) -> None:
    await broker.ensure_bucket(BucketSpec(name=subjects.SESSIONS))
    bucket = broker.bucket(subjects.SESSIONS)
    table = Table(broker, subjects.SESSIONS, SessionRecord, "*", lambda *_: None)
    revision = await table.create("s", SessionRecord(id="s", application="a", created=1.0))
    stale = SessionRecord(id="s", application="a", created=1.0)
    attempts: list[int] = []

    def close(record: SessionRecord) -> SessionRecord:
        attempts.append(record.epoch)
        return record.changed(state=SessionState.CLOSING)

    get = table.get

    async def overtaken(key: str) -> tuple[SessionRecord, int] | None:
        found = await get(key)
        if not attempts:
            await bucket.put(key, stale.changed(epoch=7).encode())
        return found

    table.get = overtaken  # type: ignore[method-assign]
    changed = await table.change("s", close)
    assert changed is not None
    assert attempts == [0, 7]
    assert (changed.epoch, changed.state) == (7, SessionState.CLOSING)
    with pytest.raises(RevisionConflict):
        await table.update("s", stale, revision)


async def test_nothing_is_written_when_nothing_changes(broker: Broker, table: Table[BindingRecord]) -> None:
    await table.create(KEY, BOUND)
    before = await broker.bucket(BUCKET).get(KEY)
    assert await table.change(KEY, lambda record: record) == BOUND
    assert await table.change(KEY, lambda _: None) == BOUND
    assert await table.change("n.nobody", lambda record: record) is None
    assert await broker.bucket(BUCKET).get(KEY) == before
