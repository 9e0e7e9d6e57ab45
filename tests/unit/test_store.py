"""The control plane's records in the buckets and in the view: what is written here counts at once, and stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from flame.broker.errors import RevisionConflict
from flame.broker.memory import MemoryServer
from flame.broker.seam import Broker, Entry
from flame.errors import BrokerUnavailable, MalformedMessage, UnsupportedVersion
from flame.protocol import subjects, topology
from flame.protocol.codec import VERSION, pack
from flame.protocol.records import BindingRecord, NodeRecord, SessionRecord
from flame.protocol.resources import Resources
from flame.protocol.states import NodeState, SessionState
from flame.protocol.topology import BucketSpec
from flame_services.scheduler import table as table_module
from flame_services.scheduler.store import Store
from flame_services.scheduler.table import Table
from flame_services.scheduler.view import View

BUCKET = subjects.BINDINGS
KEY = "n.x"
BOUND = BindingRecord(
    executor="x", node="n", application="app", session="s", epoch=1, consumer=subjects.consumer("s", 1), created=1.0
)
LEAVING = BOUND.changed(leave=True)


def node_record(name: str) -> NodeRecord:
    return NodeRecord(name=name, hostname="h", arch="x", os="y", capacity=Resources(4, 2**30, 0), started=1.0)


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


async def test_what_can_not_be_read_is_known_to_be_there(table: Table[BindingRecord], fed: Fed, broker: Broker) -> None:
    await broker.bucket(BUCKET).put(KEY, b"rubbish")
    await broker.bucket(BUCKET).put("n.y", BOUND.encode())
    watch = await table.follow()
    assert fed.now == {"n.y": BOUND}
    assert set(table.unreadable) == {KEY}
    with pytest.raises(MalformedMessage, match=f"{BUCKET}: {KEY}"):
        await table.get(KEY)
    with pytest.raises(RevisionConflict):
        await table.create(KEY, BOUND)
    await watch.stop()


async def test_what_becomes_unreadable_is_forgotten_until_it_can_be_read_again(
    table: Table[BindingRecord], fed: Fed, broker: Broker
) -> None:
    watch = await table.follow()
    await table.create(KEY, BOUND)
    newer = pack({**BOUND.model_dump(), "v": VERSION + 1})
    await broker.bucket(BUCKET).put(KEY, newer)
    await fed.until({})
    assert set(table.unreadable) == {KEY}
    with pytest.raises(UnsupportedVersion):
        await table.get(KEY)
    await broker.bucket(BUCKET).put(KEY, LEAVING.encode())
    await fed.until({KEY: LEAVING})
    assert table.unreadable == {}
    await watch.stop()


async def test_what_could_not_be_read_and_was_deleted_is_gone(
    table: Table[BindingRecord], fed: Fed, broker: Broker
) -> None:
    await broker.bucket(BUCKET).put(KEY, b"rubbish")
    watch = await table.follow()
    await broker.bucket(BUCKET).delete(KEY)
    await broker.bucket(BUCKET).put("n.y", BOUND.encode())
    await fed.until({"n.y": BOUND})
    assert table.unreadable == {}
    await table.create(KEY, BOUND)
    assert fed.now == {KEY: BOUND, "n.y": BOUND}
    await watch.stop()


async def test_that_something_can_not_be_read_is_said_once(
    table: Table[BindingRecord], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        table_module, "log", SimpleNamespace(warning=lambda _text, **fields: said.append(fields["key"]))
    )
    for data in (b"rubbish", b"other rubbish"):
        await broker.bucket(BUCKET).put(KEY, data)
        await table.refresh(KEY)
        await table.refresh(KEY)
    assert said == [KEY]


async def test_a_write_that_was_not_acknowledged_is_looked_for(
    broker: Broker, table: Table[BindingRecord], fed: Fed, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = table._bucket
    put, get = bucket.put, bucket.get

    async def unheard(key: str, value: bytes) -> int:
        await put(key, value)
        raise BrokerUnavailable("no answer")

    monkeypatch.setattr(bucket, "put", unheard)
    with pytest.raises(BrokerUnavailable):
        await table.put(KEY, BOUND)
    assert fed.now == {}

    async def interrupted(key: str) -> Entry | None:
        found = await get(key)
        with pytest.raises(BrokerUnavailable):
            await table.put(key, LEAVING)
        return found

    monkeypatch.setattr(bucket, "get", interrupted)
    await table.settle_doubts()
    assert fed.now == {KEY: BOUND}
    monkeypatch.setattr(bucket, "get", get)
    await table.settle_doubts()
    assert fed.now == {KEY: LEAVING}


async def test_a_doubt_stays_while_the_broker_does_not_answer(
    table: Table[BindingRecord], fed: Fed, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = table._bucket
    put, get = bucket.put, bucket.get

    async def away(*_: object) -> int:
        raise BrokerUnavailable("no answer")

    await put(KEY, BOUND.encode())
    monkeypatch.setattr(bucket, "put", away)
    monkeypatch.setattr(bucket, "get", away)
    with pytest.raises(BrokerUnavailable):
        await table.put(KEY, LEAVING)
    with pytest.raises(BrokerUnavailable):
        await table.settle_doubts()
    monkeypatch.setattr(bucket, "get", get)
    await table.settle_doubts()
    assert fed.now == {KEY: BOUND}


@pytest.fixture
async def kept(broker: Broker) -> AsyncIterator[Store]:
    """All tables of an empty cluster, and the view that they feed."""
    for bucket in topology.buckets():
        await broker.ensure_bucket(bucket)
    made = Store(broker, View())
    await made.start()
    yield made
    await made.stop()


async def write_past(broker: Broker, bucket: str, table: Table[Any], key: str, data: bytes) -> None:
    """Write something that a table doesn't know of, and let it know."""
    await broker.bucket(bucket).put(key, data)
    await table.refresh(key)


