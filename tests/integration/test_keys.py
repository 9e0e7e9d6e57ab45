"""Keys of many tasks: `create_tasks` and `map` find what was created before, and create the rest."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator

import pytest

import flame
import flame.sync
from flame.client.keyed import AT_ONCE
from tests.support.cluster import Cluster


@pytest.fixture
async def session(connection: flame.Connection) -> AsyncIterator[flame.Session]:
    async with await connection.create_session("flmping") as session:
        yield session


def name(data: bytes | str) -> str:
    return f"order-{data!r}"


async def test_tasks_created_again_under_their_keys_are_the_same(session: flame.Session) -> None:
    inputs = [b"%d" % number for number in range(2 * AT_ONCE + 50)]
    keys = [name(data) for data in inputs]
    first = await session.create_tasks(inputs[:10], keys=keys[:10])
    handles = await session.create_tasks(inputs, keys=iter(keys))
    assert [(await handle).output for handle in handles] == inputs
    assert [handle.id for handle in handles[:10]] == [handle.id for handle in first]
    again = await session.create_tasks(iter([b"7", b"7", b"7"]), keys=[name(b"7"), None, name(b"7")])
    assert [handle.id == handles[7].id for handle in again] == [True, False, True]
    assert (await again[1]).output == b"7"


async def test_a_reused_key_raises_when_the_others_are_stored(session: flame.Session) -> None:
    await session.create_tasks([b"one"], keys=["k"])
    with pytest.raises(flame.KeyReused, match="'k'"):
        await session.create_tasks([b"two", b"three"], keys=["k", "l"])
    assert (await session.invoke(b"three", key="l")).output == b"three"
    assert len(await session.list_tasks()) == 2
    with pytest.raises(flame.KeyReused, match="'l'"):
        async for _ in session.map([b"four"], key=lambda _: "l"):
            pass


@pytest.mark.parametrize(("keys", "says"), [(["a"], "each of 2 inputs, got 1"), ("ab", "got str 'ab'"), (5, "got int")])
async def test_another_number_of_keys_stores_nothing(session: flame.Session, keys: list[str], says: str) -> None:
    with pytest.raises(flame.InvalidArgument, match=says):
        await session.create_tasks([b"a", b"b"], keys=keys)
    with pytest.raises(flame.InvalidArgument, match="1 to 512 characters"):
        await session.create_tasks([b"a", b"b"], keys=["a", ""])
    assert await session.list_tasks() == []


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_map_that_is_begun_again_runs_nothing_twice(session: flame.Session, ordered: bool) -> None:
    taken = 0

    def inputs() -> Iterator[bytes]:
        nonlocal taken
        for number in range(200):
            taken += 1
            yield b"%d" % number

    ids: dict[bytes, str] = {}
    async for task in session.map(inputs(), in_flight=20, ordered=ordered, key=name):
        ids[task.output] = task.id
        assert taken <= len(ids) + 20
    assert sorted(ids, key=int) == [b"%d" % number for number in range(200)]
    again = {task.output: task.id async for task in session.map(inputs(), ordered=ordered, key=name)}
    assert again == ids


@pytest.mark.parametrize("ordered", [True, False])
async def test_inputs_of_one_key_are_one_task_that_a_map_yields_for_each(session: flame.Session, ordered: bool) -> None:
    tasks = [task async for task in session.map([b"a", b"b", b"a"], ordered=ordered, key=name)]
    assert sorted(task.output for task in tasks) == [b"a", b"a", b"b"]
    assert len({task.id for task in tasks}) == 2
    fresh = [task async for task in session.map([b"a", b"a"], ordered=ordered, key=lambda _: None)]
    assert len({task.id for task in (*tasks, *fresh)}) == 4


async def test_what_a_key_function_raises_ends_the_map(session: flame.Session) -> None:
    with pytest.raises(ZeroDivisionError):
        async for _ in session.map([b"1", b"0"], key=lambda data: str(1 // int(data))):
            pass


async def test_typed_values_are_what_their_keys_are_made_of(session: flame.Session) -> None:
    typed = session.typed(int, int)

    async def values() -> AsyncIterator[int]:
        for value in (4, 5):
            yield value

    handles = await typed.create_tasks([4, 5], keys=["4", "5"])
    assert [(await handle).output for handle in handles] == [4, 5]
    for inputs in ([4, 5], values()):
        tasks = [task async for task in typed.map(inputs, key=str)]
        assert [(task.output, task.id == handle.id) for task, handle in zip(tasks, handles, strict=True)] == [
            (4, True),
            (5, True),
        ]


def test_the_same_without_async(cluster: Cluster) -> None:
    threads = set()

    def key(data: bytes | str) -> str:
        threads.add(threading.current_thread())
        return name(data)

    with flame.sync.connect(cluster.broker.endpoint) as client, client.create_session("flmping") as session:
        first = session.create_tasks([b"1", b"2"], keys=iter([name(b"1"), name(b"2")]))
        assert [task.id for task in session.map([b"1", b"2"], key=key)] == [handle.id for handle in first]
        assert threads == {threading.current_thread()}
        typed = session.typed(int, int)
        [seven] = typed.create_tasks([7], keys=["7"])
        assert [(task.output, task.id) for task in typed.map([7], key=str)] == [(7, seven.id)]
        with pytest.raises(flame.InvalidArgument, match="each of 1 inputs, got 2"):
            session.create_tasks([b"1"], keys=["a", "b"])
        with pytest.raises(ZeroDivisionError):
            list(session.map([b"1", b"0"], key=lambda data: str(1 // int(data))))
