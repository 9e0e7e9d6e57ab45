"""The seam to the broker: consumers, and taking tasks from them in bursts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from flame.broker.errors import ConsumerConflict, ConsumerMissing, Duplicate, NoResponders, StreamMissing
from flame.broker.seam import Broker, ConsumerState, Delivery, Puller
from flame.errors import BrokerUnavailable
from flame.protocol import subjects, topology
from flame.protocol.topology import ConsumerSpec
from tests.contract.conftest import LIMIT_S, CutOff
from tests.support.cluster import eventually

SHORT_S = 0.5
"""A lease that runs out while a test waits for it."""


def tasks_of(application: str) -> topology.StreamSpec:
    """A stream as tasks wait in, but small."""
    return replace(topology.task_stream(application), max_bytes=2**20, max_messages=10_000)


def consumer_of(application: str, session: str = "s", epoch: int = 1, lease_s: float = 10 * LIMIT_S) -> ConsumerSpec:
    return replace(topology.session_consumer(application, session, epoch, 8), ack_wait_s=lease_s)


@pytest.fixture
async def application(broker: Broker, name: str) -> str:
    """An application with its streams."""
    await broker.ensure_stream(tasks_of(name))
    await broker.ensure_stream(topology.result_stream(name))
    return name


async def ask(broker: Broker, application: str, tasks: Sequence[str], session: str = "s") -> None:
    """Store tasks."""
    stores = [
        await broker.begin_store(subjects.task(application, session, task), task.encode(), LIMIT_S) for task in tasks
    ]
    await asyncio.gather(*stores)


async def pull(broker: Broker, spec: ConsumerSpec) -> Puller:
    """Make a consumer and begin to take from it."""
    await broker.create_consumer(spec)
    return await broker.pull(spec.stream, spec.name)


async def take(puller: Puller, count: int) -> list[Delivery]:
    """Take exactly so many tasks."""
    taken: list[Delivery] = []
    async with asyncio.timeout(LIMIT_S):
        while len(taken) < count:
            taken.extend(await puller.burst(count - len(taken), 1.0))
    return taken


def names(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.data.decode() for delivery in deliveries]


# ---- consumers come and go


async def test_a_consumer_can_be_made_any_number_of_times(broker: Broker, application: str) -> None:
    await ask(broker, application, ["a", "b"])
    spec = consumer_of(application)
    puller = await pull(broker, spec)
    await take(puller, 1)
    await broker.create_consumer(spec)
    assert await broker.consumer_state(spec.stream, spec.name) == ConsumerState(spec.name, 1, 1)


async def test_a_second_consumer_of_the_same_session_is_a_conflict(broker: Broker, application: str) -> None:
    await broker.create_consumer(consumer_of(application, epoch=1))
    with pytest.raises(ConsumerConflict):
        await broker.create_consumer(consumer_of(application, epoch=2))
    await broker.create_consumer(consumer_of(application, session="other", epoch=1))
    await broker.delete_consumer(subjects.task_stream(application), "s-1")
    await broker.create_consumer(consumer_of(application, epoch=2))


async def test_a_consumer_needs_its_stream(broker: Broker, name: str) -> None:
    with pytest.raises(StreamMissing):
        await broker.create_consumer(consumer_of(name))


async def test_a_consumer_that_is_missing_can_be_deleted_and_nothing_else(broker: Broker, application: str) -> None:
    stream = subjects.task_stream(application)
    await broker.delete_consumer(stream, "nobody-1")
    await broker.delete_consumer("no-stream", "nobody-1")
    with pytest.raises(ConsumerMissing):
        await broker.consumer_state(stream, "nobody-1")
    puller = await broker.pull(stream, "nobody-1")
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(ConsumerMissing):
            await puller.burst(1, 10 * LIMIT_S)


async def test_a_consumer_tells_what_waits_and_what_is_under_way(broker: Broker, application: str) -> None:
    spec = consumer_of(application)
    await ask(broker, application, ["a", "b", "c"])
    puller = await pull(broker, spec)
    assert await broker.consumer_state(spec.stream, spec.name) == ConsumerState("s-1", 3, 0)
    (delivery,) = await take(puller, 1)
    assert await broker.consumer_state(spec.stream, spec.name) == ConsumerState("s-1", 2, 1)
    await broker.acknowledge_surely(delivery.handle, LIMIT_S)
    assert await broker.consumer_state(spec.stream, spec.name) == ConsumerState("s-1", 2, 0)


async def test_every_consumer_of_a_stream_is_told(broker: Broker, application: str) -> None:
    stream = subjects.task_stream(application)
    assert await broker.consumers(stream) == []
    for n in range(300):  # more than fit on a page
        await broker.create_consumer(consumer_of(application, session=f"s{n}"))
    await ask(broker, application, ["a", "b"], session="s7")
    found = {state.name: state for state in await broker.consumers(stream)}
    assert set(found) == {f"s{n}-1" for n in range(300)}
    assert found["s7-1"] == ConsumerState("s7-1", 2, 0)
    assert found["s8-1"] == ConsumerState("s8-1", 0, 0)


# ---- taking tasks


async def test_a_task_that_waits_is_taken_at_once(broker: Broker, application: str) -> None:
    await ask(broker, application, ["a"])
    puller = await pull(broker, consumer_of(application))
    async with asyncio.timeout(LIMIT_S):
        (delivery,) = await puller.burst(1, 10 * LIMIT_S)
    assert delivery.subject == subjects.task(application, "s", "a")
    assert (delivery.data, delivery.delivered, delivery.sequence, delivery.pending) == (b"a", 1, 1, 0)
    assert delivery.handle


async def test_a_task_that_comes_later_ends_the_wait(broker: Broker, other: Broker, application: str) -> None:
    puller = await pull(broker, consumer_of(application))
    waiting = asyncio.create_task(puller.burst(10, 10 * LIMIT_S))
    await broker.consumer_state(subjects.task_stream(application), "s-1")  # the request has arrived before this
    assert not waiting.done()
    await ask(other, application, ["a"])
    async with asyncio.timeout(LIMIT_S):
        assert names(await waiting) == ["a"]


async def test_a_wait_for_nothing_ends_in_time(broker: Broker, application: str) -> None:
    puller = await pull(broker, consumer_of(application))
    async with asyncio.timeout(LIMIT_S):
        assert list(await puller.burst(10, 0.1)) == []


async def test_a_burst_takes_what_is_there_in_order_and_no_more_than_it_may(broker: Broker, application: str) -> None:
    tasks = [f"t{n:03}" for n in range(100)]
    await ask(broker, application, tasks)
    puller = await pull(broker, consumer_of(application))
    async with asyncio.timeout(LIMIT_S):
        first = await puller.burst(30, LIMIT_S)
        assert names(first) == tasks[:30]
        assert first[-1].pending == 70
        rest = await puller.burst(1000, LIMIT_S)
    assert names(rest) == tasks[30:]
    assert rest[-1].pending == 0
    assert [d.sequence for d in rest] == list(range(31, 101))


async def test_a_session_sees_only_its_own_tasks(broker: Broker, application: str) -> None:
    await ask(broker, application, ["mine"], session="s")
    await ask(broker, application, ["theirs"], session="other")
    mine = await pull(broker, consumer_of(application, session="s"))
    theirs = await pull(broker, consumer_of(application, session="other"))
    async with asyncio.timeout(LIMIT_S):
        assert names(await mine.burst(10, LIMIT_S)) == ["mine"]
        assert names(await theirs.burst(10, LIMIT_S)) == ["theirs"]
        assert names(await mine.burst(10, 0.1)) == []


async def test_two_who_share_a_consumer_never_get_the_same_task(
    broker: Broker, other: Broker, application: str
) -> None:
    spec = consumer_of(application)
    tasks = [f"t{n:03}" for n in range(200)]
    pullers = [await pull(broker, spec), await pull(other, spec)]
    await ask(broker, application, tasks)
    taken: list[str] = []
    async with asyncio.timeout(LIMIT_S):
        while len(taken) < len(tasks):
            for burst in await asyncio.gather(*(puller.burst(7, 0.2) for puller in pullers)):
                taken.extend(names(burst))
    assert sorted(taken) == tasks


async def test_nothing_is_on_its_way_to_who_does_not_ask(broker: Broker, other: Broker, application: str) -> None:
    spec = consumer_of(application)
    blocked, free = await pull(broker, spec), await pull(other, spec)
    await ask(broker, application, ["first"])
    assert names(await take(blocked, 1)) == ["first"]
    tasks = [f"t{n}" for n in range(20)]
    await ask(broker, application, tasks)
    assert names(await take(free, 20)) == tasks


async def test_who_waits_in_vain_keeps_nothing_from_others_afterwards(
    broker: Broker, other: Broker, application: str
) -> None:
    spec = consumer_of(application)
    waited, free = await pull(broker, spec), await pull(other, spec)
    assert list(await waited.burst(5, 0.1)) == []
    await ask(broker, application, ["a", "b"])
    assert names(await take(free, 2)) == ["a", "b"]


async def test_tasks_of_a_binding_that_is_made_later_are_there_from_the_start(broker: Broker, application: str) -> None:
    await ask(broker, application, ["a", "b"])
    puller = await pull(broker, consumer_of(application))
    assert names(await take(puller, 2)) == ["a", "b"]


# ---- leases


async def test_an_acknowledged_task_is_gone(broker: Broker, application: str) -> None:
    stream = subjects.task_stream(application)
    await ask(broker, application, ["a"])
    puller = await pull(broker, consumer_of(application, lease_s=SHORT_S))
    (delivery,) = await take(puller, 1)
    with pytest.raises(Duplicate):
        await ask(broker, application, ["a"])
    await broker.acknowledge_surely(delivery.handle, LIMIT_S)
    assert (await broker.stream_state(stream)).messages == 0
    assert await broker.last(stream, delivery.subject) is None
    assert list(await puller.burst(1, 2 * SHORT_S)) == []
    await ask(broker, application, ["a"])


async def test_an_acknowledgement_takes_every_earlier_one_with_it(broker: Broker, application: str) -> None:
    stream = subjects.task_stream(application)
    await ask(broker, application, [f"t{n}" for n in range(50)])
    puller = await pull(broker, consumer_of(application))
    *earlier, last = await take(puller, 50)
    for delivery in earlier:
        await broker.acknowledge(delivery.handle)
    await broker.acknowledge_surely(last.handle, LIMIT_S)
    assert (await broker.stream_state(stream)).messages == 0


async def test_a_task_may_be_acknowledged_twice(broker: Broker, application: str) -> None:
    await ask(broker, application, ["a"])
    puller = await pull(broker, consumer_of(application))
    (delivery,) = await take(puller, 1)
    await broker.acknowledge(delivery.handle)
    await broker.acknowledge_surely(delivery.handle, LIMIT_S)
    await broker.acknowledge_surely(delivery.handle, LIMIT_S)


async def test_a_task_that_is_not_finished_comes_back_when_its_lease_has_run_out(
    broker: Broker, other: Broker, application: str
) -> None:
    spec = consumer_of(application, lease_s=SHORT_S)
    await ask(broker, application, ["a"])
    gone, next_one = await pull(broker, spec), await pull(other, spec)
    (first,) = await take(gone, 1)
    (second,) = await take(next_one, 1)
    assert (second.subject, second.data, second.sequence) == (first.subject, first.data, first.sequence)
    assert (first.delivered, second.delivered) == (1, 2)


async def test_a_lease_that_is_extended_does_not_run_out(broker: Broker, other: Broker, application: str) -> None:
    spec = consumer_of(application, lease_s=SHORT_S)
    await ask(broker, application, ["a"])
    holder, next_one = await pull(broker, spec), await pull(other, spec)
    (delivery,) = await take(holder, 1)
    for _ in range(10):
        await broker.extend(delivery.handle)
        assert list(await next_one.burst(1, SHORT_S / 3)) == []
    assert names(await take(next_one, 1)) == ["a"]


async def test_a_task_that_is_handed_back_comes_again_at_once(broker: Broker, other: Broker, application: str) -> None:
    spec = consumer_of(application)
    await ask(broker, application, ["a", "b", "c"])
    first, second = await pull(broker, spec), await pull(other, spec)
    (delivery,) = await take(first, 1)
    await other.hand_back(delivery.handle)  # by somebody else's connection, as a manager does
    taken = await take(second, 3)
    assert sorted((d.data, d.delivered) for d in taken) == [(b"a", 2), (b"b", 1), (b"c", 1)]


async def test_a_task_that_is_handed_back_for_later_comes_then_and_not_before(
    broker: Broker, other: Broker, application: str
) -> None:
    spec = consumer_of(application)
    await ask(broker, application, ["a", "b"])
    first, second = await pull(broker, spec), await pull(other, spec)
    (delivery,) = await take(first, 1)
    begun = time.monotonic()
    await broker.hand_back(delivery.handle, delay_s=2 * SHORT_S)
    assert names(await take(second, 1)) == ["b"]
    assert list(await second.burst(1, SHORT_S)) == []
    assert await broker.consumer_state(spec.stream, spec.name) == ConsumerState("s-1", 0, 2)
    (again,) = await take(second, 1)
    assert time.monotonic() - begun > 1.9 * SHORT_S
    assert (again.data, again.delivered, again.sequence) == (b"a", 2, delivery.sequence)


async def test_a_task_that_waits_to_come_again_can_be_finished(broker: Broker, application: str) -> None:
    spec = consumer_of(application)
    await ask(broker, application, ["a"])
    puller = await pull(broker, spec)
    (delivery,) = await take(puller, 1)
    await broker.hand_back(delivery.handle, delay_s=SHORT_S)
    await broker.acknowledge_surely(delivery.handle, LIMIT_S)
    assert (await broker.stream_state(spec.stream)).messages == 0
    assert list(await puller.burst(1, 2 * SHORT_S)) == []


async def test_a_delay_goes_with_its_consumer(broker: Broker, application: str) -> None:
    old, new = consumer_of(application, epoch=1), consumer_of(application, epoch=2)
    await ask(broker, application, ["a"])
    (delivery,) = await take(await pull(broker, old), 1)
    await broker.hand_back(delivery.handle, delay_s=10 * LIMIT_S)
    await broker.delete_consumer(old.stream, old.name)
    assert names(await take(await pull(broker, new), 1)) == ["a"]


async def test_a_delivery_tells_when_it_was_stored(broker: Broker, application: str) -> None:
    before = time.time()
    await ask(broker, application, ["a"])
    after = time.time()
    puller = await pull(broker, consumer_of(application))
    (first,) = await take(puller, 1)
    await broker.hand_back(first.handle, delay_s=SHORT_S)
    (second,) = await take(puller, 1)
    for delivery in (first, second):
        assert before - 0.01 <= delivery.stored_at <= after + 0.01


async def test_a_delivery_that_is_late_can_still_be_finished(broker: Broker, other: Broker, application: str) -> None:
    spec = consumer_of(application, lease_s=SHORT_S)
    await ask(broker, application, ["a"])
    late, next_one = await pull(broker, spec), await pull(other, spec)
    (first,) = await take(late, 1)
    (second,) = await take(next_one, 1)
    await broker.acknowledge_surely(first.handle, LIMIT_S)
    assert (await broker.stream_state(spec.stream)).messages == 0
    await other.extend(second.handle)
    await other.acknowledge_surely(second.handle, LIMIT_S)


# ---- a record, then the acknowledgement


async def test_a_task_is_finished_when_its_record_is_stored(broker: Broker, application: str) -> None:
    await ask(broker, application, ["a"])
    puller = await pull(broker, consumer_of(application))
    (delivery,) = await take(puller, 1)
    record = subjects.result(application, "s", "a")
    await (await broker.begin_store(record, b"done", LIMIT_S, delivery.handle))
    stream = subjects.task_stream(application)

    async def gone() -> bool:
        return (await broker.stream_state(stream)).messages == 0

    await eventually(gone, "the task is acknowledged")
    assert await broker.last(subjects.result_stream(application), record) is not None


async def test_a_task_is_finished_when_it_has_a_record_already(broker: Broker, application: str) -> None:
    await ask(broker, application, ["a"])
    puller = await pull(broker, consumer_of(application))
    (delivery,) = await take(puller, 1)
    record = subjects.result(application, "s", "a")
    await broker.store(record, b"somebody else's", LIMIT_S)
    with pytest.raises(Duplicate):
        await (await broker.begin_store(record, b"ours", LIMIT_S, delivery.handle))
    stream = subjects.task_stream(application)

    async def gone() -> bool:
        return (await broker.stream_state(stream)).messages == 0

    await eventually(gone, "the task is acknowledged")
    found = await broker.last(subjects.result_stream(application), record)
    assert found is not None
    assert found.data == b"somebody else's"


async def test_a_task_whose_record_was_not_stored_is_not_finished(broker: Broker, application: str) -> None:
    await ask(broker, application, ["a"])
    spec = consumer_of(application)
    puller = await pull(broker, spec)
    (delivery,) = await take(puller, 1)
    with pytest.raises(StreamMissing):
        await (await broker.begin_store("no.such.stream", b"done", LIMIT_S, delivery.handle))
    assert await broker.consumer_state(spec.stream, spec.name) == ConsumerState("s-1", 0, 1)


# ---- the end of a consumer


async def test_what_a_deleted_consumer_had_delivered_waits_again(broker: Broker, application: str) -> None:
    old, new = consumer_of(application, epoch=1), consumer_of(application, epoch=2)
    await ask(broker, application, ["a", "b", "c"])
    puller = await pull(broker, old)
    taken = await take(puller, 2)
    await broker.delete_consumer(old.stream, old.name)
    again = await take(await pull(broker, new), 3)
    assert names(again) == ["a", "b", "c"]
    assert [d.delivered for d in again] == [1, 1, 1]
    assert again[0].sequence == taken[0].sequence


async def test_an_acknowledgement_to_a_deleted_consumer_does_nothing(broker: Broker, application: str) -> None:
    old, new = consumer_of(application, epoch=1), consumer_of(application, epoch=2)
    await ask(broker, application, ["a"])
    (stale,) = await take(await pull(broker, old), 1)
    await broker.delete_consumer(old.stream, old.name)
    await broker.create_consumer(new)
    for say in (broker.acknowledge, broker.extend, broker.hand_back):
        await say(stale.handle)
    with pytest.raises(NoResponders):
        await broker.acknowledge_surely(stale.handle, LIMIT_S)
    assert await broker.consumer_state(new.stream, new.name) == ConsumerState("s-2", 1, 0)


async def test_a_wait_ends_when_its_consumer_is_deleted(broker: Broker, other: Broker, application: str) -> None:
    spec = consumer_of(application)
    puller = await pull(broker, spec)
    waiting = asyncio.create_task(puller.burst(1, 10 * LIMIT_S))
    await broker.consumer_state(spec.stream, spec.name)
    await other.delete_consumer(spec.stream, spec.name)
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(ConsumerMissing):
            await waiting


async def test_a_puller_goes_on_when_its_consumer_is_there_again(broker: Broker, application: str) -> None:
    spec = consumer_of(application)
    puller = await pull(broker, spec)
    await broker.delete_consumer(spec.stream, spec.name)
    with pytest.raises(ConsumerMissing):
        await puller.burst(1, LIMIT_S)
    await broker.create_consumer(spec)
    await ask(broker, application, ["a"])
    assert names(await take(puller, 1)) == ["a"]


# ---- the end of a puller


async def test_a_stopped_puller_takes_nothing_more(broker: Broker, other: Broker, application: str) -> None:
    spec = consumer_of(application)
    stopped, free = await pull(broker, spec), await pull(other, spec)
    assert list(await stopped.stop()) == []
    assert list(await stopped.stop()) == []
    await ask(broker, application, ["a"])
    async with asyncio.timeout(LIMIT_S):
        assert list(await stopped.burst(1, 10 * LIMIT_S)) == []
    assert names(await take(free, 1)) == ["a"]


async def test_a_wait_ends_when_its_puller_is_stopped(broker: Broker, other: Broker, application: str) -> None:
    spec = consumer_of(application)
    stopped, free = await pull(broker, spec), await pull(other, spec)
    waiting = asyncio.create_task(stopped.burst(1, 10 * LIMIT_S))
    await broker.consumer_state(spec.stream, spec.name)
    async with asyncio.timeout(LIMIT_S):
        assert list(await stopped.stop()) == []
        assert list(await waiting) == []
    await ask(broker, application, ["a"])
    assert names(await take(free, 1)) == ["a"]


async def test_a_task_that_arrives_while_a_puller_stops_is_not_lost(
    broker: Broker, other: Broker, application: str
) -> None:
    spec = consumer_of(application)
    await broker.create_consumer(spec)
    free = await other.pull(spec.stream, spec.name)
    for n in range(20):
        stopped = await broker.pull(spec.stream, spec.name)
        waiting = asyncio.create_task(stopped.burst(1, 10 * LIMIT_S))
        await broker.consumer_state(spec.stream, spec.name)
        asking = asyncio.create_task(ask(other, application, [f"t{n}"]))
        async with asyncio.timeout(LIMIT_S):
            arrived = [*await stopped.stop(), *await waiting]
            await asking
        for delivery in arrived:
            await broker.hand_back(delivery.handle)
        (taken,) = await take(free, 1)
        assert taken.data == f"t{n}".encode()
        await other.acknowledge_surely(taken.handle, LIMIT_S)


# ---- a lost connection


async def test_a_wait_ends_when_the_connection_is_lost_and_no_task_is(
    broker: Broker, cut_off: CutOff, application: str
) -> None:
    spec = consumer_of(application, lease_s=SHORT_S)
    puller = await pull(broker, spec)
    waiting = asyncio.create_task(puller.burst(10, 10 * LIMIT_S))
    await broker.consumer_state(spec.stream, spec.name)
    async with cut_off():
        pass
    async with asyncio.timeout(LIMIT_S):
        with contextlib.suppress(ConsumerMissing):  # it went with the broker
            assert list(await waiting) == []
        await broker.create_consumer(spec)
        await ask(broker, application, ["a", "b", "c"])
    assert names(await take(puller, 3)) == ["a", "b", "c"]


async def test_what_was_taken_before_the_broker_was_away_comes_again(
    broker: Broker, cut_off: CutOff, application: str
) -> None:
    spec = consumer_of(application, lease_s=SHORT_S)
    await ask(broker, application, ["a", "b"])
    puller = await pull(broker, spec)
    await take(puller, 2)
    async with cut_off():
        pass
    async with asyncio.timeout(LIMIT_S):
        await broker.create_consumer(spec)
    assert sorted(names(await take(puller, 2))) == ["a", "b"]


async def test_who_asks_in_vain_while_the_broker_is_away_keeps_nothing_from_others_afterwards(
    broker: Broker, other: Broker, cut_off: CutOff, application: str
) -> None:
    spec = consumer_of(application)
    puller = await pull(broker, spec)
    async with cut_off():
        with pytest.raises(BrokerUnavailable):
            await broker.request("nobody", b"", 0.2)  # by now the connection is known to be lost
        async with asyncio.timeout(LIMIT_S):
            assert list(await puller.burst(1, 1.0)) == []
    await broker.create_consumer(spec)
    free = await other.pull(spec.stream, spec.name)
    await ask(broker, application, ["a"])
    assert names(await take(free, 1)) == ["a"]
