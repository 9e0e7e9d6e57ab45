"""Sessions whose service can't enter them at first, or ever, on a cluster of two nodes: who learns what of it."""

from __future__ import annotations

import asyncio
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.protocol.codes import ErrorCode, ReasonCode
from flame.protocol.events import ClusterEvent, Noun
from flame.protocol.states import SessionState, TaskState
from tests.support.cluster import PATIENCE_S, Cluster, eventually
from tests.support.ear import Ear, listening
from tests.support.records import at_rest, records_of, waiting_in

NODES = 2
LIMIT = 5


class Informer(flame.TaskInformer):
    """Keeps what it hears of a task."""

    def __init__(self) -> None:
        self.heard: list[flame.Task] = []
        self.errors = 0

    def on_update(self, task: flame.Task) -> None:
        self.heard.append(task)

    def on_error(self) -> None:
        self.errors += 1

    @property
    def states(self) -> list[TaskState]:
        return [task.state for task in self.heard]


def refusing(counter: Path, times: int) -> bytes:
    """Common data with which the service raises so many times on entering."""
    return json.dumps({"enter_fails": str(counter), "times": times}).encode()


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def viewed(cluster: Cluster, session: flame.Session) -> dict[str, Any]:
    """Return what ``flmctl view -s`` shows of a session."""
    command = (sys.executable, "-m", "flame_cli.main", "view", "-s", session.id, "-o", "json")
    where = ("--endpoint", cluster.broker.endpoint)
    process = await asyncio.create_subprocess_exec(*command, *where, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    shown: dict[str, Any] = json.loads(output)
    return shown


def retries_of(ear: Ear, session: flame.Session) -> list[ClusterEvent]:
    return [
        event for event in ear.events if (event.noun, event.id, event.event) == (Noun.SESSION, session.id, "retrying")
    ]


def waits_after(failures: int, limit: int = LIMIT) -> str:
    return f"an executor failed to enter {failures} of {limit} times; it is tried again after a pause"


async def has_failed(session: flame.Session) -> None:
    """Return when a client has heard that a session failed; then it refuses tasks."""
    await eventually(lambda: session.state is SessionState.FAILED, "the client hears that the session failed")
    for give in (session.invoke, session.create_task):
        with pytest.raises(flame.SessionFailed, match=r"RuntimeError: not today \(5\)"):
            await give(call("echo", 1))


async def test_each_attempt_is_on_another_node_and_later_than_the_one_before(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    async with connection.events(application=lab) as events:
        session = await connection.create_session(lab, refusing(tmp_path / "tried", 4), max_instances=1)
        handle = await session.create_task(call("echo", 1))
        retries = []
        async for event in events:
            if (event.id, event.event) == (session.id, "retrying"):
                retries.append(event)
            if (event.session, event.event) == (session.id, "bound"):
                break
    assert (await handle).state is flame.TaskState.SUCCEED
    nodes = [event.node for event in retries]
    assert nodes in (["node1", "node2"] * 2, ["node2", "node1"] * 2)
    begun = [event.at for event in retries]
    pauses = [later - earlier for earlier, later in pairwise(begun)]
    assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True))
    assert {event.code for event in retries} == {ReasonCode.ENTER_FAILED}

    assert (await connection.get_session(session.id)).session.bind_failures == 4
    await session.close()
    record = (await connection.get_session(session.id)).session
    assert (record.state, record.bind_failures, record.reason) == (SessionState.CLOSED, 0, "")
    await at_rest(connection, session, 1)


