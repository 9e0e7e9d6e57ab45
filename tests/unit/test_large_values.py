"""Large inputs, outputs and common data: what is stored where, for how long, and what becomes of what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import flame
from flame.broker.errors import StreamFull
from flame.broker.memory import Faults, MemoryBroker, MemoryServer
from flame.broker.seam import Broker
from flame.errors import BrokerUnavailable, MalformedMessage, PayloadTooLarge, QueueFull
from flame.protocol import defaults, subjects, topology
from flame.protocol.api import CreateSession, UpdateCommonData, Verb
from flame.protocol.messages import ResultRecord, TaskMessage
from flame.protocol.states import TaskState
from flame.protocol.supervision import Assignment, Orders
from flame.protocol.values import ValueRef
from flame.service.renewal import Renewal
from flame.service.values import load as really_load
from flame.values import load_value, store_value
from flame_services.scheduler.left_values import LeftValues
from tests.support.cluster import eventually
from tests.support.memory_cluster import MemoryCluster
from tests.support.virtual_time import run_virtually

APP, SESSION = "app", "app-1"
STREAM = subjects.blob_stream(APP)
MUCH = defaults.INLINE_LIMIT_BYTES
PART = defaults.VALUE_PART_BYTES


def some(size: int, seed: bytes = b"") -> bytes:
    """Bytes of which no two parts are alike."""
    return random.Random(seed).randbytes(size)


# ---- references


REF = ValueRef(id="v1", size=300_000, parts=1, digest=b"d" * 32)


def test_a_reference_is_read_as_it_was_written() -> None:
    assert ValueRef.from_fields(REF.fields()) == REF
    assert ValueRef.decode(REF.encode()) == REF
    assert TaskMessage.decode(TaskMessage(input_ref=REF).encode()).input_ref == REF
    assert ResultRecord.decode(ResultRecord(TaskState.SUCCEED, output_ref=REF).encode()).output_ref == REF
    assignment = Assignment(APP, SESSION, 1, "stream", "consumer", common_data_ref=REF)
    assert Assignment.from_fields(assignment.fields()).common_data_ref == REF
    assert Orders.decode(Orders(common_data_version=1, common_data_ref=REF).encode()).common_data_ref == REF
    created = CreateSession(application=APP, common_data_ref=REF)
    assert CreateSession.check("create", created.model_dump(exclude_defaults=True)).common_data_ref == REF


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {},
        {"id": "a.b", "size": 1, "parts": 1},
        {"id": ">", "size": 1, "parts": 1},
        {"id": "", "size": 1, "parts": 1},
        {"id": 1, "size": 1, "parts": 1},
        {"id": "a", "size": 0, "parts": 1},
        {"id": "a", "size": 2**30 + 1, "parts": 1},
        {"id": "a", "size": 1.5, "parts": 1},
        {"id": "a", "size": True, "parts": 1},
        {"id": "a", "size": 5, "parts": 6},
        {"id": "a", "size": 5, "parts": 0},
        {"id": "a", "size": 5, "parts": 1, "digest": "text"},
    ],
)
def test_what_is_no_reference_is_refused(wrong: object) -> None:
    with pytest.raises(MalformedMessage):
        ValueRef.from_fields(wrong)
    with pytest.raises(flame.InvalidArgument, match="common_data_ref"):
        CreateSession.check("create", {"application": APP, "common_data_ref": wrong or "none"})


# ---- storing and loading


def with_stream(
    check: Callable[[MemoryServer, MemoryBroker], Coroutine[Any, Any, None]],
) -> Callable[[], None]:
    """Run a test in virtual time with a server that has the stream of an application."""

    async def main() -> None:
        server = MemoryServer()
        broker = server.connect()
        await broker.ensure_stream(topology.blob_stream(APP))
        await check(server, broker)
        await broker.close()

    def run() -> None:
        run_virtually(main())

    run.__name__ = run.__qualname__ = check.__name__
    return run


@pytest.mark.parametrize("size", [1, PART - 1, PART, PART + 1, 20 * PART + 7])
def test_a_value_of_any_size_comes_back_whole(size: int) -> None:
    async def main() -> None:
        broker = MemoryServer().connect()
        await broker.ensure_stream(topology.blob_stream(APP))
        data = some(size)
        for given in (data, bytearray(data), memoryview(data)):
            ref = await store_value(broker, APP, SESSION, subjects.IN, given)
            assert (ref.size, ref.parts) == (size, -(-size // PART))
            assert await load_value(broker, APP, SESSION, subjects.IN, ref) == data

    run_virtually(main())


@with_stream
async def test_parts_may_be_of_any_size(server: MemoryServer, broker: MemoryBroker) -> None:
    for number, part in enumerate((b"one", b"2", b"", b"three")):
        await broker.store(subjects.blob(APP, SESSION, subjects.IN, "v", number), part, 5)
    ref = ValueRef(id="v", size=9, parts=4)
    assert await load_value(broker, APP, SESSION, subjects.IN, ref) == b"one2three"
    for size, text in ((8, "its parts hold more than that"), (10, "its parts hold 9 bytes")):
        with pytest.raises(flame.ValueGone, match=text):
            await load_value(broker, APP, SESSION, subjects.IN, ValueRef(id="v", size=size, parts=4))


@with_stream
async def test_what_goes_wrong_on_the_way_is_done_again(server: MemoryServer, broker: MemoryBroker) -> None:
    data = some(12 * PART)
    server.faults = Faults(lose_stores=0.2, lose_store_answers=0.2, lose_requests=0.2, lose_answers=0.2)
    ref = await store_value(broker, APP, SESSION, subjects.OUT, data, ttl_s=3600)
    assert await load_value(broker, APP, SESSION, subjects.OUT, ref) == data
    server.faults = Faults()
    assert (await broker.stream_state(STREAM)).messages == 12


@with_stream
async def test_a_connection_that_is_lost_meanwhile(server: MemoryServer, broker: MemoryBroker) -> None:
    data = some(30 * PART)
    for side in (subjects.IN, subjects.OUT):
        storing = asyncio.create_task(store_value(broker, APP, SESSION, side, data))
        await asyncio.sleep(0)
        server.interrupt()
        await asyncio.sleep(10)
        server.restore()
        ref = await storing
        loading = asyncio.create_task(load_value(broker, APP, SESSION, side, ref))
        await asyncio.sleep(0)
        server.interrupt()
        await asyncio.sleep(10)
        server.restore()
        assert await loading == data


@with_stream
async def test_a_broker_that_does_not_come_back_is_not_waited_for_for_ever(
    server: MemoryServer, broker: MemoryBroker
) -> None:
    ref = await store_value(broker, APP, SESSION, subjects.IN, some(3 * PART))
    server.interrupt()
    with pytest.raises(BrokerUnavailable):
        await store_value(broker, APP, SESSION, subjects.IN, some(3 * PART))
    with pytest.raises(BrokerUnavailable):
        await load_value(broker, APP, SESSION, subjects.IN, ref)
    server.restore()


@with_stream
async def test_no_more_is_asked_for_at_once_than_a_server_keeps_for_a_connection(
    server: MemoryServer, broker: MemoryBroker
) -> None:
    data = some(12 * PART)
    refs = [await store_value(broker, APP, SESSION, subjects.IN, data) for _ in range(10)]
    peek, under_way, most = broker.peek, 0, 0

    async def counted(stream: str, subject: str) -> bytes | None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.1)
        under_way -= 1
        return await peek(stream, subject)

    broker.peek = counted  # type: ignore[method-assign]
    loaded = await asyncio.gather(*(load_value(broker, APP, SESSION, subjects.IN, ref) for ref in refs))
    assert loaded == [data] * 10
    assert most * PART <= 32 * 1024**2


@with_stream
async def test_a_part_that_is_missing_is_looked_for_and_then_named(server: MemoryServer, broker: MemoryBroker) -> None:
    ref = await store_value(broker, APP, SESSION, subjects.IN, some(3 * PART))
    part = subjects.blob(APP, SESSION, subjects.IN, ref.id, 1)
    kept = await broker.peek(STREAM, part)
    assert kept is not None
    await broker.purge(STREAM, part)
    loading = asyncio.create_task(load_value(broker, APP, SESSION, subjects.IN, ref))
    await asyncio.sleep(defaults.VALUE_MISSING_S / 2)
    await broker.store(part, kept, 5)  # as a replica that was behind
    assert len(await loading) == ref.size
    await broker.purge(STREAM, part)
    with pytest.raises(flame.ValueGone, match=rf"app-1 .*in\.{ref.id}.*part 1 of 3"):
        await load_value(broker, APP, SESSION, subjects.IN, ref)


@with_stream
async def test_more_than_may_be_is_refused_before_anything_is_stored(
    server: MemoryServer, broker: MemoryBroker
) -> None:
    with pytest.raises(PayloadTooLarge, match=r"1,073,741,825 bytes: the limit is 1,073,741,824"):
        await store_value(broker, APP, SESSION, subjects.IN, bytes(defaults.VALUE_LIMIT_BYTES + 1))
    assert (await broker.stream_state(STREAM)).messages == 0


@with_stream
async def test_an_application_that_is_gone_and_a_broker_that_is_full(
    server: MemoryServer, broker: MemoryBroker
) -> None:
    ref = await store_value(broker, APP, SESSION, subjects.IN, some(2 * PART))

    async def full(*_: object, **__: object) -> asyncio.Future[int]:
        raise StreamFull("insufficient storage (10047)")

    begin_store, broker.begin_store = broker.begin_store, full  # type: ignore[method-assign]
    with pytest.raises(QueueFull, match="no room"):
        await store_value(broker, APP, SESSION, subjects.IN, some(2 * PART))
    broker.begin_store = begin_store  # type: ignore[method-assign]
    await broker.delete_stream(STREAM)
    with pytest.raises(flame.ApplicationNotFound, match="app is not registered"):
        await store_value(broker, APP, SESSION, subjects.IN, some(2 * PART))
    with pytest.raises(flame.ApplicationNotFound, match="app is not registered"):
        await load_value(broker, APP, SESSION, subjects.IN, ref)


# ---- in a cluster


class Reverse:
    """Returns its input backwards; ``b"big"`` for as much again, ``b"common"`` for the common data."""

    def __init__(self) -> None:
        self.updates: list[int] = []

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        self.session = context

    async def on_common_data_update(self, context: flame.SessionContext) -> None:
        self.updates.append(len(context.common_data))

    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        if context.input == b"common":
            return self.session.common_data
        if context.input.startswith(b"size "):
            return bytes(int(context.input[5:]))
        return context.input[::-1]


def virtually(test: Callable[[MemoryCluster], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in virtual time with a cluster of its own."""

    async def main() -> None:
        async with MemoryCluster(MemoryServer(), Reverse) as cluster:
            await test(cluster)

    def run() -> None:
        run_virtually(main(), limit_s=200_000)

    run.__name__ = run.__qualname__ = test.__name__
    return run


