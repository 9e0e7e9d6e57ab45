"""The end of a session: drained, closed, by force, by its application's end, or for want of tasks."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.protocol.codes import ErrorCode, ReasonCode
from flame.protocol.states import CloseMode, SessionState, TaskState
from tests.support.cluster import Cluster, alive, eventually
from tests.support.records import at_rest, records_of, waiting_in

ENDED_S = 30.0


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def running(session: flame.Session, seconds: float, mark: Path, how: str = "sleep") -> flame.TaskHandle:
    """Return a task of the session's only executor that runs."""
    handle = await session.create_task(call(how, seconds, str(mark)))
    await eventually(mark.exists, "the task runs")
    return handle


async def ended(connection: flame.Connection, session: flame.Session) -> None:
    """Return when a session is closed, with nothing of it left."""

    async def settled() -> bool:
        record = (await connection.get_session(session.id)).session
        return record.settled and record.state is SessionState.CLOSED

    await eventually(settled, "the session is closed", ENDED_S)
    assert await waiting_in(connection, session) == 0


async def states_of(handles: list[flame.TaskHandle]) -> Counter[TaskState]:
    """Return how tasks have ended, once they have."""
    async with asyncio.timeout(ENDED_S):
        await asyncio.gather(*handles, return_exceptions=True)
    return Counter(handle.task.state for handle in handles)


