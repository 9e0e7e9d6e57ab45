"""Cancelling tasks: whoever is quicker, there is one record, and the counts say the same."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.protocol.codes import ErrorCode
from flame.protocol.states import TaskState
from tests.support.cluster import Cluster, eventually
from tests.support.records import at_rest, counts, records_of, waiting_in


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def running(session: flame.Session, seconds: float, mark: Path, how: str = "sleep") -> flame.TaskHandle:
    """Return a task of the session's only executor that runs."""
    handle = await session.create_task(call(how, seconds, str(mark)))
    await eventually(mark.exists, "the task runs")
    return handle


async def test_tasks_that_wait_never_run(connection: flame.Connection, lab: str, tmp_path: Path) -> None:
    session = await connection.create_session(lab, max_instances=1)
    busy = await running(session, 2.0, tmp_path / "busy")
    waiting = [await session.create_task(call("sleep", 0, str(tmp_path / f"{number}"))) for number in range(6)]
    given_up = [handle.id for handle in waiting[:4]]
    states = await connection.cancel_tasks(session.id, given_up, "not wanted any more")
    assert states == dict.fromkeys(given_up, TaskState.CANCELLED)
    for handle in waiting[:4]:
        with pytest.raises(flame.TaskCancelled, match="not wanted any more") as caught:
            await handle
        assert caught.value.task.error is not None
        assert caught.value.task.error.code == ErrorCode.TASK_CANCELLED
        assert caught.value.task.executor == ""
    await asyncio.gather(busy, *waiting[4:])
    await at_rest(connection, session, 7)
    ran = await asyncio.to_thread(lambda: sorted(path.name for path in tmp_path.iterdir()))
    assert ran == ["4", "5", "busy"]
    assert await waiting_in(connection, session) == 0
    await session.close()


async def test_a_task_that_runs_is_stopped_and_its_executor_goes_on(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    pid = json.loads((await session.invoke(call("who"))).output)["pid"]
    handle = await running(session, 600, tmp_path / "runs")
    begun = time.monotonic()
    assert await connection.cancel_tasks(session.id, [handle.id]) == {handle.id: TaskState.CANCELLED}
    with pytest.raises(flame.TaskCancelled):
        await handle
    answer = json.loads((await session.invoke(call("who"), timeout_s=30)).output)
    assert answer["pid"] == pid
    assert time.monotonic() - begun < 10
    await at_rest(connection, session, 3)
    await session.close()


async def test_a_task_that_blocks_is_stopped_with_its_process_and_the_others_run_elsewhere(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    pid = json.loads((await session.invoke(call("who"))).output)["pid"]
    handle = await running(session, 600, tmp_path / "runs", "block")
    other = await session.create_task(call("who"))
    assert await connection.cancel_tasks(session.id, [handle.id]) == {handle.id: TaskState.CANCELLED}
    with pytest.raises(flame.TaskCancelled):
        await asyncio.wait_for(handle, 5)  # its record doesn't wait for its process
    answer = json.loads((await asyncio.wait_for(other, 60)).output)
    assert answer["pid"] != pid
    await at_rest(connection, session, 3)
    assert len((tmp_path / "runs").read_text().splitlines()) == 1
    await session.close()


async def test_what_has_ended_stays_as_it_is_and_what_is_unknown_is_left_out(
    connection: flame.Connection, lab: str
) -> None:
    session = await connection.create_session(lab)
    done = await session.invoke(call("echo", 1))
    with pytest.raises(flame.TaskFailed) as failed:
        await session.invoke(call("fail", "no"))
    tasks = [done.id, failed.value.task.id, "nosuchtask", done.id]
    expected = {done.id: TaskState.SUCCEED, failed.value.task.id: TaskState.FAILED}
    for _ in range(2):
        assert await connection.cancel_tasks(session.id, tasks) == expected
    await at_rest(connection, session, 2)
    await session.close()
    assert await connection.cancel_tasks(session.id, tasks) == expected
    with pytest.raises(flame.SessionNotFound):
        await connection.cancel_tasks("nosuchsession", ["t"])


async def test_a_thousand_tasks_are_cancelled_at_once_and_again(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab, resources="gpu=64")
    handles = [await session.create_task(call("echo", number)) for number in range(1500)]
    given_up = [handle.id for handle in handles[:1024]]
    for _ in range(2):
        states = await connection.cancel_tasks(session.id, given_up)
        assert states == dict.fromkeys(given_up, TaskState.CANCELLED)
    assert counts(await connection.get_session(session.id)) == (476, 0, 0, 0, 1024)
    await session.close()
    await at_rest(connection, session, 1500)


@pytest.mark.parametrize("instances", [1, 4])
async def test_whichever_side_is_quicker_there_is_one_record_and_both_know_it(
    connection: flame.Connection, cluster: Cluster, lab: str, instances: int
) -> None:
    async with cluster.connect() as other:
        session = await connection.create_session(lab, max_instances=instances)
        await session.invoke(call("echo", 0))
        handles = await asyncio.gather(*(session.create_task(call("sleep", 0.01)) for _ in range(400)))
        told: dict[str, TaskState] = {}

        async def cancel(tasks: list[flame.TaskHandle]) -> None:
            for handle in reversed(tasks):  # so that the two sides meet
                states = await other.cancel_tasks(session.id, [handle.id])
                told.update(states)

        await asyncio.gather(*(cancel(handles[begin::8]) for begin in range(4)))
        ends = await asyncio.gather(*handles, return_exceptions=True)
        await at_rest(connection, session, 401)
        records = await records_of(connection, session)
        for handle, end in zip(handles, ends, strict=True):
            state = records[handle.id].state
            assert told.get(handle.id, state) is state
            assert isinstance(end, flame.TaskCancelled if state is TaskState.CANCELLED else flame.Task)
        assert {records[handle.id].state for handle in handles[4::8]} == {TaskState.SUCCEED}
        await session.close()
        assert {record.state for record in records.values()} == {TaskState.SUCCEED, TaskState.CANCELLED}