async def parts_of(cluster: MemoryCluster, session: flame.Session, side: str) -> int:
    """How many parts of large values a session has on one side."""
    broker = cluster.broker_of(cluster.client())
    pattern = subjects.session_blobs(session.application, session.id, side)
    return len(await broker.subjects(subjects.blob_stream(session.application), pattern))


@virtually
async def test_large_inputs_and_outputs_look_like_any_others(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    data = some(3 * PART)
    small = await session.invoke(data[:100])
    assert (small.output, small.output_size) == (data[:100][::-1], 0)
    task = await session.invoke(data)
    assert task.output == data[::-1]
    assert task.output_size == len(data)
    assert await session.get_task(task.id) == task
    [listed] = [found for found in await session.list_tasks() if found.id == task.id]
    assert (listed.state, listed.output, listed.output_size) == (TaskState.SUCCEED, b"", len(data))
    handles = await session.create_tasks([data, b"small", data[:MUCH]])
    assert [(await handle).output for handle in handles] == [data[::-1], b"llams", data[:MUCH][::-1]]
    outputs = [found.output async for found in session.map([data, b"x", data])]
    assert outputs == [data[::-1], b"x", data[::-1]]
    assert (await session.invoke(data.hex())).output == data.hex().encode()[::-1]


@virtually
async def test_what_went_in_goes_with_the_session_and_what_came_out_stays_as_long_as_the_result(
    cluster: MemoryCluster,
) -> None:
    session = await cluster.client().create_session(await cluster.application(), some(PART, b"common"))
    data = some(2 * PART)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "VALUE_AGE_S", 100)
        task = await session.invoke(data)
    assert await parts_of(cluster, session, subjects.IN) == 3
    await session.close()
    assert await parts_of(cluster, session, subjects.IN) == 0
    other = cluster.client("other")
    [known] = [info.session for info in await other.list_sessions()]
    assert known.settled
    assert await parts_of(cluster, session, subjects.OUT) == 2
    assert (await session.get_task(task.id)).output == data[::-1]
    await asyncio.sleep(100)
    assert await parts_of(cluster, session, subjects.OUT) == 0


