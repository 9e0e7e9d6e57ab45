"""Many tasks at once: `create_tasks` and `map`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

import flame


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
