"""The seam to the broker: streams, what they keep and what they refuse."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from flame.broker.errors import Duplicate, NotAcknowledged, StreamFull, StreamMissing, TooLarge
from flame.broker.seam import Broker, LiveMessage, StoredMessage, StreamState
from flame.errors import BrokerUnavailable, FlameError
from flame.protocol import defaults, subjects, topology
from flame.protocol.topology import StreamSpec
from tests.contract.conftest import LIMIT_S, CutOff, Heard
from tests.support.cluster import eventually


def plain(name: str) -> StreamSpec:
    """A stream that takes everything below ``name``."""
    return StreamSpec(name=name, subjects=(f"{name}.*",))


def one_each(name: str, most: int = topology.UNLIMITED) -> StreamSpec:
    """A stream that keeps the first message of each subject and refuses what is too much."""
    return replace(plain(name), one_per_subject=True, refuse_when_full=True, max_messages=most)


def plainly(message: StoredMessage | None) -> tuple[str, bytes, int] | None:
    """What was stored, and where, but not when."""
    return None if message is None else (message.subject, message.data, message.sequence)


def results(application: str) -> StreamSpec:
    """A stream as results are kept in."""
    return topology.result_stream(application)


# ---- streams come and go


async def test_a_stream_can_be_made_any_number_of_times(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    await broker.store(f"{name}.a", b"1", LIMIT_S)
    await broker.ensure_stream(plain(name))
    assert await broker.stream_state(name) == StreamState(1, 1)


async def test_a_stream_is_brought_to_what_it_should_be(broker: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name, most=1))
    await broker.store(f"{name}.a", b"", LIMIT_S)
    with pytest.raises(StreamFull):
        await broker.store(f"{name}.b", b"", LIMIT_S)
    await broker.ensure_stream(one_each(name, most=2))
    await broker.store(f"{name}.b", b"", LIMIT_S)


async def test_a_stream_that_was_deleted_is_gone_with_all_it_held(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    await broker.store(f"{name}.a", b"", LIMIT_S)
    await broker.delete_stream(name)
    await broker.delete_stream(name)
    with pytest.raises(StreamMissing):
        await broker.stream_state(name)
    await broker.ensure_stream(plain(name))
    assert (await broker.stream_state(name)).messages == 0


async def test_nothing_can_be_done_with_a_stream_that_is_missing(broker: Broker, name: str) -> None:
    with pytest.raises(StreamMissing):
        await broker.stream_state(name)
    with pytest.raises(StreamMissing):
        await broker.subjects(name, f"{name}.*")
    with pytest.raises(StreamMissing):
        await broker.first_stored(name, f"{name}.*")
    with pytest.raises(StreamMissing):
        await broker.last(name, f"{name}.a")
    with pytest.raises(StreamMissing):
        await broker.purge(name, f"{name}.*")
    with pytest.raises(StreamMissing):
        await broker.consumers(name)


async def test_every_stream_of_an_application_can_be_made(broker: Broker, name: str) -> None:
    for spec in topology.application_streams(name):
        await broker.ensure_stream(spec)
        await broker.ensure_stream(spec)
    for spec in topology.application_streams(name):
        assert await broker.stream_state(spec.name) == StreamState(0, 0)
        await broker.delete_stream(spec.name)


# ---- storing


@pytest.mark.parametrize("data", [b"", b"\0\xff", b"x" * defaults.INLINE_LIMIT_BYTES], ids=["nothing", "bytes", "much"])
async def test_what_is_stored_is_read_as_it_was(broker: Broker, other: Broker, name: str, data: bytes) -> None:
    await broker.ensure_stream(plain(name))
    sequence = await broker.store(f"{name}.a", data, LIMIT_S)
    found = await other.last(name, f"{name}.a")
    assert plainly(found) == (f"{name}.a", data, sequence)
    assert found is not None
    assert abs(found.stored_at - time.time()) < LIMIT_S


async def test_what_is_stored_has_rising_sequences(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    assert [await broker.store(f"{name}.a", b"", LIMIT_S) for _ in range(5)] == [1, 2, 3, 4, 5]
    await broker.purge(name, f"{name}.*")
    assert await broker.store(f"{name}.a", b"", LIMIT_S) == 6
    assert await broker.stream_state(name) == StreamState(1, 6)


async def test_many_are_stored_at_once_in_the_order_of_the_calls(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    stores = [await broker.begin_store(f"{name}.{n}", b"", LIMIT_S) for n in range(1000)]
    assert await asyncio.gather(*stores) == list(range(1, 1001))
    assert (await broker.stream_state(name)).messages == 1000


async def test_many_are_stored_at_once_with_a_call_for_each_end(broker: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name, most=100))
    ends: Heard[tuple[str, int, str]] = Heard()
    subjects_ = [f"{name}.{n % 90}" for n in range(110)]  # 20 of them twice
    for subject in [*subjects_, f"{name}.x", *(f"{name}.full{n}" for n in range(20))]:

        def ended(sequence: int, error: FlameError | None, subject: str = subject) -> None:
            ends((subject, sequence, type(error).__name__))

        await broker.store_then(subject, b"", LIMIT_S, ended)
    heard = await ends.number(131)
    stored = [(subject, sequence) for subject, sequence, error in heard if error == "NoneType"]
    assert [sequence for _, sequence in stored] == list(range(1, 101))
    assert [subject for subject, _ in stored[:91]] == [*subjects_[:90], f"{name}.x"]
    refused = [error for _, sequence, error in heard if sequence == 0]
    assert sorted(refused) == ["Duplicate"] * 20 + ["StreamFull"] * 11


async def test_what_can_not_be_sent_is_told_to_who_stores_it(broker: Broker, cut_off: CutOff, name: str) -> None:
    await broker.ensure_stream(plain(name))
    ends: Heard[str] = Heard()
    async with cut_off():
        with pytest.raises(BrokerUnavailable):
            await broker.request("nobody", b"", 0.2)  # by now the connection is known to be lost
        await broker.store_then(f"{name}.a", b"", 0.1, lambda _, error: ends(type(error).__name__))
        assert await ends.number(1) == ["NotAcknowledged"]


async def test_what_no_stream_takes_is_refused(broker: Broker, name: str) -> None:
    with pytest.raises(StreamMissing):
        await broker.store(f"{name}.a", b"", LIMIT_S)
    future = await broker.begin_store(f"{name}.a", b"", LIMIT_S)
    with pytest.raises(StreamMissing):
        await future


async def test_what_is_larger_than_any_message_may_be_is_refused(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    with pytest.raises(TooLarge):
        await broker.store(f"{name}.a", bytes(defaults.MAX_PAYLOAD_BYTES + 1), LIMIT_S)
    assert (await broker.stream_state(name)).messages == 0


async def test_a_store_that_nobody_waits_for_is_stored_all_the_same(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    (await broker.begin_store(f"{name}.a", b"", LIMIT_S)).cancel()
    await broker.store(f"{name}.b", b"", LIMIT_S)
    assert (await broker.stream_state(name)).messages == 2


async def test_a_store_that_is_not_acknowledged_in_time_may_have_happened(
    broker: Broker, cut_off: CutOff, name: str
) -> None:
    await broker.ensure_stream(plain(name))
    async with cut_off():
        with pytest.raises(BrokerUnavailable):
            await broker.request("nobody", b"", 0.2)  # by now the connection is known to be lost
        with pytest.raises(NotAcknowledged):
            await broker.store(f"{name}.a", b"", 0.1)


async def test_stores_under_way_end_when_the_connection_is_closed(broker: Broker, cut_off: CutOff, name: str) -> None:
    await broker.ensure_stream(plain(name))
    async with cut_off():
        with pytest.raises(BrokerUnavailable):
            await broker.request("nobody", b"", 0.2)
        stores = [await broker.begin_store(f"{name}.{n}", b"", 10 * LIMIT_S) for n in range(3)]
        await broker.close()
        async with asyncio.timeout(LIMIT_S):
            ends = await asyncio.gather(*stores, return_exceptions=True)
    assert all(isinstance(end, NotAcknowledged) for end in ends)


async def test_what_was_acknowledged_is_there_after_the_broker_was_away(
    broker: Broker, cut_off: CutOff, name: str
) -> None:
    await broker.ensure_stream(plain(name))
    stores = [await broker.begin_store(f"{name}.{n}", str(n).encode(), LIMIT_S) for n in range(200)]
    await asyncio.gather(*stores)
    async with cut_off():
        pass
    assert (await broker.stream_state(name)).messages == 200
    found = await broker.last(name, f"{name}.77")
    assert found is not None
    assert found.data == b"77"


# ---- refusing


async def test_the_first_message_of_a_subject_stays_and_the_second_is_refused(broker: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name))
    first = await broker.store(f"{name}.a", b"first", LIMIT_S)
    with pytest.raises(Duplicate):
        await broker.store(f"{name}.a", b"second", LIMIT_S)
    await broker.store(f"{name}.b", b"another", LIMIT_S)
    assert plainly(await broker.last(name, f"{name}.a")) == (f"{name}.a", b"first", first)


async def test_of_many_at_once_exactly_one_becomes_the_first(broker: Broker, other: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name))
    stores = [await (broker, other)[n % 2].begin_store(f"{name}.a", b"", LIMIT_S) for n in range(50)]
    ends = await asyncio.gather(*stores, return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["Duplicate"] * 49 + ["int"]


async def test_a_subject_can_be_used_again_when_its_message_is_gone(broker: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name))
    await broker.store(f"{name}.a", b"", LIMIT_S)
    await broker.purge(name, f"{name}.a")
    await broker.store(f"{name}.a", b"", LIMIT_S)


async def test_a_full_stream_refuses_what_is_new(broker: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name, most=3))
    for n in range(3):
        await broker.store(f"{name}.{n}", b"", LIMIT_S)
    with pytest.raises(StreamFull):
        await broker.store(f"{name}.3", b"", LIMIT_S)
    await broker.purge(name, f"{name}.0")
    await broker.store(f"{name}.3", b"", LIMIT_S)
    with pytest.raises(StreamFull):
        await broker.store(f"{name}.4", b"", LIMIT_S)


async def test_a_stream_that_holds_too_many_bytes_is_full(broker: Broker, name: str) -> None:
    await broker.ensure_stream(replace(one_each(name), max_bytes=100_000))
    stores = [await broker.begin_store(f"{name}.{n}", b"x" * 1000, LIMIT_S) for n in range(200)]
    ends = await asyncio.gather(*stores, return_exceptions=True)
    stored = [end for end in ends if isinstance(end, int)]
    assert 50 < len(stored) <= 100
    assert {type(end) for end in ends} == {int, StreamFull}


async def test_a_second_message_in_a_full_stream_is_a_duplicate_and_not_one_too_many(broker: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name, most=2))
    for n in range(2):
        await broker.store(f"{name}.{n}", b"", LIMIT_S)
    with pytest.raises(Duplicate):
        await broker.store(f"{name}.1", b"", LIMIT_S)
    with pytest.raises(StreamFull):
        await broker.store(f"{name}.2", b"", LIMIT_S)


async def test_a_stream_that_refuses_nothing_lets_go_of_what_is_oldest(broker: Broker, name: str) -> None:
    await broker.ensure_stream(replace(plain(name), max_messages=3))
    for n in range(5):
        await broker.store(f"{name}.{n}", b"", LIMIT_S)
    assert set(await broker.subjects(name, f"{name}.*")) == {f"{name}.{n}" for n in (2, 3, 4)}


async def test_what_is_too_old_is_gone_and_its_subject_can_be_used_again(broker: Broker, name: str) -> None:
    await broker.ensure_stream(replace(one_each(name), max_age_s=1.0))
    await broker.store(f"{name}.a", b"old", LIMIT_S)

    async def gone() -> bool:
        return await broker.last(name, f"{name}.a") is None

    await eventually(gone, "the message is too old")
    await broker.store(f"{name}.a", b"new", LIMIT_S)


def with_ttl(name: str) -> StreamSpec:
    """A stream as parts of large values are kept in."""
    return replace(one_each(name), direct=True, message_ttl=True)


async def test_a_message_with_a_time_of_its_own_goes_and_the_others_stay(broker: Broker, name: str) -> None:
    await broker.ensure_stream(with_ttl(name))
    stays = await broker.begin_store(f"{name}.stays", b"1", LIMIT_S)
    goes = await broker.begin_store(f"{name}.goes", b"2", LIMIT_S, ttl_s=1)
    later = await broker.begin_store(f"{name}.later", b"3", LIMIT_S, ttl_s=3600)
    assert [await stays, await goes, await later] == [1, 2, 3]
    with pytest.raises(Duplicate):
        await (await broker.begin_store(f"{name}.later", b"4", LIMIT_S, ttl_s=3600))

    async def gone() -> bool:
        return set(await broker.subjects(name, f"{name}.*")) == {f"{name}.stays", f"{name}.later"}

    await eventually(gone, "the time of one message is over")
    await (await broker.begin_store(f"{name}.goes", b"5", LIMIT_S, ttl_s=3600))
    assert await broker.peek(name, f"{name}.goes") == b"5"


async def test_a_stream_must_allow_that_messages_have_a_time_of_their_own(broker: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name))
    with pytest.raises(FlameError):
        await (await broker.begin_store(f"{name}.a", b"1", LIMIT_S, ttl_s=60))
    assert await broker.last(name, f"{name}.a") is None
    await broker.ensure_stream(with_ttl(name))
    await (await broker.begin_store(f"{name}.a", b"1", LIMIT_S, ttl_s=60))


# ---- reading


@pytest.mark.parametrize("data", [b"", b"\0\xff", b"x" * defaults.VALUE_PART_BYTES], ids=["nothing", "bytes", "much"])
async def test_what_is_stored_is_read_from_any_replica(broker: Broker, other: Broker, name: str, data: bytes) -> None:
    await broker.ensure_stream(with_ttl(name))
    await broker.store(f"{name}.a", data, LIMIT_S)
    await broker.store(f"{name}.b", b"another", LIMIT_S)
    assert await other.peek(name, f"{name}.a") == data
    assert await other.peek(name, f"{name}.c") is None
    await broker.purge(name, f"{name}.a")
    assert await other.peek(name, f"{name}.a") is None


async def test_a_read_of_a_stream_that_is_missing_says_so(broker: Broker, name: str) -> None:
    with pytest.raises(StreamMissing):
        await broker.peek(name, f"{name}.a")


async def test_a_read_ends_with_the_connection_or_brings_what_is_there(
    broker: Broker, cut_off: CutOff, name: str
) -> None:
    await broker.ensure_stream(with_ttl(name))
    await broker.store(f"{name}.a", b"1", LIMIT_S)
    async with cut_off():
        reading = asyncio.create_task(broker.peek(name, f"{name}.a"))
        await asyncio.sleep(0)
    try:
        async with asyncio.timeout(LIMIT_S):
            assert await reading == b"1"
    except BrokerUnavailable:
        pass  # the request was lost with the connection
    assert await broker.peek(name, f"{name}.a") == b"1"


async def test_what_was_never_stored_is_not_there(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    assert await broker.last(name, f"{name}.a") is None
    assert await broker.first_stored(name, f"{name}.*") is None
    assert await broker.subjects(name, f"{name}.*") == {}


async def test_every_acknowledged_message_is_seen_by_a_read_after_it(broker: Broker, other: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name))
    for n in range(100):
        await broker.store(f"{name}.{n}", b"", LIMIT_S)
        assert await other.last(name, f"{name}.{n}") is not None


async def test_the_last_message_of_a_subject_is_read(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    for data in (b"1", b"2"):
        await broker.store(f"{name}.a", data, LIMIT_S)
    await broker.store(f"{name}.b", b"3", LIMIT_S)
    assert plainly(await broker.last(name, f"{name}.a")) == (f"{name}.a", b"2", 2)


async def test_the_oldest_message_that_matches_is_read(broker: Broker, name: str) -> None:
    await broker.ensure_stream(StreamSpec(name=name, subjects=(f"{name}.*.*",)))
    for subject in ("b.1", "a.2", "a.1"):
        await broker.store(f"{name}.{subject}", subject.encode(), LIMIT_S)
    assert plainly(await broker.first_stored(name, f"{name}.a.*")) == (f"{name}.a.2", b"a.2", 2)
    assert await broker.first_stored(name, f"{name}.c.*") is None
    await broker.purge(name, f"{name}.a.2")
    assert plainly(await broker.first_stored(name, f"{name}.a.*")) == (f"{name}.a.1", b"a.1", 3)


async def test_the_oldest_message_behind_another_is_read(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    for data in (b"1", b"2", b"3"):
        await broker.store(f"{name}.a", data, LIMIT_S)
    assert plainly(await broker.first_stored(name, f"{name}.*", 1)) == (f"{name}.a", b"2", 2)
    assert await broker.first_stored(name, f"{name}.*", 3) is None


async def test_stored_messages_are_counted_by_subject(broker: Broker, name: str) -> None:
    await broker.ensure_stream(StreamSpec(name=name, subjects=(f"{name}.*.*",)))
    for subject in ("a.1", "a.2", "a.1", "b.1"):
        await broker.store(f"{name}.{subject}", b"", LIMIT_S)
    assert await broker.subjects(name, f"{name}.a.*") == {f"{name}.a.1": 2, f"{name}.a.2": 1}
    assert await broker.subjects(name, f"{name}.*.1") == {f"{name}.a.1": 2, f"{name}.b.1": 1}


async def test_some_thousands_of_subjects_are_all_told(broker: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name))
    stores = [await broker.begin_store(f"{name}.{n}", b"", LIMIT_S) for n in range(5000)]
    await asyncio.gather(*stores)
    assert set(await broker.subjects(name, f"{name}.*")) == {f"{name}.{n}" for n in range(5000)}


# ---- purging


async def test_what_is_purged_is_gone_and_nothing_else(broker: Broker, name: str) -> None:
    await broker.ensure_stream(StreamSpec(name=name, subjects=(f"{name}.*.*",)))
    for subject in ("a.1", "a.2", "b.1"):
        await broker.store(f"{name}.{subject}", b"", LIMIT_S)
    assert await broker.purge(name, f"{name}.a.*") == 2
    assert await broker.subjects(name, f"{name}.*.*") == {f"{name}.b.1": 1}
    assert await broker.purge(name, f"{name}.a.*") == 0
    assert await broker.purge(name, f"{name}.b.1") == 1


async def test_what_came_after_a_sequence_is_not_purged(broker: Broker, name: str) -> None:
    await broker.ensure_stream(StreamSpec(name=name, subjects=(f"{name}.*.*",)))
    for subject in ("a.1", "b.1", "a.2", "a.3"):
        await broker.store(f"{name}.{subject}", b"", LIMIT_S)
    assert await broker.purge(name, f"{name}.a.*", up_to=3) == 2
    assert set(await broker.subjects(name, f"{name}.*.*")) == {f"{name}.b.1", f"{name}.a.3"}
    assert await broker.purge(name, f"{name}.a.*", up_to=3) == 0
    assert await broker.purge(name, f"{name}.a.*", up_to=1000) == 1


# ---- announcing what was stored


async def test_a_stored_result_is_announced_with_the_subject_it_is_stored_under(broker: Broker, name: str) -> None:
    await broker.ensure_stream(results(name))
    heard: Heard[LiveMessage] = Heard()
    await broker.subscribe(subjects.session_task_events(name, "s"), heard)
    await broker.store(subjects.result(name, "s", "t"), b"result", LIMIT_S)
    expected = LiveMessage(subjects.event(name, "s", "t", "done"), b"result", subjects.result(name, "s", "t"))
    assert await heard.number(1) == [expected]


async def test_what_was_refused_is_not_announced(broker: Broker, name: str) -> None:
    await broker.ensure_stream(results(name))
    heard: Heard[LiveMessage] = Heard()
    await broker.subscribe(subjects.session_task_events(name, "s"), heard)
    await broker.store(subjects.result(name, "s", "t1"), b"first", LIMIT_S)
    with pytest.raises(Duplicate):
        await broker.store(subjects.result(name, "s", "t1"), b"second", LIMIT_S)
    await broker.store(subjects.result(name, "s", "t2"), b"third", LIMIT_S)
    assert [m.data for m in await heard.number(2)] == [b"first", b"third"]


async def test_nobody_can_make_a_message_look_announced(broker: Broker, name: str) -> None:
    await broker.ensure_stream(results(name))
    heard: Heard[LiveMessage] = Heard()
    await broker.subscribe(subjects.session_task_events(name, "s"), heard)
    await broker.publish(subjects.event(name, "s", "t", "done"), b"forged")
    assert (await heard.number(1))[0].stored_as == ""


async def test_results_are_announced_in_the_order_in_which_they_were_stored(broker: Broker, name: str) -> None:
    await broker.ensure_stream(results(name))
    heard: Heard[LiveMessage] = Heard()
    await broker.subscribe(subjects.session_task_events(name, "s"), heard)
    stores = [await broker.begin_store(subjects.result(name, "s", f"t{n}"), b"", LIMIT_S) for n in range(500)]
    await asyncio.gather(*stores)
    announced = [m.stored_as for m in await heard.number(500)]
    assert announced == [subjects.result(name, "s", f"t{n}") for n in range(500)]


# ---- errors


async def test_every_refusal_names_the_subject(broker: Broker, name: str) -> None:
    await broker.ensure_stream(one_each(name, most=1))
    await broker.store(f"{name}.a", b"", LIMIT_S)
    for subject in (f"{name}.a", f"{name}.b", f"no-{name}.c"):
        with pytest.raises(FlameError) as refusal:
            await broker.store(subject, b"", LIMIT_S)
        assert subject in str(refusal.value)