async def test_one_that_is_entered_at_the_fifth_attempt_serves_everybody(
    cluster: Cluster, connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    informer, other_informer = Informer(), Informer()
    async with listening(connection) as ear, cluster.connect() as other:
        session = await connection.create_session(lab, refusing(tmp_path / "tried", LIMIT - 1))
        second = await other.open_session(session.id)
        handle = await session.create_task(call("echo", 1), informer)
        other_handle = await second.create_task(call("echo", 2), other_informer)
        shown: dict[str, Any] = {}
        while shown.get("bind_failures", 0) < 1:
            shown = await viewed(cluster, session)
        assert (shown["state"], shown["reason"], shown["failed"]) == ("open", "", 0)
        assert shown["bind_failures"] < LIMIT
        assert [json.loads((await task).output) for task in (handle, other_handle)] == [1, 2]
        assert session.state is second.state is SessionState.OPEN
        await session.close()
        await ear.until(lambda e: (e.id, e.event) == (session.id, "closed"), "it is closed")
    for heard in (informer, other_informer):
        assert heard.states == [TaskState.PENDING, TaskState.RUNNING, TaskState.SUCCEED]
        assert (heard.heard[-1].attempt, heard.errors) == (1, 0)
    retries = retries_of(ear, session)
    assert [event.reason.partition(" failed")[0] for event in retries] == [
        f"attempt {number} of {LIMIT}" for number in range(1, LIMIT)
    ]
    assert all(f"RuntimeError: not today ({number})" in event.reason for number, event in enumerate(retries, 1))
    assert {event.code for event in retries} == {ReasonCode.ENTER_FAILED}
    waits = [event.reason for event in ear.events if (event.id, event.event) == (session.id, "waiting")]
    assert waits[-1] == ""
    assert {reason for reason in waits if reason} <= {waits_after(number) for number in range(1, LIMIT)}
    await at_rest(connection, session, 2)


async def test_one_that_can_never_be_entered_fails_and_everybody_learns_why(
    cluster: Cluster, connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    informer, other_informer = Informer(), Informer()
    async with listening(connection) as ear, cluster.connect() as other:
        session = await connection.create_session(lab, refusing(tmp_path / "tried", 1000))
        second = await other.open_session(session.id)
        handles = [await session.create_task(call("echo", number), informer) for number in range(3)]
        handles.append(await second.create_task(call("echo", 3), other_informer))
        for task in handles:
            with pytest.raises(flame.TaskFailed, match=r"RuntimeError: not today \(5\)"):
                await asyncio.wait_for(task, PATIENCE_S)
        await has_failed(session)
        await has_failed(second)
        with pytest.raises(flame.SessionFailed, match="not today"):
            await other.open_session(session.id)
        await ear.until(lambda e: (e.id, e.event) == (session.id, "settled"), "its tasks have their records")
        retries = retries_of(ear, session)
        (failed,) = [event for event in ear.events if (event.id, event.event) == (session.id, "failed")]

    assert [event.reason.partition(" failed")[0] for event in retries] == [
        f"attempt {number} of {LIMIT}" for number in range(1, LIMIT)
    ]
    assert {event.code for event in (*retries, failed)} == {ReasonCode.ENTER_FAILED}
    assert failed.reason.splitlines()[0] == "RuntimeError: not today (5)"
    assert (informer.errors, other_informer.errors) == (3, 1)
    assert other_informer.states == [TaskState.PENDING, TaskState.FAILED]
    for last in (informer.heard[-1], other_informer.heard[-1]):
        assert last.error is not None
        assert last.error.code == ErrorCode.SESSION_FAILED
        assert last.error.message == f"session {session.id} failed: RuntimeError: not today (5)"
        assert "on_session_enter" in last.error.traceback
        assert 'raise RuntimeError(f"not today ({tried + 1})")' in last.error.traceback
        assert last.attempt == 0

    await at_rest(connection, session, 4)
    assert await waiting_in(connection, session) == 0
    assert {record.state for record in (await records_of(connection, session)).values()} == {TaskState.FAILED}
    shown = await viewed(cluster, session)
    assert (shown["state"], shown["code"], shown["failed"], shown["pending"]) == ("failed", "enter_failed", 4, 0)
    assert (shown["bind_failures"], shown["settled"], shown["waits_for"]) == (LIMIT, True, "")
    assert shown["reason"].startswith("RuntimeError: not today (5)\nTraceback")
    assert "on_session_enter" in shown["reason"]


async def test_while_it_is_tried_again_it_says_why_it_waits(
    cluster: Cluster, connection: flame.Connection, tmp_path: Path
) -> None:
    await connection.register_application("patient", cluster.service("lab", session_retry_limit=100))
    session = await connection.create_session("patient", refusing(tmp_path / "tried", 1000))
    handle = await session.create_task(call("echo", 1))
    shown: dict[str, Any] = {}
    async with asyncio.timeout(3 * PATIENCE_S):
        while not shown.get("waits_for"):  # while an attempt is under way it waits for nothing
            shown = await viewed(cluster, session)
    assert shown["waits_for"] == waits_after(shown["bind_failures"], 100)
    assert (shown["state"], shown["reason"], shown["pending"]) == ("open", "", 1)
    await session.close("force", timeout_s=PATIENCE_S)
    with pytest.raises(flame.TaskCancelled):
        await handle


async def test_the_tasks_of_one_whose_service_ends_learn_its_last_words(
    cluster: Cluster, connection: flame.Connection
) -> None:
    spec = cluster.service("rogue", environments={"MODE": "exits"}, session_retry_limit=1)
    await connection.register_application("exits", spec)
    session = await connection.create_session("exits")
    with pytest.raises(flame.FlameError) as error:
        await session.invoke(call("echo", 1), timeout_s=PATIENCE_S)
    assert isinstance(error.value, flame.TaskFailed), error.value
    assert error.value.task.error is not None
    assert error.value.task.error.message == (
        f"session {session.id} failed: exited with status 0 before it was ready\n"
        "the end of its stderr:\nI have better things to do"
    )
