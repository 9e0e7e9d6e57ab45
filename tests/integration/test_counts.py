"""Counts of a session's tasks: exact at rest, whoever was killed when."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import flame
from flame.protocol import subjects
from flame.protocol.states import ExecutorState, SessionState, TaskState
from tests.support.cluster import Cluster, eventually, executors_of, kill
from tests.support.records import at_rest, counts

NODES = 2


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


def kill_scheduler(cluster: Cluster) -> None:
    assert cluster.scheduler is not None
    cluster.scheduler.kill()
    cluster.scheduler.wait()


@pytest.fixture
async def patient(cluster: Cluster) -> AsyncIterator[flame.Connection]:
    """A client that outlives schedulers."""
    async with cluster.connect() as client:
        yield client


async def recorded(connection: flame.Connection, session: flame.Session) -> int:
    """Return how many tasks of a session have their records."""
    stream = subjects.result_stream(session.application)
    found = await connection.broker.subjects(stream, subjects.session_results(session.application, session.id))
    return len(found)


async def test_executors_that_are_killed_have_each_of_their_records_counted(
    connection: flame.Connection, lab: str
) -> None:
    """They report a few times a second, and store hundreds of records in between."""
    session = await connection.create_session(lab, max_instances=3)
    await session.invoke(call("echo", 0))
    handles: list[flame.TaskHandle] = []
    for _ in range(6):
        handles += await asyncio.gather(*(session.create_task(call("sleep", 0.001)) for _ in range(500)))
        bound = [e for e in await executors_of(connection, session.id) if e.state is ExecutorState.BOUND and e.pid]
        for executor in bound[:2]:
            kill(executor.pid)
    async with asyncio.timeout(60):
        tasks = await asyncio.gather(*handles)
    assert {task.state for task in tasks} == {TaskState.SUCCEED}
    await at_rest(connection, session, 3001)
    await session.close()
    await at_rest(connection, session, 3001)


async def test_a_scheduler_that_is_killed_while_a_session_ends_leaves_no_task_without_a_record_or_a_count(
    cluster: Cluster, patient: flame.Connection, lab: str
) -> None:
    tasks = 5000
    interrupted = 0
    for goal in range(500, tasks, 1500):
        session = await patient.create_session(lab, resources="gpu=64")
        await asyncio.gather(*(session.create_task(call("echo", number)) for number in range(tasks)))
        await patient.close_session(session.id)
        assert cluster.scheduler is not None
        while True:  # it stands still while this looks, or a busy machine would see it only when it is done
            cluster.scheduler.send_signal(signal.SIGSTOP)
            if await recorded(patient, session) >= goal:
                break
            cluster.scheduler.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.02)
        kill_scheduler(cluster)
        interrupted += await recorded(patient, session) < tasks
        cluster.start_scheduler()
        await at_rest(patient, session, tasks)

        async def closed(session: flame.Session = session) -> bool:
            record = (await patient.get_session(session.id)).session
            return (record.state, record.settled, record.writer) == (SessionState.CLOSED, True, "")

        await eventually(closed, "the session is closed")
        assert counts(await patient.get_session(session.id)) == (0, 0, 0, 0, tasks)
    assert interrupted


async def test_a_scheduler_that_is_killed_while_it_cancels_loses_no_count(
    cluster: Cluster, patient: flame.Connection, lab: str
) -> None:
    session = await patient.create_session(lab, resources="gpu=64")
    handles = await asyncio.gather(*(session.create_task(call("echo", number)) for number in range(2000)))
    given_up = [handle.id for handle in handles[:1500]]
    for goal in (300, 1100):
        cancelling = asyncio.create_task(patient.cancel_tasks(session.id, given_up))
        while await recorded(patient, session) < goal:  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0)
        kill_scheduler(cluster)
        cluster.start_scheduler()
        await asyncio.wait_for(cancelling, 60)  # it asks again
    await eventually_counts(patient, session, (500, 0, 0, 0, 1500))
    await session.close()
    await at_rest(patient, session, 2000)


async def eventually_counts(connection: flame.Connection, session: flame.Session, expected: tuple[int, ...]) -> None:
    async def same() -> bool:
        return counts(await connection.get_session(session.id)) == expected

    await eventually(same, f"the counts are {expected}", 60)


async def test_what_an_executor_of_a_lost_node_stores_after_all_is_counted_too(
    cluster: Cluster, connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    await asyncio.gather(*(session.invoke(call("echo", number)) for number in range(100)))
    mark = tmp_path / "runs"
    handle = await session.create_task(call("sleep", 30, str(mark)))
    await eventually(mark.exists, "the task runs")
    [executor] = await executors_of(connection, session.id)
    manager = psutil.Process(cluster.managers[executor.node].pid)
    manager.suspend()
    try:

        async def runs_elsewhere() -> bool:
            return len(mark.read_text().splitlines()) == 2

        await eventually(runs_elsewhere, "the task runs on the other node", 60)
        task = await asyncio.wait_for(handle, 60)
        assert (task.state, task.executor) == (TaskState.SUCCEED, executor.id)
    finally:
        manager.resume()
    await session.close(flame.CloseMode.FORCE)
    await at_rest(connection, session, 101)
    assert (await connection.get_session(session.id)).succeeded == 101


async def test_many_sessions_are_listed_with_their_counts(connection: flame.Connection, lab: str) -> None:
    held = {}
    for number in range(60):
        session = await connection.create_session(lab, resources="gpu=64", labels={"of": "many"})
        held[session.id] = number % 3
        for _ in range(number % 3):
            await session.create_task(call("echo", 1))

    async def told() -> bool:
        listed = await connection.list_sessions(labels={"of": "many"})
        return {info.session.id: info.pending for info in listed} == held

    await eventually(told, "every session is listed with what it holds")
    infos = await connection.list_sessions(labels={"of": "many"})
    assert all("gpu" in info.waits_for for info in infos if info.pending)
    for session_id in held:
        await connection.close_session(session_id)
