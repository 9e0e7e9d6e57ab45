"""What tasks emit, on a broker that loses, repeats and delays, and with executors that come and go; in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

import flame
from flame.broker.memory import Faults, MemoryServer
from flame.protocol import defaults, subjects
from flame.protocol.chunks import ChunkMessage
from flame.protocol.messages import ResultRecord
from flame.protocol.states import TaskState
from tests.support.memory_cluster import MemoryCluster
from tests.support.virtual_time import run_virtually

CALM = Faults()


class Counting:
    """Emits as many chunks as its input says, with pauses."""

    async def on_task_invoke(self, context: flame.TaskContext) -> str:
        count, pause_s = json.loads(context.input)
        for number in range(count):
            await context.emit(str(number))
            await asyncio.sleep(pause_s)
        return str(context.attempt)


def call(count: int, pause_s: float = 0.01) -> bytes:
    return json.dumps([count, pause_s]).encode()


async def runs_of(stream: flame.ChunkStream) -> list[list[str]]:
    """What comes, run by run."""
    runs: list[list[str]] = []
    async for chunk in stream:
        if chunk.index == 0:
            runs.append([])
        assert chunk.index == len(runs[-1])
        runs[-1].append(chunk.text)
    return runs


async def heard_late(session: flame.Session, task: str) -> list[list[str]]:
    """What comes to who listens when all is over, as a patient user would: two lost questions are an error."""
    while True:
        with contextlib.suppress(flame.SchedulerUnavailable):
            return await runs_of(session.open_stream(task))


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_everything_is_heard_in_order_whatever_the_broker_loses(seed: int) -> None:
    faults = Faults(
        lose_live=0.1, lose_requests=0.05, lose_answers=0.05, lose_stores=0.1, lose_store_answers=0.1, interrupt=0.005
    )

    async def main() -> None:
        server = MemoryServer(seed=seed)
        async with MemoryCluster(server, Counting) as cluster:
            client = cluster.client()
            session = await client.create_session(await cluster.application(max_instances=1))
            await session.invoke(call(0))
            server.chance.faults = faults
            streams = [session.stream(call(400)) for _ in range(2)]
            heard = await asyncio.gather(*map(runs_of, streams))
            late = await heard_late(session, streams[0].task.id)
            server.chance.faults = CALM
            assert [runs[-1] for runs in (*heard, late)] == [numbers(400)] * 3

    run_virtually(main(), limit_s=3600)


@pytest.mark.parametrize("kills", [1, 2])
def test_an_executor_that_is_lost_begins_anew_elsewhere(kills: int) -> None:
    async def main() -> None:
        async with MemoryCluster(MemoryServer(), Counting) as cluster:
            client = cluster.client()
            session = await client.create_session(await cluster.application(max_instances=1))
            stream = session.stream(call(100, 0.1))
            hearing = asyncio.create_task(runs_of(stream))
            for _ in range(kills):
                await asyncio.sleep(3.0)
                for executor in cluster.executors:
                    cluster.kill_executor(executor)
            runs = await hearing
            assert len(runs) == kills + 1
            assert runs[-1] == numbers(100)
            assert all(run == numbers(len(run)) for run in runs)
            assert stream.task.attempt == kills + 1

    run_virtually(main(), limit_s=3600)


def test_a_run_whose_record_was_first_counts_though_a_later_one_had_begun() -> None:
    """An executor that was given up and lives on ends the task, after another one has begun to emit."""

    async def main() -> None:
        async with MemoryCluster(MemoryServer(), Counting) as cluster:
            client = cluster.client()
            application = await cluster.application(max_instances=1)
            session = await client.create_session(application)
            handle = await session.create_task(call(1), options=flame.TaskOptions(delay_s=600))

            async def store(*chunks: ChunkMessage) -> None:
                for chunk in chunks:
                    subject = subjects.chunk(application, session.id, handle.id)
                    await client.broker.store(subject, chunk.encode(), 5.0)

            hearing = asyncio.create_task(runs_of(handle.stream()))
            await store(ChunkMessage(0, 1, 1.0, b"a"), ChunkMessage(0, 2, 2.0, b"x"), ChunkMessage(1, 1, 1.0, b"b"))
            await asyncio.sleep(1.0)
            record = ResultRecord(TaskState.SUCCEED, attempt=1, started=1.0, chunks=2)
            result = subjects.result(application, session.id, handle.id)
            await client.broker.store(result, record.encode(), 5.0)
            assert await hearing == [["a"], ["x"], ["a", "b"]]

    run_virtually(main(), limit_s=3600)


def test_a_dead_broker_holds_back_whoever_emits_and_then_tells_him() -> None:
    class Emitting:
        count = 0

        async def on_task_invoke(self, context: flame.TaskContext) -> None:
            await asyncio.sleep(1.0)
            while True:
                await context.emit(b"x")
                Emitting.count += 1

    async def main() -> None:
        server = MemoryServer()
        async with MemoryCluster(server, Emitting) as cluster:
            client = cluster.client()
            session = await client.create_session(await cluster.application(max_instances=1))
            handle = await session.create_task(b"")
            await asyncio.sleep(0.5)
            server.chance.faults = Faults(lose_stores=1.0)
            await asyncio.sleep(120)
            assert Emitting.count == defaults.CHUNK_WINDOW
            server.chance.faults = CALM
            with pytest.raises(flame.TaskFailed, match="a chunk could not be stored"):
                await handle

    run_virtually(main(), limit_s=3600)


def test_a_listener_of_a_session_whose_connection_is_closed_is_told() -> None:
    async def main() -> None:
        async with MemoryCluster(MemoryServer(), Counting) as cluster:
            client = cluster.client()
            session = await client.create_session(await cluster.application(max_instances=1))
            stream = session.stream(call(100, 1.0))
            await anext(stream)
            await client.close()
            with pytest.raises(flame.BrokerUnavailable):
                await runs_of(stream)

    run_virtually(main(), limit_s=3600)


def test_a_task_of_another_client_is_listened_to_once_or_twice() -> None:
    async def main() -> None:
        async with MemoryCluster(MemoryServer(), Counting) as cluster:
            one, other = cluster.client(), cluster.client()
            session = await one.create_session(await cluster.application(max_instances=1))
            handle = await session.create_task(call(20, 1.0))
            elsewhere = await other.open_session(session.id)
            left = elsewhere.open_stream(handle.id)
            stays = elsewhere.open_stream(handle.id)
            await anext(left)
            first = await anext(stays)
            await left.aclose()
            rest: list[Any] = [chunk.text async for chunk in stays]
            assert [first.text, *rest] == numbers(20)
            assert stays.task.output == b"1"

    run_virtually(main(), limit_s=3600)
