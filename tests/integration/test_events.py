"""What is announced of a cluster: every change of state once, in order, with its reason."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

import flame
from flame.errors import UnsupportedVersion
from flame.protocol import defaults, subjects
from flame.protocol.codec import VERSION, pack
from flame.protocol.codes import ReasonCode
from flame.protocol.events import Noun
from flame.protocol.messages import TaskMessage
from flame.protocol.records import SessionRecord
from flame.protocol.states import SessionState
from flame_services.scheduler.sweep import SWEEP_S
from tests.support.cluster import PATIENCE_S, Cluster, eventually, kill, started_executors
from tests.support.ear import listening

NODES = 2


def call(verb: str, *arguments: object) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def test_a_sessions_life_is_told_from_its_beginning_to_its_end(
    cluster: Cluster, connection: flame.Connection
) -> None:
    async with listening(connection) as ear:
        await connection.register_application("life", cluster.service("lab", fresh_process=True))
        session = await connection.create_session("life")
        await session.invoke(call("echo", 1))
        (executor,) = await started_executors(connection, session.id)
        await session.close()
        await connection.unregister_application("life")
        await ear.until(lambda e: (e.id, e.event) == ("life", "removed"), "the application is gone")
    assert ear.of(Noun.SESSION, session.id) == [("", "open"), ("open", "closing"), ("closing", "closed")]
    assert ear.of(Noun.APPLICATION, "life") == [("", "enabled"), ("enabled", "disabled"), ("disabled", "removed")]
    states = [event.state for event in ear.events if event.noun is Noun.EXECUTOR and event.id == executor.id]
    known = ["starting", "idle", "binding", "bound", "unbinding", "released"]
    assert states == [state for state in known if state in states]  # in order; some may pass too quickly to be seen
    assert {"bound", "released"} <= set(states)
    for event in ear.events:
        assert event.at > 0
        if event.noun is Noun.EXECUTOR:
            assert (event.application, event.session, event.node) == ("life", session.id, executor.node)
            assert (event.reason, event.code) == ("", "")
    closed = next(event for event in ear.events if event.event == "closed")
    record = SessionRecord.decode(closed.record)
    assert (record.id, record.state, record.settled) == (session.id, SessionState.CLOSED, True)
    assert closed.at == record.ended


async def test_a_session_that_nobody_can_enter_tells_of_each_attempt(
    cluster: Cluster, connection: flame.Connection, tmp_path: Path
) -> None:
    spec = cluster.service("lab", session_retry_limit=3)
    async with listening(connection) as ear:
        await connection.register_application("refuses", spec)
        plan = json.dumps({"enter_fails": str(tmp_path / "tried"), "times": 100}).encode()
        session = await connection.create_session("refuses", plan)
        task = await session.create_task(b"[]")
        await ear.until(lambda e: (e.id, e.event) == (session.id, "settled"), "the session is settled")
    told = [event for event in ear.events if event.noun is Noun.SESSION and event.id == session.id]
    retries = [event for event in told if event.event == "retrying"]
    assert [event.reason.partition(" failed")[0] for event in retries] == ["attempt 1 of 3", "attempt 2 of 3"]
    assert all("not today" in event.reason and event.code == ReasonCode.ENTER_FAILED for event in retries)
    assert all(event.executor and event.node in cluster.node_names for event in retries)
    changes = [(event.before, event.event) for event in told if event.event not in ("retrying", "waiting")]
    assert changes == [("", "open"), ("open", "failed"), ("failed", "settled")]
    failed = next(event for event in told if event.event == "failed")
    assert "not today (3)" in failed.reason
    assert failed.code
    ends = [event for event in ear.events if event.noun is Noun.EXECUTOR and event.event == "released"]
    assert len(ends) == 3
    assert all(event.code == ReasonCode.ENTER_FAILED for event in ends)
    assert (await session.get_task(task.id)).state is flame.TaskState.FAILED


async def test_a_session_tells_what_it_waits_for(cluster: Cluster, connection: flame.Connection) -> None:
    async with listening(connection) as ear:
        await connection.register_application("needy", cluster.service("lab"))
        session = await connection.create_session("needy", resources="gpu=1")
        await session.create_task(call("echo", 1))
        event = await ear.until(lambda e: (e.id, e.event) == (session.id, "waiting"), "the session waits")
        assert event.reason == "needs gpu=1; no node has one"
        assert (await connection.get_session(session.id)).waits_for == event.reason
        await session.close()
        await ear.until(lambda e: (e.id, e.event) == (session.id, "closed"), "the session is closed")
    waits = [event.reason for event in ear.events if event.id == session.id and event.event == "waiting"]
    assert waits == ["needs gpu=1; no node has one", ""]


async def test_a_node_that_is_killed_is_told_of_and_so_are_its_executors(
    cluster: Cluster, connection: flame.Connection
) -> None:
    async with listening(connection) as ear:
        await connection.register_application("moves", cluster.service("lab", max_instances=1))
        session = await connection.create_session("moves")
        await session.invoke(call("echo", 1))
        (executor,) = await started_executors(connection, session.id)
        node = executor.node
        manager = cluster.managers[node]
        manager.send_signal(signal.SIGKILL)
        await asyncio.to_thread(manager.wait, PATIENCE_S)
        kill(executor.pid)
        limit_s = defaults.NODE_GIVEN_UP_S + PATIENCE_S
        lost = await ear.until(lambda e: (e.id, e.event) == (node, "not ready"), "the node is given up", limit_s)
        assert lost.code == ReasonCode.NODE_LOST
        gone = await ear.until(lambda e: (e.id, e.event) == (executor.id, "released"), "its executor too")
        assert gone.code == ReasonCode.NODE_LOST
        assert node in gone.reason
        assert json.loads((await session.invoke(call("echo", 2), timeout_s=PATIENCE_S)).output) == 2
        cluster.start_manager(node)
        await ear.until(lambda e: (e.id, e.before, e.event) == (node, "not ready", "ready"), "the node is back")
        await session.close()
    assert ear.of(Noun.NODE, node) == [("ready", "unknown"), ("unknown", "not ready"), ("not ready", "ready")]


async def test_a_scheduler_that_is_started_again_tells_nothing_twice(
    cluster: Cluster, connection: flame.Connection
) -> None:
    await connection.register_application("stays", cluster.service("lab"))
    session = await connection.create_session("stays")
    await session.invoke(call("echo", 1))
    assert cluster.scheduler is not None
    async with listening(connection) as ear:
        cluster.scheduler.send_signal(signal.SIGKILL)
        await asyncio.to_thread(cluster.scheduler.wait, PATIENCE_S)
        cluster.start_scheduler()
        other = await connection.create_session("stays")
        await ear.until(lambda e: (e.id, e.event) == (other.id, "open"), "the scheduler is back")
        await session.invoke(call("echo", 2))
        await session.close()
        await ear.until(lambda e: (e.id, e.event) == (session.id, "closed"), "the session is closed")
        await other.close()
    assert ear.of(Noun.SESSION, session.id) == [("open", "closing"), ("closing", "closed")]
    assert not [event for event in ear.events if event.noun in (Noun.NODE, Noun.APPLICATION)]


async def test_a_session_of_a_newer_scheduler_is_left_alone(cluster: Cluster, connection: flame.Connection) -> None:
    await connection.register_application("upgraded", cluster.service("lab"))
    session = await connection.create_session("upgraded")
    bucket = connection.broker.bucket(subjects.SESSIONS)
    written = await bucket.get(session.id)
    assert written is not None
    assert written.value is not None
    await bucket.put(session.id, pack({"v": VERSION + 1, "something": "new"}))
    handle = await session.create_task(call("echo", 1))
    orphan = subjects.task("upgraded", "nobodys", "t")
    await connection.broker.store(orphan, TaskMessage(b"").encode(), PATIENCE_S)

    async def swept() -> bool:
        result = subjects.result("upgraded", "nobodys", "t")
        return await connection.broker.last(subjects.result_stream("upgraded"), result) is not None

    await eventually(swept, "tasks of sessions that never were are given up", 3 * SWEEP_S)
    with pytest.raises(UnsupportedVersion):
        await connection.open_session(session.id)
    tasks = subjects.session_tasks("upgraded", session.id)
    assert await connection.broker.first_stored(subjects.task_stream("upgraded"), tasks) is not None
    await bucket.put(session.id, written.value)
    assert json.loads((await asyncio.wait_for(handle, PATIENCE_S)).output) == 1
    await session.close()
