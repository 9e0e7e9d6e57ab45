"""Many tasks at once: `create_tasks` and `map`."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing

import psutil
import pytest

import flame
import flame.sync
from flame.client.task import TaskHandle
from tests.support.cluster import Cluster, eventually, kill, started_executors

SLOW = '["sleep", 60]'


async def test_create_tasks_returns_handles_in_order_when_all_are_stored(connection: flame.Connection) -> None:
    async with await connection.create_session("flmping") as session:
        inputs = [b"%d" % number for number in range(10_000)]
        handles = await session.create_tasks(inputs)
        assert all(handle.stored for handle in handles)
        assert [(await handle).output for handle in handles] == inputs


async def test_map_yields_in_the_order_of_the_inputs_and_takes_them_as_needed(connection: flame.Connection) -> None:
    taken = 0

    def inputs() -> Iterator[str]:
        nonlocal taken
        for number in range(2000):
            taken += 1
            yield str(number)

    async with await connection.create_session("flmping") as session:
        outputs = []
        async for task in session.map(inputs(), in_flight=50):
            outputs.append(int(task.output))
            assert taken <= len(outputs) + 50
        assert outputs == list(range(2000))


async def test_map_as_completed_yields_each_once(connection: flame.Connection) -> None:
    async def inputs() -> AsyncIterator[bytes]:
        for number in range(500):
            yield b"%d" % number

    async with await connection.create_session("flmping") as session:
        outputs = [int(task.output) async for task in session.map(inputs(), ordered=False, in_flight=20)]
        assert sorted(outputs) == list(range(500))


async def test_map_raises_at_a_failed_task_or_yields_it(connection: flame.Connection, lab: str) -> None:
    inputs = ['["echo", 1]', '["fail", "no"]', '["echo", 2]']
    async with await connection.create_session(lab) as session:
        states = [task.state.value async for task in session.map(inputs, raise_failed=False)]
        assert states == ["succeed", "failed", "succeed"]
        tasks = session.map(inputs)
        assert (await anext(tasks)).output == b"1"
        with pytest.raises(flame.TaskFailed):
            await anext(tasks)


async def test_map_refuses_no_room_at_all(connection: flame.Connection) -> None:
    async with await connection.create_session("flmping") as session:
        with pytest.raises(flame.InvalidArgument, match="in_flight"):
            await anext(session.map([b""], in_flight=0))


# ---- leaving early


async def ends_of(session: flame.Session, count: int) -> list[str]:
    """Return the states of a session's tasks once so many have ended."""

    async def ended() -> list[str] | None:
        states = [task.state.value for task in await session.list_tasks()]
        return states if sum(state not in ("pending", "running") for state in states) >= count else None

    return sorted(await eventually(ended, f"{count} tasks have ended"))


