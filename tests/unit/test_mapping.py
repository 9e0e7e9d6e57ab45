"""A map in a cluster in memory: what reconnects and a scheduler that is gone make of it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

import flame
from flame.client.mapping import CANCEL_S
from flame.testing import MemoryCluster, VirtualClock


@flame.entrypoint
async def double(number: int) -> int:
    return 2 * number


class Slow(flame.FlameService):
    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        await asyncio.sleep(float(context.input))
        return context.input


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_map_goes_on_after_reconnects(ordered: bool) -> None:
    async with MemoryCluster(clock=VirtualClock()) as cluster:
        await cluster.register(double, "double")
        session = await cluster.create_session("double")
        outputs = []
        async for task in session.typed(double).map(range(2000), ordered=ordered, in_flight=100):
            outputs.append(task.output)
            if len(outputs) % 300 == 0:
                cluster.server.restart()
        assert (outputs if ordered else sorted(outputs)) == [2 * number for number in range(2000)]


async def test_leaving_a_map_without_a_scheduler_does_not_wait_for_it() -> None:
    clock = VirtualClock()
    async with MemoryCluster(clock=clock) as cluster:
        await cluster.register(Slow, "slow")
        session = await cluster.create_session("slow")
        async with aclosing(session.map(["0", "60"])) as tasks:
            assert (await anext(tasks)).output == b"0"
            await cluster._api.stop()
            before = clock.elapsed
        assert clock.elapsed - before <= CANCEL_S + 1
        await cluster._api.start()
        states = [task.state.value for task in await session.list_tasks()]
        assert states == ["succeed", "running"], "it goes on"


async def test_an_entrypoint_serves_sessions_of_its_own() -> None:
    @flame.entrypoint
    async def greet(name: str, greeting: flame.CommonData[str]) -> str:
        return f"{greeting} {name}"

    async with MemoryCluster() as cluster:
        await cluster.register(greet, "greet")
        sessions = [await cluster.create_session("greet", flame.as_json(text)) for text in ("Hello", "Bye")]
        outputs = [(await session.typed(greet).invoke("Ada")).output for session in sessions]
        assert outputs == ["Hello Ada", "Bye Ada"]
        assert (await sessions[0].typed(greet).invoke("Bob")).output == "Hello Bob"