async def test_a_session_that_can_not_be_read_is_known(kept: Store, broker: Broker) -> None:
    await write_past(broker, subjects.SESSIONS, kept.sessions, "s", b"rubbish")
    assert await kept.is_known("s")
    assert not await kept.is_known("other")
    assert not kept.readable("a", "s")
    assert kept.readable("a", "other")
    await write_past(broker, subjects.APPLICATIONS, kept.applications, "a", b"rubbish")
    assert not kept.readable("a", "other")


async def test_a_node_that_can_not_be_read_lives_while_it_beats_and_takes_nothing_new(
    kept: Store, broker: Broker
) -> None:
    view = kept._view
    await write_past(broker, subjects.NODES, kept.nodes, "n", node_record("n").encode())
    assert view.nodes["n"].takes
    seen_at = view.nodes["n"].seen_at
    await asyncio.sleep(0.01)
    for name in ("n", "another"):
        await write_past(broker, subjects.NODES, kept.nodes, name, pack({"v": VERSION + 1}))
        assert view.nodes[name].state is NodeState.READY
        assert not view.nodes[name].takes
    assert view.nodes["n"].seen_at > seen_at
    assert view.nodes["n"].record.hostname == node_record("n").hostname


async def test_a_binding_and_an_executor_that_can_not_be_read_are_what_they_were(kept: Store, broker: Broker) -> None:
    view = kept._view
    await kept.bindings.create(KEY, BOUND)
    await write_past(broker, BUCKET, kept.bindings, KEY, b"rubbish")
    assert view.bindings == {KEY: BOUND}
    assert kept.readable("app", "s")
    newer = pack({**BOUND.model_dump(), "v": VERSION + 1})
    await write_past(broker, BUCKET, kept.bindings, KEY, newer)
    assert not kept.readable("app", "s")
    assert kept.readable("app", "other")
    await broker.bucket(BUCKET).delete(KEY)
    await kept.bindings.refresh(KEY)
    assert view.bindings == {}
    assert kept.readable("app", "s")


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