async def test_a_map_that_is_left_cancels_what_is_outstanding(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        async with aclosing(session.map(['["echo", 1]', SLOW, SLOW, SLOW])) as tasks:
            assert (await anext(tasks)).output == b"1"
        states = [task.state.value for task in await session.list_tasks()]
        assert sorted(states) == ["cancelled", "cancelled", "cancelled", "succeed"]
        [_, task, *_] = await session.list_tasks()
        assert task.error is not None
        assert task.error.message == "the map that created it was left"


async def test_a_break_and_an_error_leave_a_map_too(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        async for _ in session.map(['["echo", 1]', SLOW], ordered=False):
            break
        assert await ends_of(session, 2) == ["cancelled", "succeed"]
    async with await connection.create_session(lab) as session:
        with pytest.raises(flame.TaskFailed, match="no"):
            async for _ in session.map(['["fail", "no"]', SLOW]):
                pass
        assert await ends_of(session, 2) == ["cancelled", "failed"]
    async with await connection.create_session(lab) as session:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(session.map([SLOW, SLOW])), 1)
        assert await ends_of(session, 2) == ["cancelled", "cancelled"]


async def test_inputs_that_raise_end_a_map_with_their_error(connection: flame.Connection, lab: str) -> None:
    def inputs(last: str) -> Iterator[str]:
        yield last
        raise KeyError("half-way")

    async def later(last: str) -> AsyncIterator[str]:
        for data in inputs(last):
            yield data

    sources: list[Callable[[str], Iterator[str] | AsyncIterator[str]]] = [inputs, later]
    for source in sources:
        async with await connection.create_session(lab) as session:
            with pytest.raises(KeyError, match="half-way"):
                async for _ in session.map(source(SLOW)):
                    pass
            assert await ends_of(session, 1) == ["cancelled"]
            with pytest.raises(KeyError, match="half-way"):
                async for _ in session.map(source('["echo", 1]'), cancel_on_exit=False):
                    pass
            assert await ends_of(session, 2) == ["cancelled", "succeed"]


def test_the_same_without_async(cluster: Cluster, lab: str) -> None:
    def inputs() -> Iterator[str]:
        yield SLOW
        raise KeyError("half-way")

    with flame.sync.connect(cluster.broker.endpoint) as client, client.create_session(lab) as session:
        with session.map(['["echo", 1]', SLOW, SLOW]) as tasks:
            assert next(tasks).output == b"1"
        assert [task.state.value for task in session.list_tasks()] == ["succeed", "cancelled", "cancelled"]
        with pytest.raises(KeyError, match="half-way"):
            list(session.map(inputs()))
        assert [task.state.value for task in session.list_tasks()][3:] in ([], ["cancelled"])
        seen: list[tuple[int, int | None]] = []

        def on_progress(done: int, total: int | None) -> None:
            seen.append((done, total))
            if done == 2:
                raise InterruptedError("enough")

        with pytest.raises(InterruptedError):
            list(session.map(['["echo", 1]', '["echo", 2]', SLOW], on_progress=on_progress))
        assert seen == [(1, 3), (2, 3)]


# ---- progress


async def test_progress_tells_how_many_are_done_of_how_many(connection: flame.Connection) -> None:
    seen: list[tuple[int, int | None]] = []

    def on_progress(done: int, total: int | None) -> None:
        seen.append((done, total))

    def raises(done: int, total: int | None) -> None:
        raise InterruptedError(f"at {done} of {total}")

    async with await connection.create_session("flmping") as session:
        for ordered in (True, False):
            seen.clear()
            count = 0
            async for _ in session.map(["a", "b", "c"], ordered=ordered, on_progress=on_progress):
                count += 1
                assert seen[-1] == (count, 3)
            assert len(seen) == 3
        seen.clear()
        assert len([task async for task in session.map(iter(["a"]), on_progress=on_progress)]) == 1
        assert seen == [(1, None)]
        with pytest.raises(InterruptedError, match="at 1 of 2"):
            await anext(session.map(["a", "b"], on_progress=raises))


# ---- what it needs, and what it survives


@pytest.mark.parametrize("ordered", [True, False])
async def test_any_number_of_inputs_needs_little_memory(connection: flame.Connection, ordered: bool) -> None:
    async with await connection.create_session("flmping") as session:
        me = psutil.Process()
        async for _ in session.map((b"%d" % number for number in range(5_000)), ordered=ordered):
            pass
        before, count, most = me.memory_info().rss, 0, 0
        async for task in session.map((b"%d" % number for number in range(50_000)), ordered=ordered):
            if ordered:
                assert task.output == b"%d" % count
            count += 1
            if count % 10_000 == 0:
                most = max(most, sum(type(thing) is TaskHandle for thing in gc.get_objects()))
        assert count == 50_000
        assert most <= 1100, "no more than are under way"
        assert me.memory_info().rss - before < 16 * 2**20


async def test_a_map_survives_a_killed_executor(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab, max_instances=2) as session:
        inputs = (json.dumps(["echo", number]) for number in range(3000))
        outputs = []
        async for task in session.map(inputs, in_flight=200):
            outputs.append(int(task.output))
            if len(outputs) in (500, 1500):
                kill((await started_executors(connection, session.id))[0].pid)
        assert outputs == list(range(3000))
