"""Time limits, delays and tasks that come too late, with real executors."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.protocol.codes import ErrorCode
from flame.protocol.states import SessionState, TaskState
from tests.support.cluster import Cluster, eventually, executors_of
from tests.support.records import at_rest, records_of


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def pid_of(session: flame.Session) -> int:
    found: int = json.loads((await session.invoke(call("who"))).output)["pid"]
    return found


async def test_a_run_is_stopped_at_its_limit_and_its_executor_goes_on(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab, max_instances=1)
    pid = await pid_of(session)
    begun = time.monotonic()
    with pytest.raises(flame.TaskTimeout, match="longer than") as failure:
        await session.invoke(call("sleep", 600), options=flame.TaskOptions(timeout_s=0.5))
    assert 0.5 <= time.monotonic() - begun < 3
    task = failure.value.task
    assert task.error is not None
    assert (task.state, task.error.code, task.error.type) == (TaskState.FAILED, ErrorCode.TASK_TIMEOUT, "TaskTimeout")
    assert await pid_of(session) == pid
    await at_rest(connection, session, 3)
    await session.close()


async def test_an_application_limits_its_tasks_and_a_task_says_otherwise(
    connection: flame.Connection, cluster: Cluster
) -> None:
    application = "quick"
    await connection.register_application(application, cluster.service("lab", timeout_s=0.5, concurrency=4))
    session = await connection.create_session(application, max_instances=1)
    longer = flame.TaskOptions(timeout_s=60)
    patient = [await session.create_task(call("sleep", 1.5), options=longer) for _ in range(2)]
    hasty = [await session.create_task(call("sleep", 1.5)) for _ in range(2)]
    for handle in hasty:
        with pytest.raises(flame.TaskTimeout):
            await handle
    assert len({(await handle).output for handle in patient}) == 1  # in one process, beside one another
    await at_rest(connection, session, 4)
    await session.close()


async def test_a_handler_in_a_thread_sees_that_its_time_is_over_and_one_that_does_not_is_ended(
    connection: flame.Connection, cluster: Cluster
) -> None:
    await connection.register_application("threaded", cluster.service("threaded"))
    session = await connection.create_session("threaded", max_instances=1)
    pid = (await session.invoke("[0, true]")).output
    limit = flame.TaskOptions(timeout_s=0.3)
    begun = time.monotonic()
    with pytest.raises(flame.TaskTimeout):
        await session.invoke("[600, true]", options=limit)
    assert time.monotonic() - begun < 3
    assert (await session.invoke("[0, true]")).output == pid
    with pytest.raises(flame.TaskTimeout):
        await session.invoke("[600, false]", options=limit)
    assert (await session.invoke("[0, true]")).output != pid  # no task ran beside that thread
    await at_rest(connection, session, 5)
    await session.close()


async def test_a_delayed_task_waits_and_keeps_nobody_from_running(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab, max_instances=1)
    await pid_of(session)
    stored = time.monotonic()
    late = await session.create_task(call("echo", "late"), options=flame.TaskOptions(delay_s=1.5))
    await session.invoke(call("echo", "now"))
    assert time.monotonic() - stored < 1.5
    task = await late
    assert 1.5 <= time.monotonic() - stored < 5
    assert task.output == b'"late"'
    records = await records_of(connection, session)
    assert records[late.id].attempt == 1
    await at_rest(connection, session, 3)
    await session.close()


async def test_a_delayed_task_is_run_although_its_executor_left_meanwhile(
    connection: flame.Connection, cluster: Cluster
) -> None:
    await connection.register_application("fleeting", cluster.service("lab", delay_release_s=0))
    session = await connection.create_session("fleeting")
    pid = await pid_of(session)
    stored = time.monotonic()
    late = await session.create_task(call("who"), options=flame.TaskOptions(delay_s=4))

    async def nobody() -> bool:
        return not await executors_of(connection, session.id)

    await eventually(nobody, "the executor has left")
    assert time.monotonic() - stored < 4
    async with asyncio.timeout(30):
        assert json.loads((await late).output)["pid"] != pid
    assert time.monotonic() - stored >= 4
    await at_rest(connection, session, 2)
    await session.close()


async def test_a_task_that_is_not_started_in_time_expires_and_never_runs(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    await pid_of(session)
    busy = await session.create_task(call("sleep", 1.5))
    mark = tmp_path / "ran"
    expired = await session.create_task(call("sleep", 0, str(mark)), options=flame.TaskOptions(expires_s=0.5))
    good = await session.create_task(call("echo", 1), options=flame.TaskOptions(expires_s=60))
    with pytest.raises(flame.TaskExpired, match="not started within"):
        await expired
    await asyncio.gather(busy, good)
    assert not mark.exists()
    await at_rest(connection, session, 4)
    await session.close()


async def test_force_stops_what_runs_and_what_waits_never_does(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    await pid_of(session)
    mark = tmp_path / "runs"
    running = await session.create_task(call("sleep", 600, str(mark)))
    await eventually(mark.exists, "the task runs")
    waiting = await session.create_task(call("sleep", 0, str(tmp_path / "waits")))
    await session.close("force", timeout_s=30)
    assert session.state is SessionState.CLOSED
    for handle in (running, waiting):
        with pytest.raises(flame.TaskCancelled):
            await handle
    records = await records_of(connection, session)
    assert records[running.id].executor
    assert not records[waiting.id].executor
    assert not (tmp_path / "waits").exists()
    await at_rest(connection, session, 3)
