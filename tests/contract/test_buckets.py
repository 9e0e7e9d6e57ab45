"""The seam to the broker: buckets of values, and following their changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from flame.broker.errors import RevisionConflict, StreamMissing
from flame.broker.seam import Broker, Bucket, Entry
from flame.protocol import topology
from flame.protocol.topology import BucketSpec
from tests.contract.conftest import LIMIT_S, CutOff, Heard
from tests.support.cluster import eventually


@pytest.fixture
async def bucket(broker: Broker, name: str) -> Bucket:
    await broker.ensure_bucket(BucketSpec(name=name))
    return broker.bucket(name)


@pytest.fixture
async def same(other: Broker, bucket: Bucket, name: str) -> Bucket:
    """The same bucket over another connection."""
    return other.bucket(name)


def values(heard: list[Entry]) -> dict[str, bytes]:
    """Return what somebody who believes all that was heard believes now."""
    believed: dict[str, bytes] = {}
    for entry in heard:
        if entry.value is None:
            believed.pop(entry.key, None)
        else:
            believed[entry.key] = entry.value
    return believed


# ---- values


async def test_what_was_never_written_is_not_there(bucket: Bucket) -> None:
    assert await bucket.get("k") is None
    assert await bucket.entries() == []


@pytest.mark.parametrize("value", [b"", b"\0\xff", b"x" * 300_000], ids=["nothing", "bytes", "much"])
async def test_what_is_written_is_read_as_it_was(bucket: Bucket, same: Bucket, value: bytes) -> None:
    revision = await bucket.put("k", value)
    assert await same.get("k") == Entry("k", value, revision)


async def test_each_write_has_a_higher_revision(bucket: Bucket) -> None:
    revisions = [await bucket.put(key, b"") for key in ("a", "b", "a")]
    assert revisions == sorted(set(revisions))
    assert min(revisions) > 0


async def test_every_acknowledged_write_is_seen_by_a_read_after_it(bucket: Bucket, same: Bucket) -> None:
    for number in range(100):
        await bucket.put("k", str(number).encode())
        entry = await same.get("k")
        assert entry is not None
        assert entry.value == str(number).encode()


async def test_a_bucket_can_be_made_any_number_of_times(broker: Broker, bucket: Bucket, name: str) -> None:
    await bucket.put("k", b"v")
    await broker.ensure_bucket(BucketSpec(name=name))
    assert await bucket.get("k") is not None


async def test_every_bucket_of_a_cluster_can_be_made(broker: Broker) -> None:
    for spec in topology.buckets():
        await broker.ensure_bucket(spec)
        await broker.ensure_bucket(spec)
        assert await broker.bucket(spec.name).get("k") is None


OPERATIONS: dict[str, Callable[[Bucket], Awaitable[object]]] = {
    "get": lambda b: b.get("k"),
    "put": lambda b: b.put("k", b""),
    "create": lambda b: b.create("k", b""),
    "update": lambda b: b.update("k", b"", 1),
    "delete": lambda b: b.delete("k"),
    "entries": lambda b: b.entries(),
    "watch": lambda b: b.watch(">", lambda _: None),
}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_nothing_can_be_done_with_a_bucket_that_is_missing(broker: Broker, name: str, operation: str) -> None:
    with pytest.raises(StreamMissing):
        await OPERATIONS[operation](broker.bucket(name))


# ---- compare and set


async def test_a_key_is_created_once(bucket: Bucket) -> None:
    revision = await bucket.create("k", b"first")
    with pytest.raises(RevisionConflict):
        await bucket.create("k", b"second")
    assert await bucket.get("k") == Entry("k", b"first", revision)


async def test_a_key_that_was_deleted_can_be_created_again(bucket: Bucket) -> None:
    first = await bucket.create("k", b"1")
    await bucket.delete("k")
    assert await bucket.get("k") is None
    second = await bucket.create("k", b"2")
    assert second > first
    assert await bucket.get("k") == Entry("k", b"2", second)
    with pytest.raises(RevisionConflict):
        await bucket.create("k", b"3")


async def test_a_key_that_was_never_written_can_be_deleted_and_then_created(bucket: Bucket) -> None:
    await bucket.delete("k")
    await bucket.delete("k")
    await bucket.create("k", b"1")


async def test_of_many_creators_one_succeeds(bucket: Bucket, same: Bucket) -> None:
    for again in range(5):
        attempts = [(bucket, same)[n % 2].create("k", str(n).encode()) for n in range(20)]
        ends = await asyncio.gather(*attempts, return_exceptions=True)
        assert sorted(type(end).__name__ for end in ends) == ["RevisionConflict"] * 19 + ["int"], again
        await bucket.delete("k")


async def test_a_key_is_updated_only_by_who_knows_what_it_holds(bucket: Bucket, same: Bucket) -> None:
    first = await bucket.put("k", b"1")
    second = await bucket.update("k", b"2", first)
    assert second > first
    for stale in (first, second + 1, second + 1000):
        with pytest.raises(RevisionConflict):
            await same.update("k", b"3", stale)
    assert await bucket.get("k") == Entry("k", b"2", second)


async def test_a_key_that_is_not_there_can_not_be_updated(bucket: Bucket) -> None:
    with pytest.raises(RevisionConflict):
        await bucket.update("k", b"1", 5)
    revision = await bucket.put("k", b"1")
    await bucket.delete("k")
    with pytest.raises(RevisionConflict):
        await bucket.update("k", b"2", revision)
    assert await bucket.get("k") is None


async def test_changing_one_key_does_not_hinder_another(bucket: Bucket) -> None:
    one = await bucket.put("one", b"1")
    await bucket.put("other", b"1")
    await bucket.update("one", b"2", one)


async def test_counting_together_loses_nothing(bucket: Bucket, same: Bucket) -> None:
    await bucket.put("k", b"0")

    async def count(by: Bucket) -> None:
        for _ in range(25):
            while True:
                entry = await by.get("k")
                assert entry is not None
                assert entry.value is not None
                try:
                    await by.update("k", str(int(entry.value) + 1).encode(), entry.revision)
                except RevisionConflict:
                    continue
                break

    async with asyncio.timeout(2 * LIMIT_S):
        await asyncio.gather(count(bucket), count(same))
    entry = await bucket.get("k")
    assert entry is not None
    assert entry.value == b"50"


async def test_a_key_is_deleted_only_by_who_knows_what_it_holds(bucket: Bucket) -> None:
    first = await bucket.put("k", b"1")
    second = await bucket.put("k", b"2")
    with pytest.raises(RevisionConflict):
        await bucket.delete("k", first)
    assert await bucket.get("k") == Entry("k", b"2", second)
    await bucket.delete("k", second)
    assert await bucket.get("k") is None


async def test_a_refusal_names_the_key(bucket: Bucket) -> None:
    await bucket.put("some-key", b"")
    with pytest.raises(RevisionConflict, match="some-key"):
        await bucket.create("some-key", b"")


# ---- all at once


async def test_all_values_are_read_in_the_order_of_their_last_change(bucket: Bucket) -> None:
    for key in ("a", "b", "c", "a", "d"):
        await bucket.put(key, key.encode())
    await bucket.delete("b")
    found = await bucket.entries()
    assert [(entry.key, entry.value) for entry in found] == [("c", b"c"), ("a", b"a"), ("d", b"d")]
    entry = await bucket.get("a")
    assert found[1] == entry


async def test_only_the_values_are_read_whose_keys_match(bucket: Bucket) -> None:
    for key in ("n1.x", "n1.y", "n2.x", "n1", "n1.x.y"):
        await bucket.put(key, b"")
    assert {e.key for e in await bucket.entries("n1.*")} == {"n1.x", "n1.y"}
    assert {e.key for e in await bucket.entries("*.x")} == {"n1.x", "n2.x"}
    assert {e.key for e in await bucket.entries("*")} == {"n1"}
    assert {e.key for e in await bucket.entries("n1.>")} == {"n1.x", "n1.y", "n1.x.y"}
    assert len(await bucket.entries()) == 5
    assert await bucket.entries("nothing.*") == []


async def test_some_thousand_values_are_all_read(bucket: Bucket) -> None:
    for begin in range(0, 3000, 500):
        await asyncio.gather(*(bucket.put(f"k{n}", str(n).encode()) for n in range(begin, begin + 500)))
    assert values(await bucket.entries()) == {f"k{n}": str(n).encode() for n in range(3000)}


async def test_a_value_can_have_an_end(broker: Broker, name: str) -> None:
    await broker.ensure_bucket(BucketSpec(name=name, ttl_s=1.0))
    bucket = broker.bucket(name)
    await bucket.create("k", b"1")

    async def gone() -> bool:
        return await bucket.get("k") is None

    await eventually(gone, "the value has ended")
    assert await bucket.entries() == []
    await bucket.create("k", b"2")


# ---- following


async def test_a_watch_begins_with_all_there_is(bucket: Bucket) -> None:
    for key in ("a", "b", "c"):
        await bucket.put(key, key.encode())
    await bucket.delete("b")
    heard: Heard[Entry] = Heard()
    await bucket.watch(">", heard)
    assert values(heard.all) == {"a": b"a", "c": b"c"}


async def test_a_watch_of_nothing_begins_at_once(bucket: Bucket) -> None:
    heard: Heard[Entry] = Heard()
    async with asyncio.timeout(LIMIT_S / 2):
        await bucket.watch(">", heard)
    assert heard.all == []


async def test_a_watch_hears_of_changes_in_their_order(bucket: Bucket, same: Bucket) -> None:
    heard: Heard[Entry] = Heard()
    await bucket.watch(">", heard)
    written = {await same.put(f"k{n}", str(n).encode()): f"k{n}" for n in range(50)}
    await heard.number(50)
    assert {entry.revision: entry.key for entry in heard.all} == written
    revisions = [entry.revision for entry in heard.all]
    assert revisions == sorted(revisions)


async def test_a_watch_may_skip_what_was_overwritten_at_once_and_never_the_last_value(
    bucket: Bucket, same: Bucket
) -> None:
    heard: Heard[Entry] = Heard()
    await bucket.watch(">", heard)
    written = {await same.put("k", str(n).encode()): str(n).encode() for n in range(50)}
    await heard.until(lambda all_of_it: values(all_of_it) == {"k": b"49"})
    await same.delete("k")
    await heard.until(lambda all_of_it: values(all_of_it) == {})
    *changes, deletion = heard.all
    revisions = [entry.revision for entry in changes]
    assert revisions == sorted(set(revisions))
    assert all(written[entry.revision] == entry.value for entry in changes)
    assert deletion.value is None
    assert deletion.revision > max(written)


async def test_a_watch_hears_only_of_what_it_follows(bucket: Bucket) -> None:
    heard: Heard[Entry] = Heard()
    await bucket.put("n2.before", b"")
    await bucket.watch("n1.*", heard)
    for key in ("n2.x", "n1", "n1.x.y", "n1.x"):
        await bucket.put(key, b"")
    assert [entry.key for entry in await heard.number(1)] == ["n1.x"]


async def test_a_watch_hears_of_keys_that_are_created_again(bucket: Bucket) -> None:
    heard: Heard[Entry] = Heard()
    await bucket.watch(">", heard)
    for number, value in enumerate((b"1", b"2", b"3")):
        await bucket.create("k", value)
        assert (await heard.number(2 * number + 1))[-1].value == value
        await bucket.delete("k")
        assert (await heard.number(2 * number + 2))[-1].value is None
    revisions = [entry.revision for entry in heard.all]
    assert revisions == sorted(revisions)


async def test_several_can_watch_the_same(bucket: Bucket, same: Bucket) -> None:
    heard: list[Heard[Entry]] = [Heard(), Heard(), Heard()]
    for by, kept in zip((bucket, bucket, same), heard, strict=True):
        await by.watch(">", kept)
    await bucket.put("k", b"v")
    for kept in heard:
        assert [entry.value for entry in await kept.number(1)] == [b"v"]


async def test_a_stopped_watch_hears_nothing_more(bucket: Bucket) -> None:
    stopped: Heard[Entry] = Heard()
    goes_on: Heard[Entry] = Heard()
    watch = await bucket.watch(">", stopped)
    await bucket.watch(">", goes_on)
    await bucket.put("k", b"1")
    await stopped.number(1)
    await watch.stop()
    await watch.stop()
    await bucket.put("k", b"2")
    await goes_on.number(2)
    assert len(stopped.all) == 1


async def test_a_watch_can_be_stopped_after_the_connection_was_closed(broker: Broker, bucket: Bucket) -> None:
    watch = await bucket.watch(">", lambda _: None)
    await broker.close()
    async with asyncio.timeout(LIMIT_S):
        await watch.stop()


async def test_a_handler_that_raises_hears_the_next_change(bucket: Bucket) -> None:
    heard: Heard[Entry] = Heard()

    def handler(entry: Entry) -> None:
        heard(entry)
        raise RuntimeError("a fault of the handler")

    await bucket.put("before", b"")
    await bucket.watch(">", handler)
    await bucket.put("k", b"1")
    await bucket.put("k", b"2")
    assert [entry.key for entry in await heard.number(3)] == ["before", "k", "k"]


async def test_a_listener_for_repairs_that_raises_ends_no_watch(bucket: Bucket, same: Bucket, cut_off: CutOff) -> None:
    heard: Heard[Entry] = Heard()
    repaired: Heard[str] = Heard()

    def failing() -> None:
        repaired("again")
        raise RuntimeError("a fault of the listener")

    await bucket.watch(">", heard, failing)
    async with cut_off():
        pass
    await repaired.number(1)
    async with asyncio.timeout(LIMIT_S):
        await same.put("k", b"v")
    await heard.until(lambda all_of_it: values(all_of_it) == {"k": b"v"})


async def test_values_stay_when_the_broker_was_away(bucket: Bucket, cut_off: CutOff) -> None:
    revision = await bucket.put("k", b"v")
    async with cut_off():
        pass
    async with asyncio.timeout(LIMIT_S):
        assert await bucket.get("k") == Entry("k", b"v", revision)
        await bucket.update("k", b"w", revision)


async def test_a_watch_hears_what_changed_after_the_broker_was_away(
    bucket: Bucket, same: Bucket, cut_off: CutOff
) -> None:
    for key in ("stays", "changes", "goes"):
        await bucket.put(key, b"before")
    heard: Heard[Entry] = Heard()
    repaired: Heard[str] = Heard()
    await bucket.watch(">", heard, lambda: repaired("again"))
    async with cut_off():
        pass
    async with asyncio.timeout(LIMIT_S):
        await same.put("changes", b"after")
        await same.delete("goes")
        await same.put("comes", b"after")
    expected = {"stays": b"before", "changes": b"after", "comes": b"after"}
    await heard.until(lambda all_of_it: values(all_of_it) == expected)
    await repaired.number(1)
    assert values(heard.all) == expected


async def test_a_watch_never_goes_back_in_time(bucket: Bucket, same: Bucket, cut_off: CutOff) -> None:
    heard: Heard[Entry] = Heard()
    repaired: Heard[str] = Heard()
    await bucket.put("a", b"0")
    await bucket.watch(">", heard, lambda: repaired("again"))
    for number in (1, 2):
        async with cut_off():
            pass
        async with asyncio.timeout(LIMIT_S):
            for key in ("a", "b"):
                await same.put(key, str(number).encode())
            await same.delete("b")
        await repaired.number(number)
    await heard.until(lambda all_of_it: values(all_of_it) == {"a": b"2"})
    for key in ("a", "b"):
        revisions = [entry.revision for entry in heard.all if entry.key == key]
        assert revisions == sorted(revisions)


async def test_whoever_believes_a_watch_believes_the_truth_in_the_end(bucket: Bucket, same: Bucket, name: str) -> None:
    dice = random.Random(7)
    heard: Heard[Entry] = Heard()
    await bucket.watch(">", heard)
    for _ in range(300):
        key = f"k{dice.randrange(5)}"
        if dice.random() < 0.4:
            await same.delete(key)
        else:
            await same.put(key, str(dice.randrange(1000)).encode())
    await same.put("last", b"")
    await heard.until(lambda all_of_it: bool(all_of_it) and all_of_it[-1].key == "last")
    assert values(heard.all) == values(await same.entries())


# ---- clearing


async def test_what_is_cleared_is_gone_and_can_be_written_again(bucket: Bucket, same: Bucket) -> None:
    for key in ("a.x", "a.y.z", "b.x"):
        await bucket.put(key, b"1")
    await bucket.put("a.x", b"2")
    await bucket.delete("a.y.z")
    await same.clear("a.>")
    assert [entry.key for entry in await bucket.entries()] == ["b.x"]
    assert await bucket.get("a.x") is None
    assert await bucket.clear("a.>") == 0
    await bucket.create("a.x", b"3")
    assert [entry.value for entry in await bucket.entries("a.>")] == [b"3"]


async def test_one_key_is_cleared_and_no_other(bucket: Bucket) -> None:
    for key in ("a.x", "a.xy"):
        await bucket.put(key, b"1")
    assert await bucket.clear("a.x") == 1
    assert [entry.key for entry in await bucket.entries()] == ["a.xy"]