@virtually
async def test_an_output_that_is_gone_ends_its_task_with_an_error_that_has_it(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    task = await session.invoke(b"size 600000")
    await client.broker.purge(STREAM, subjects.session_blobs(APP, session.id, subjects.OUT))
    found = await session.get_task(task.id)
    assert (found.state, found.output, found.output_size) == (TaskState.SUCCEED, b"", 600_000)
    with pytest.raises(flame.ValueGone, match=rf"task {task.id} .*its output is gone: .*part 0 of 1") as caught:
        found.check()
    assert caught.value.task == found
    heard: list[flame.Task] = []

    class Hears(flame.TaskInformer):
        def on_update(self, task: flame.Task) -> None:
            heard.append(task)

    async def nothing(_stream: str, _subject: str) -> None:
        return None

    cluster.broker_of(client).peek = nothing  # type: ignore[method-assign,assignment]
    handle = await session.create_task(b"size 600000", Hears())
    with pytest.raises(flame.ValueGone) as caught:
        await handle
    assert caught.value.task is not None
    assert [update.state for update in heard if update.state.terminal] == [TaskState.SUCCEED]
    assert len(await session.list_tasks()) == 2


@virtually
async def test_an_input_that_is_gone_fails_its_task(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application(), max_instances=1)
    ref = ValueRef(id="nothing", size=10, parts=1)
    await client.broker.store(subjects.task(APP, session.id, "t1"), TaskMessage(input_ref=ref).encode(), 5)

    async def ended() -> flame.Task | None:
        task = await session.get_task("t1")
        return task if task.state.terminal else None

    task = await eventually(ended, "the task has ended")
    assert task.state is TaskState.FAILED
    assert task.error is not None
    assert (task.error.code, task.attempt) == ("value_gone", 0)
    assert (await session.invoke(b"ab")).output == b"ba"


@virtually
async def test_what_takes_long_on_its_way_is_no_part_of_the_run_and_keeps_its_lease(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application(), max_instances=1)
    slow = 3 * defaults.ACK_WAIT_S
    peek, begin_store = MemoryBroker.peek, MemoryBroker.begin_store

    async def peek_slowly(self: MemoryBroker, stream: str, subject: str) -> bytes | None:
        await asyncio.sleep(slow)
        return await peek(self, stream, subject)

    async def store_slowly(self: MemoryBroker, subject: str, *arguments: Any, **named: Any) -> asyncio.Future[int]:
        if named.get("ttl_s"):
            await asyncio.sleep(slow)
        return await begin_store(self, subject, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryBroker, "peek", peek_slowly)
        patch.setattr(MemoryBroker, "begin_store", store_slowly)
        began = asyncio.get_running_loop().time()
        task = await session.invoke(some(PART), options=flame.TaskOptions(timeout_s=1))
    assert (task.state, task.attempt) == (TaskState.SUCCEED, 1)
    assert task.finished - task.started < 1
    assert asyncio.get_running_loop().time() - began > 3 * slow
    assert len(cluster.executors) == 1


@virtually
async def test_a_task_that_is_cancelled_while_its_input_is_loaded_holds_nobody_up(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application(), max_instances=1)
    loop = asyncio.get_running_loop()
    await session.invoke(b"warm")
    message = TaskMessage(input_ref=ValueRef(id="nothing", size=10, parts=1)).encode()
    for task, end in (("t1", session.cancel_tasks(["t1"])), ("t2", session.close("force"))):
        await client.broker.store(subjects.task(APP, session.id, task), message, 5)
        await asyncio.sleep(1)
        began = loop.time()
        await end
        if task == "t1":
            assert (await session.invoke(b"ab")).output == b"ba"
        assert loop.time() - began < defaults.VALUE_MISSING_S / 2
        assert (await session.get_task(task)).state is TaskState.CANCELLED


@virtually
async def test_an_output_that_is_too_large_even_for_parts(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application())
    with pytest.raises(flame.TaskFailed, match=r"1,073,741,825 bytes: .*the limit is 1,073,741,824") as caught:
        await session.invoke(f"size {defaults.VALUE_LIMIT_BYTES + 1}")
    assert caught.value.task.error is not None
    assert caught.value.task.error.code == "payload_too_large"
    with pytest.raises(flame.PayloadTooLarge, match="input of 1,073,741,825 bytes"):
        await session.create_task(bytes(defaults.VALUE_LIMIT_BYTES + 1))
    assert await parts_of(cluster, session, subjects.IN) == 0


@virtually
async def test_a_large_input_under_a_key_is_stored_once(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    data = some(2 * PART)
    one = await session.create_task(data, key="k")
    assert (await one).output == data[::-1]
    again = await (await cluster.client("other").open_session(session.id)).create_task(data, key="k")
    assert (await again).output == data[::-1]
    assert again.id == one.id
    assert await parts_of(cluster, session, subjects.IN) == 2
    with pytest.raises(flame.KeyReused):
        await session.create_task(data[1:], key="k")
    both = await asyncio.gather(session.create_task(data, key="j"), session.create_task(data, key="j"))
    assert {(await handle).id for handle in both} == {both[0].id}
    assert await parts_of(cluster, session, subjects.IN) == 4


@virtually
async def test_large_common_data_is_created_compared_changed_and_removed(cluster: MemoryCluster) -> None:
    client = cluster.client()
    application = await cluster.application()
    one, two = some(2 * PART, b"1"), some(3 * PART, b"2")
    session = await client.create_session(application, one)
    assert (await session.invoke(b"common")).output == one
    spec = flame.SessionSpec(application=application, common_data=one)
    assert (await client.open_session(session.id, spec)).id == session.id
    for other in (two, b"small", b""):
        with pytest.raises(flame.SpecMismatch, match="common_data is another"):
            await client.open_session(session.id, flame.SessionSpec(application=application, common_data=other))
    assert await parts_of(cluster, session, subjects.IN) == 2
    assert await session.update_common_data(two) == 1
    assert (await session.invoke(b"common")).output == two
    assert [service.updates for service in cluster.services(application)] == [[len(two)]]
    assert await parts_of(cluster, session, subjects.IN) == 3
    with pytest.raises(flame.StaleVersion):
        await session.update_common_data(one, expected_version=0)
    assert await parts_of(cluster, session, subjects.IN) == 3
    assert await session.update_common_data(b"small") == 2
    assert (await session.invoke(b"common")).output == b"small"
    assert await parts_of(cluster, session, subjects.IN) == 0
    assert await session.update_common_data(one, expected_version=2) == 3
    assert (await session.invoke(b"common")).output == one
    await session.close()
    assert await parts_of(cluster, session, subjects.IN) == 0
    opened = await client.open_session("app-mine", flame.SessionSpec(application=application, common_data=two))
    assert (await opened.invoke(b"common")).output == two
    with pytest.raises(flame.SessionExists):
        await client.create_session(application, one, session_id="app-mine")
    assert await parts_of(cluster, opened, subjects.IN) == 3
    assert (await opened.invoke(b"common")).output == two


@virtually
async def test_streams_typed_sessions_and_who_watches(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    data = some(PART)
    async with session.stream(data) as stream:
        assert [chunk async for chunk in stream] == []
    assert stream.task.output == data[::-1]
    text = "0" * (MUCH + 2)
    answer = await session.typed(str, str).invoke(text)
    assert (answer.output, answer.task.output_size) == (text, MUCH + 4)
    others = cluster.client("other")
    watching = (await others.open_session(session.id)).watch()
    await anext(watching)
    task = await session.invoke(data)
    async for event in watching:
        if event.task_state is TaskState.SUCCEED:
            break
    assert event.task_id == task.id


@virtually
async def test_a_closed_connection_ends_the_wait_for_an_output(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    asked = asyncio.Event()

    async def never(_stream: str, _subject: str) -> bytes | None:
        asked.set()
        await asyncio.Event().wait()
        return None

    cluster.broker_of(client).peek = never  # type: ignore[method-assign,assignment]
    handle = await session.create_task(some(PART))
    await asked.wait()
    assert not handle.done()
    await client.close()
    with pytest.raises(BrokerUnavailable):
        await handle


def test_common_data_that_is_replaced_while_it_is_loaded_is_asked_for_again() -> None:
    async def main() -> None:
        async def load(ref: ValueRef) -> bytes:
            if ref.id == "gone":
                raise flame.ValueGone("part 0 of 1")
            return b"newest"

        async def updated(_context: flame.SessionContext) -> None:
            return None

        context = flame.SessionContext(SESSION, APP, b"old")
        renewal = Renewal(Assignment(APP, SESSION, 1, "stream", "consumer"), context, updated, load)
        gone, kept = (ValueRef(id=name, size=6, parts=1) for name in ("gone", "kept"))
        assert renewal.want(1)
        renewal.hear(Orders(common_data_version=1, common_data_ref=gone))
        await renewal.apply()
        assert (renewal.version, renewal.wanted, context.common_data) == (0, 1, b"old")
        renewal.hear(Orders(common_data_version=2, common_data_ref=kept))
        await renewal.apply()
        assert (renewal.version, renewal.wanted, context.common_data) == (2, 0, b"newest")
        renewal.want(3)
        for last in (False, True):  # nothing has replaced it: it is missing
            renewal.hear(Orders(common_data_version=3, common_data_ref=ValueRef(id="gone", size=7, parts=1)))
            with pytest.raises(flame.ValueGone) if last else contextlib.nullcontext():
                await renewal.apply()

    run_virtually(main())


@pytest.mark.parametrize("newest", [b"small", some(2 * PART, b"newest")], ids=["by small data", "by large data"])
def test_common_data_that_is_replaced_before_its_session_is_entered_costs_no_attempt(
    newest: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    @virtually
    async def test(cluster: MemoryCluster) -> None:
        client = cluster.client()
        session = await client.create_session(await cluster.application(), some(PART))
        replaced: list[int] = []

        async def load(broker: Broker, assignment: Assignment, ref: ValueRef) -> bytes:
            if not replaced:  # its executor knows where the data is, and is about to load it
                replaced.append(await session.update_common_data(newest))
            return await really_load(broker, assignment, ref)

        monkeypatch.setattr("flame.service.executor.load", load)
        assert (await session.invoke(b"common")).output == newest
        assert replaced == [1]
        info = await client.get_session(session.id)
        assert info.session.bind_failures == 0
        assert [service.updates for service in cluster.services(session.application)] == [[]]

    test()


@virtually
async def test_common_data_that_is_not_all_there_is_refused(cluster: MemoryCluster) -> None:
    client = cluster.client()
    application = await cluster.application()
    ref = ValueRef(id="nothing", size=10, parts=1, digest=b"d" * 32)
    wanted = CreateSession(application=application, id="app-1", common_data_ref=ref)
    with pytest.raises(flame.ValueGone, match="0 of 1 parts"):
        await client._create(wanted)
    for wrong in (
        wanted.model_copy(update={"id": None}),
        wanted.model_copy(update={"common_data": b"both"}),
        wanted.model_copy(update={"common_data_ref": ValueRef(id="nothing", size=10, parts=1)}),
    ):
        with pytest.raises(flame.InvalidArgument, match="common_data_ref"):
            await client._create(wrong)
    session = await client.create_session(application)
    with pytest.raises(flame.ValueGone):
        await client.call(
            Verb.UPDATE_COMMON_DATA,
            UpdateCommonData(session=session.id, data_ref=ref, token="t"),
            type(session._record),
        )


# ---- what is left


@with_stream
async def test_what_was_stored_for_a_session_that_never_came_goes_after_an_hour(
    server: MemoryServer, broker: MemoryBroker
) -> None:
    over = {"never", "settled"}

    async def is_over(session: str) -> bool:
        return session in over

    values = LeftValues(broker, is_over)
    applications = (APP, "unregistered-meanwhile")
    for session in ("open", "never", "settled"):
        for side in (subjects.IN, subjects.OUT):
            await store_value(broker, APP, session, side, some(PART + 1))

    async def parts(session: str) -> tuple[int, int]:
        found = await broker.subjects(STREAM, subjects.blob(APP, session, "*", "*", "*"))
        return (
            sum(f".{subjects.IN}." in subject for subject in found),
            sum(f".{subjects.OUT}." in subject for subject in found),
        )

    await values.look(applications, 100.0)
    await values.look(applications, 100.0 + defaults.VALUE_ORPHAN_S - 1)  # not yet
    assert [await parts(session) for session in ("open", "never", "settled")] == [(2, 2)] * 3
    late = await store_value(broker, APP, "never", subjects.IN, some(PART + 1))
    over.discard("settled")  # it was opened meanwhile
    await values.look(applications, 100.0 + defaults.VALUE_ORPHAN_S)
    assert [await parts(session) for session in ("open", "never", "settled")] == [(2, 2)] * 3
    assert await load_value(broker, APP, "never", subjects.IN, late)
    await values.look(applications, 100.0 + 2 * defaults.VALUE_ORPHAN_S)
    assert await parts("never") == (0, 2)
    assert await parts("open") == (2, 2)


@virtually
async def test_inputs_of_a_session_that_goes_on_go_when_their_tasks_have_ended(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application(), some(PART), idle_timeout_s=0)
    delayed = flame.TaskOptions(delay_s=10_000)
    waiting = await session.create_task(some(PART), options=delayed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "VALUE_ORPHAN_S", 60)
        await session.invoke(some(PART), key="one")
        await session.invoke(some(2 * PART))
        assert await parts_of(cluster, session, subjects.IN) == 5
        await asyncio.sleep(200)
        assert await parts_of(cluster, session, subjects.IN) == 2, "the common data's, and that of the task that waits"
        await waiting
        await asyncio.sleep(200)
    assert await parts_of(cluster, session, subjects.IN) == 1
    assert await session.update_common_data(b"") == 1


@virtually
async def test_the_scheduler_looks_for_what_is_left(cluster: MemoryCluster) -> None:
    client = cluster.client()
    application = await cluster.application()
    session = await client.create_session(application, some(PART), idle_timeout_s=0)
    await store_value(client.broker, application, "app-never", subjects.IN, some(PART))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "VALUE_ORPHAN_S", 60)
        await asyncio.sleep(200)
    stored = await client.broker.subjects(STREAM, subjects.all_blobs(application))
    assert {subjects.stored_value(subject)[0] for subject in stored} == {session.id}
