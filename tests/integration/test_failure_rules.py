"""What becomes of sessions and tasks whose service breaks the rules, on a real cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.broker.jetstream import connect
from flame.broker.seam import Entry
from flame.protocol import subjects
from flame.protocol.codes import ErrorCode, ReasonCode
from flame.protocol.records import ExecutorRecord, decode_record
from flame.protocol.states import ExecutorState
from tests.support.cluster import Cluster, alive, eventually, executors_of
from tests.support.node import Control
from tests.support.rogue import ask, serve

READY_S = 3.0
ENTER_S = 2.0
MANAGER_OPTIONS = (
    *("--cpu", "1000", "--memory", "1000g"),
    *("--ready-timeout-s", str(READY_S), "--enter-timeout-s", str(ENTER_S)),
)


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


class Ends:
    """How executors ended, as the cluster was told."""

    def __init__(self) -> None:
        self.records: dict[str, ExecutorRecord] = {}

    def hear(self, entry: Entry) -> None:
        record = decode_record(ExecutorRecord, entry.value or b"")
        if record is not None and record.state is ExecutorState.RELEASED:
            self.records[record.id] = record

    def of(self, session: flame.Session) -> list[ExecutorRecord]:
        return [record for record in self.records.values() if record.session == session.id]

    async def first_of(self, session: flame.Session) -> ExecutorRecord:
        found: list[ExecutorRecord] = await eventually(lambda: self.of(session), f"an executor of {session.id} ended")
        return found[0]


@pytest.fixture
async def ends(cluster: Cluster) -> AsyncIterator[Ends]:
    heard = Ends()
    broker = await connect(cluster.broker.endpoint)
    watch = await broker.bucket(subjects.EXECUTORS).watch("*.*", heard.hear)
    yield heard
    await watch.stop()
    await broker.close()


@pytest.fixture
async def rogue(cluster: Cluster, connection: flame.Connection, tmp_path: Path) -> AsyncIterator[Any]:
    """Open a session of the service that breaks rules, registered as the test needs it."""
    opened: list[flame.Session] = []

    async def open_session(mode: str = "", *, options: dict[str, Any] | None = None, **spec: Any) -> flame.Session:
        name = f"rogue{len(opened)}-{tmp_path.name[-20:].strip('-_')}".replace("_", "-")
        environments = {"MODE": mode, "NOTES": str(tmp_path / "notes")}
        usual = cluster.service("rogue", delay_release_s=30, session_retry_limit=2, environments=environments)
        await connection.register_application(name, usual | spec)
        session = await connection.create_session(name, **{"max_instances": 1} | (options or {}))
        opened.append(session)
        return session

    yield open_session
    for session in opened:
        await connection.unregister_application(session.application, force=True)


async def failed(session: flame.Session) -> flame.TaskError:
    """Return why a task of a session can't be run."""
    with pytest.raises(flame.FlameError) as error:
        await session.invoke(call("echo", 1), timeout_s=60)
    assert isinstance(error.value, flame.TaskError | flame.SessionFailed), error.value
    return error.value  # type: ignore[return-value]