async def test_draining_runs_what_waits_and_takes_nothing_new(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    busy = await running(session, 1.0, tmp_path / "busy")
    waiting = [await session.create_task(call("sleep", 0.05)) for _ in range(20)]
    await connection.close_session(session.id, mode=CloseMode.DRAIN)
    with pytest.raises(flame.SessionNotOpen):
        await connection.open_session(session.id)
    assert await states_of([busy, *waiting]) == {TaskState.SUCCEED: 21}
    await ended(connection, session)
    await at_rest(connection, session, 21)
    with pytest.raises(flame.SessionNotOpen):
        await session.create_task(call("echo", 1))


async def test_draining_a_session_that_nobody_serves_yet_runs_its_tasks(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab, max_instances=2)
    handles = await asyncio.gather(*(session.create_task(call("echo", number)) for number in range(50)))
    await connection.close_session(session.id, mode=CloseMode.DRAIN)
    assert await states_of(list(handles)) == {TaskState.SUCCEED: 50}
    await ended(connection, session)
    await at_rest(connection, session, 50)


@pytest.mark.parametrize("mode", CloseMode)
async def test_a_session_without_a_task_is_closed_at_once(
    connection: flame.Connection, lab: str, mode: CloseMode
) -> None:
    session = await connection.create_session(lab)
    begun = time.monotonic()
    await session.close(mode, timeout_s=ENDED_S)
    assert time.monotonic() - begun < 5
    await ended(connection, session)
    record = (await connection.get_session(session.id)).session
    assert (record.close_mode, record.reason) == (mode, "")
    assert record.ended >= record.created


async def test_force_stops_what_runs(connection: flame.Connection, lab: str, tmp_path: Path) -> None:
    session = await connection.create_session(lab, max_instances=1)
    pid = json.loads((await session.invoke(call("who"))).output)["pid"]
    handles = [await running(session, 600, tmp_path / "runs")]
    handles += [await session.create_task(call("echo", number)) for number in range(5)]
    begun = time.monotonic()
    await session.close(CloseMode.FORCE, timeout_s=ENDED_S)
    assert time.monotonic() - begun < 10
    assert await states_of(handles) == {TaskState.CANCELLED: 6}
    await at_rest(connection, session, 7)
    assert not alive(pid)


async def test_force_ends_what_blocks(connection: flame.Connection, lab: str, tmp_path: Path) -> None:
    session = await connection.create_session(lab, max_instances=1)
    pid = json.loads((await session.invoke(call("who"))).output)["pid"]
    handles = [await running(session, 600, tmp_path / "runs", "block")]
    handles += [await session.create_task(call("echo", number)) for number in range(5)]
    await session.close(CloseMode.FORCE, timeout_s=ENDED_S)
    assert await states_of(handles) == {TaskState.CANCELLED: 6}
    await at_rest(connection, session, 7)
    assert not alive(pid)
    assert {record.state for record in (await records_of(connection, session)).values()} == {
        TaskState.SUCCEED,
        TaskState.CANCELLED,
    }


async def test_a_mode_that_goes_further_still_counts_and_one_that_does_not_changes_nothing(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    handles = [await running(session, 600, tmp_path / "runs")]
    handles += [await session.create_task(call("sleep", 600)) for _ in range(3)]

    async def mode_after(mode: CloseMode) -> CloseMode:
        await connection.close_session(session.id, mode=mode)
        return (await connection.get_session(session.id)).session.close_mode

    assert await mode_after(CloseMode.DRAIN) is CloseMode.DRAIN
    assert await mode_after(CloseMode.CLOSE) is CloseMode.CLOSE
    assert await mode_after(CloseMode.DRAIN) is CloseMode.CLOSE
    assert not any(handle.done() for handle in handles[:1])
    assert await mode_after(CloseMode.FORCE) is CloseMode.FORCE
    assert await mode_after(CloseMode.CLOSE) is CloseMode.FORCE
    assert await states_of(handles) == {TaskState.CANCELLED: 4}
    await ended(connection, session)
    assert await mode_after(CloseMode.DRAIN) is CloseMode.FORCE
    await at_rest(connection, session, 4)


async def test_an_application_that_is_unregistered_by_force_takes_its_sessions_with_it(
    cluster: Cluster, connection: flame.Connection, tmp_path: Path
) -> None:
    await connection.register_application("brief", cluster.service("lab"))
    session = await connection.create_session("brief", max_instances=1)
    handles = [await running(session, 600, tmp_path / "runs")]
    handles += [await session.create_task(call("echo", number)) for number in range(3)]
    with pytest.raises(flame.ApplicationInUse):
        await connection.unregister_application("brief")
    async with asyncio.timeout(ENDED_S):
        while True:
            try:
                await connection.unregister_application("brief", force=True)
                break
            except flame.Unavailable:  # some are still ending
                continue
    assert await states_of(handles) == {TaskState.CANCELLED: 4}
    record = (await connection.get_session(session.id)).session
    assert (record.state, record.code) == (SessionState.CLOSED, ReasonCode.UNREGISTERED)
    assert "brief" in record.reason
    with pytest.raises(flame.ApplicationNotFound):
        await connection.get_application("brief")


async def test_an_open_session_without_tasks_is_closed_after_its_idle_limit(
    cluster: Cluster, connection: flame.Connection
) -> None:
    await connection.register_application("tidy", cluster.service("lab", delay_release_s=0.2, idle_timeout_s=1.5))
    session = await connection.create_session("tidy")
    untouched = await connection.create_session("tidy")
    kept = await connection.create_session("tidy", idle_timeout_s=0)
    await session.invoke(call("sleep", 2.5))
    assert (await connection.get_session(session.id)).session.state is SessionState.OPEN
    for one in (session, untouched):
        await ended(connection, one)
        record = (await connection.get_session(one.id)).session
        assert record.code == ReasonCode.IDLE_TIMEOUT
        assert record.reason == "it had no task for 1.5 s"
    assert (await connection.get_session(kept.id)).session.state is SessionState.OPEN
    await at_rest(connection, session, 1)
    await kept.close()


async def test_a_session_that_fails_gives_its_reason_to_every_task_and_refuses_later_ones(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    plan = json.dumps({"enter_fails": str(tmp_path / "tried"), "times": 1000}).encode()
    session = await connection.create_session(lab, plan)
    handles = [await session.create_task(call("echo", number)) for number in range(30)]
    assert await states_of(handles) == {TaskState.FAILED: 30}
    await at_rest(connection, session, 30)
    for record in (await records_of(connection, session)).values():
        assert record.error is not None
        assert record.error.code == ErrorCode.SESSION_FAILED
        assert record.error.message.endswith("RuntimeError: not today (5)")
        assert "lab.py" in record.error.traceback
    record_of_session = (await connection.get_session(session.id)).session
    assert record_of_session.reason.startswith("RuntimeError: not today (5)\n")
    assert "Traceback" in record_of_session.reason
    assert record_of_session.code == ReasonCode.ENTER_FAILED
    assert record_of_session.settled
    assert (
        max(record.finished for record in (await records_of(connection, session)).values()) <= record_of_session.ended
    )
    with pytest.raises(flame.SessionFailed, match="not today"):
        await session.create_task(call("echo", 1))
