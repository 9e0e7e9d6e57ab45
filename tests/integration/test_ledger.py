"""Leases kept from ledgers, on a real cluster with short leases: blocked, killed and poisonous executors."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import flame
from tests.support.cluster import Cluster, eventually, kill, started_executors

ACK_WAIT_S = 2.0
SCHEDULER_OPTIONS = ("--ack-wait-s", str(ACK_WAIT_S))


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


def runs(mark: Path) -> Counter[str]:
    """How often each task ran, from the lines that the runs leave."""
    return Counter(line.split()[1] for line in mark.read_text().splitlines())


async def test_a_service_that_blocks_for_five_leases_runs_its_task_once(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    mark = tmp_path / "runs"
    async with await connection.create_session(lab, max_instances=1) as session:
        task = await session.invoke(call("block", 5 * ACK_WAIT_S, str(mark)), timeout_s=60)
    assert task.attempt == 1
    assert list(runs(mark).values()) == [1]


async def test_tasks_that_a_blocked_executor_holds_are_run_by_another(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    """Short tasks make for a large burst; a blocking one among them must not keep the rest."""
    mark = tmp_path / "runs"
    async with await connection.create_session(lab, max_instances=2, min_instances=2) as session:
        await asyncio.gather(*(session.invoke(call("sleep", 0)) for _ in range(400)))
        handles = [await session.create_task(call("block", 3.0, str(mark)))]
        handles += [await session.create_task(call("sleep", 0, str(mark))) for _ in range(50)]
        others = asyncio.gather(*handles[1:])
        await asyncio.wait_for(others, 2.5)
        assert not handles[0].done()
        await handles[0]
    assert set(runs(mark).values()) == {1}
    assert len(runs(mark)) == 51


async def test_a_killed_executors_tasks_run_elsewhere_and_only_the_running_one_counts_an_attempt(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    mark = tmp_path / "runs"
    session = await connection.create_session(lab, max_instances=1)
    await asyncio.gather(*(session.invoke(call("sleep", 0)) for _ in range(200)))
    [executor] = await started_executors(connection, session.id)
    first = await session.create_task(call("block", 1.0, str(mark)))
    rest = [await session.create_task(call("echo", number)) for number in range(100)]
    await eventually(mark.exists, "the first task runs")
    kill(executor.pid)
    async with asyncio.timeout(10):
        done = await first
        assert (done.attempt, done.state) == (2, flame.TaskState.SUCCEED)
        finished = [await handle for handle in rest]
    assert [json.loads(task.output) for task in finished] == list(range(100))
    assert {task.attempt for task in finished} == {1}
    assert list(runs(mark).values()) == [2]
    await session.close()


async def test_a_task_that_kills_its_executors_is_given_up_and_harms_no_other(
    connection: flame.Connection, lab: str
) -> None:
    async with await connection.create_session(lab, max_instances=1) as session:
        with pytest.raises(flame.TaskFailed, match="3 executors were lost") as caught:
            await session.invoke(call("exit", 7), timeout_s=60)
        assert caught.value.task.attempt == 3
        assert json.loads((await session.invoke(call("echo", "alive"), timeout_s=30)).output) == "alive"


async def test_executors_keep_their_own_leases_while_the_manager_is_stopped(
    cluster: Cluster, connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    import signal

    mark = tmp_path / "runs"
    async with await connection.create_session(lab, max_instances=1) as session:
        await session.invoke(call("echo", 1))
        handle = await session.create_task(call("sleep", 3 * ACK_WAIT_S, str(mark)))
        await eventually(mark.exists, "the task runs")
        manager = cluster.managers["node1"]
        manager.send_signal(signal.SIGSTOP)
        try:
            await asyncio.wait_for(handle, 30)
        finally:
            manager.send_signal(signal.SIGCONT)
    assert list(runs(mark).values()) == [1]