class TestAServiceThatIsNeverThere:
    @pytest.mark.parametrize(
        ("mode", "code", "reason"),
        [
            (
                "exits",
                ReasonCode.ENDED_EARLY,
                "exited with status 0 before it was ready\nthe end of its stderr:\nI have",
            ),
            ("is not ready", ReasonCode.NOT_READY, "not ready within 3 s"),
            ("is no service", ReasonCode.NOT_READY, "not ready within 3 s"),
        ],
    )
    async def test_fails_the_session_with_its_reason(
        self, ends: Ends, rogue: Any, connection: flame.Connection, mode: str, code: str, reason: str
    ) -> None:
        session = await rogue(mode)
        error = await failed(session)
        assert reason.partition("\n")[0] in str(error)
        for record in ends.of(session):
            assert (record.clean, record.entered, record.code) == (False, False, code)
            assert record.reason.startswith(reason)
        found = (await connection.get_session(session.id)).session
        assert found.state is flame.SessionState.FAILED
        assert found.reason.startswith(reason)

    async def test_so_does_one_that_takes_too_long_to_enter(
        self, ends: Ends, rogue: Any, connection: flame.Connection
    ) -> None:
        session = await rogue(options={"common_data": call("sleep", 600)})
        await failed(session)
        assert {record.code for record in ends.of(session)} == {ReasonCode.ENTER_FAILED}
        assert (
            await connection.get_session(session.id)
        ).session.reason == f"on_session_enter took longer than {ENTER_S:g} s"

    async def test_so_does_one_that_enters_with_too_much_memory(
        self, ends: Ends, rogue: Any, connection: flame.Connection
    ) -> None:
        session = await rogue(options={"common_data": call("hog", 200)})
        await failed(session)
        assert {record.code for record in ends.of(session)} == {ReasonCode.OUT_OF_MEMORY}
        assert (await connection.get_session(session.id)).session.reason.endswith("m of memory, asked for 128m")


class TestAServiceThatEndsInItsSession:
    @pytest.mark.parametrize("status", [0, 3])
    async def test_with_every_run_of_a_task_loses_that_task_alone(
        self, ends: Ends, rogue: Any, connection: flame.Connection, status: int
    ) -> None:
        session = await rogue()
        assert (await session.invoke(call("echo", 1))).output == b"1"
        with pytest.raises(flame.TaskFailed) as error:
            await session.invoke(call("exit", status), timeout_s=60)
        assert error.value.task.error is not None
        assert error.value.task.error.code == ErrorCode.TASK_POISONED
        assert (await session.invoke(call("echo", 2), timeout_s=60)).output == b"2"
        found = ends.of(session)
        assert [record.code for record in found] == [ReasonCode.EXITED] * 3
        assert {record.reason for record in found} == {f"exited with status {status} while bound"}
        assert all(record.entered and not record.clean for record in found)
        assert (await connection.get_session(session.id)).session.state is flame.SessionState.OPEN

        async def counted() -> bool:
            info = await connection.get_session(session.id)
            return (info.succeeded, info.failed, info.cancelled) == (2, 1, 0)

        await eventually(counted, "each task counts once")

    async def test_again_and_again_is_not_started_in_a_hot_loop(
        self, ends: Ends, rogue: Any, connection: flame.Connection
    ) -> None:
        """It enters each time, so its session does not fail: it gets new executors, ever more slowly."""
        session = await rogue(options={"common_data": call("exit_soon", 0, 0.05), "min_instances": 1})
        await eventually(lambda: len(ends.of(session)) >= 4, "it has ended four times")
        before = len(ends.of(session))
        await asyncio.sleep(3)
        assert len(ends.of(session)) - before < 10
        assert {record.code for record in ends.of(session)} == {ReasonCode.EXITED}
        assert (await connection.get_session(session.id)).session.state is flame.SessionState.OPEN

    async def test_by_using_too_much_memory_fails_what_ran(
        self, ends: Ends, rogue: Any, connection: flame.Connection
    ) -> None:
        session = await rogue()
        hog = await session.create_task(call("hog", 200))
        other = await session.create_task(call("echo", 1))
        with pytest.raises(flame.TaskFailed) as error:
            await hog
        task = error.value.task
        assert task.error is not None
        assert (task.error.code, task.attempt) == (ErrorCode.OUT_OF_MEMORY, 1)
        assert task.error.message.endswith("m of memory, asked for 128m")
        assert (await other).attempt == 1
        assert (await ends.first_of(session)).code == ReasonCode.OUT_OF_MEMORY
        await session.close()
        info = await connection.get_session(session.id)
        assert (info.succeeded, info.failed, info.cancelled, info.pending) == (1, 1, 0, 0)


class TestAServiceThatMisbehaves:
    async def test_may_write_what_it_likes(self, rogue: Any) -> None:
        session = await rogue()
        await session.invoke(call("garbage", 4), timeout_s=60)
        assert (await session.invoke(call("echo", 1))).output == b"1"
        assert (await session.invoke(call("who"))).attempt == 1

    async def test_leaves_no_process_behind(self, rogue: Any) -> None:
        session = await rogue()
        child = int((await session.invoke(call("fork"))).output)
        assert alive(child)
        await session.close()
        await eventually(lambda: not alive(child), "its child ends with it")

    async def test_leaves_no_process_behind_when_it_ends_by_itself(self, rogue: Any) -> None:
        session = await rogue()
        child = int((await session.invoke(call("fork"))).output)
        leaving = await session.create_task(call("exit", 0))
        await eventually(lambda: not alive(child), "its child ends with it")
        with pytest.raises(flame.TaskFailed):
            await leaving

    async def test_can_not_lose_a_result_by_cutting_its_connections(
        self, connection: flame.Connection, rogue: Any
    ) -> None:
        session = await rogue()
        [before] = [await executor_of(connection, session)]
        task = await session.invoke(call("cut_connections"), timeout_s=60)
        assert int(task.output) > 0
        assert task.attempt == 1
        assert (await session.invoke(call("echo", 1), timeout_s=60)).output == b"1"
        assert (await executor_of(connection, session)).id == before.id

    async def test_that_closes_all_it_can_is_replaced(self, ends: Ends, rogue: Any) -> None:
        session = await rogue()
        with pytest.raises(flame.TaskFailed) as error:
            await session.invoke(call("close_everything"), timeout_s=60)
        assert error.value.task.error is not None
        assert error.value.task.error.code == ErrorCode.TASK_POISONED
        assert (await session.invoke(call("echo", 1), timeout_s=60)).output == b"1"
        assert len(ends.of(session)) == 3


async def executor_of(connection: flame.Connection, session: flame.Session) -> ExecutorRecord:
    await session.invoke(call("echo", 0), timeout_s=60)
    [record] = await executors_of(connection, session.id)
    return record


class TestAServiceThatFailsToLeave:
    async def test_harms_no_result(self, ends: Ends, rogue: Any, connection: flame.Connection) -> None:
        session = await rogue("fails to leave")
        assert (await session.invoke(call("echo", 1))).output == b"1"
        await session.close()
        record = await ends.first_of(session)
        assert (record.clean, record.code) == (False, ReasonCode.LEAVE_FAILED)
        assert record.reason == "leaving the session failed: RuntimeError: no goodbyes"
        info = await connection.get_session(session.id)
        assert (info.session.state, info.succeeded, info.failed) == (flame.SessionState.CLOSED, 1, 0)


class TestOnOneNode:
    """Where a limit has to be shorter than a cluster's programs allow, the test is the scheduler."""

    @pytest.mark.parametrize("mode", ["leaves for ever", "blocks when leaving"])
    async def test_one_that_takes_too_long_to_leave_ends(
        self, control: Control, monkeypatch: pytest.MonkeyPatch, mode: str
    ) -> None:
        monkeypatch.setattr("flame.protocol.defaults.LEAVE_TIMEOUT_S", 0.5)
        monkeypatch.setattr("flame_services.executor_manager.life.GO_S", 0.5)
        await control.manager()
        await serve(control, mode)
        await ask(control, "t1", "echo", 1)
        await control.bind(leave=True)
        record = await control.released()
        assert (record.clean, record.entered, record.code) == (False, True, ReasonCode.LEAVE_FAILED)
        assert "on_session_leave took longer than 0.5 s" in record.reason
        assert (record.succeeded, record.failed) == (1, 0)

    async def test_one_that_says_nothing_although_it_runs_nothing_ends(
        self, control: Control, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flame_services.executor_manager.executor.MUTE_S", 8.0)
        await control.manager()
        await serve(control)
        await ask(control, "t1", "sleep", 10)
        await ask(control, "t2", "block_soon", 600)
        record = await control.released()
        assert (record.clean, record.entered, record.code) == (False, True, ReasonCode.STUCK)
        assert record.reason.startswith("it ran no task and did not report for 8 s")
