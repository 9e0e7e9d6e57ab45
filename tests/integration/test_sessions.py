"""Sessions and tasks, end to end on a real cluster."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.protocol.states import ExecutorState
from tests.support.cluster import Cluster, alive, eventually, executors_of, kill


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def who(session: flame.Session) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await session.invoke(call("who"), timeout_s=30)).output)
    return answer


class Recorder(flame.TaskInformer):
    def __init__(self) -> None:
        self.updates: list[flame.Task] = []
        self.errors = 0

    def on_update(self, task: flame.Task) -> None:
        self.updates.append(task)

    def on_error(self) -> None:
        self.errors += 1


async def test_a_task_returns_what_the_service_returned(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab, b"hello")
    task = await session.invoke(call("echo", {"a": 1}))
    assert task.state is flame.TaskState.SUCCEED
    assert json.loads(task.output) == {"a": 1}
    assert task.executor
    assert task.finished >= task.started > 0
    assert (await who(session))["common_data"] == "hello"
    await session.close()
    assert session.state is flame.SessionState.CLOSED


async def test_an_informer_hears_every_state_once_and_in_order(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        recorder = Recorder()
        task = await session.invoke(call("echo", 1), recorder)
        assert [update.state.value for update in recorder.updates] == ["pending", "running", "succeed"]
        assert recorder.updates[-1] == task
        assert recorder.errors == 0


async def test_an_informer_that_raises_or_is_async_does_no_harm(connection: flame.Connection, lab: str) -> None:
    heard: list[str] = []

    class Awkward(flame.TaskInformer):
        async def on_update(self, task: flame.Task) -> None:
            await asyncio.sleep(0)
            heard.append(task.state.value)
            raise RuntimeError("an informer's own fault")

    async with await connection.create_session(lab) as session:
        assert json.loads((await session.invoke(call("echo", 2), Awkward())).output) == 2
    assert heard == ["pending", "running", "succeed"]


async def test_a_service_that_raises_fails_that_task_only(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        recorder = Recorder()
        with pytest.raises(flame.TaskFailed, match="ValueError: no such luck") as caught:
            await session.invoke(call("fail", "no such luck"), recorder)
        fault = caught.value.task.error
        assert fault is not None
        assert (fault.type, fault.message) == ("ValueError", "no such luck")
        assert "do_fail" in fault.traceback
        assert "flame/service" not in fault.traceback
        assert recorder.errors == 1
        assert recorder.updates[-1].error == fault
        assert json.loads((await session.invoke(call("echo", "next"))).output) == "next"


async def test_create_task_returns_once_stored_and_can_be_awaited_later(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        handles = [await session.create_task(call("echo", number)) for number in range(20)]
        assert [json.loads((await handle).output) for handle in handles] == list(range(20))
        again = await session.get_task(handles[3].id)
        assert json.loads(again.output) == 3
        with pytest.raises(flame.TaskNotFound):
            await session.get_task("nosuchtask")


async def test_a_time_limit_leaves_the_task_alone(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        await who(session)
        with pytest.raises(flame.TimedOut, match="it goes on") as caught:
            await session.invoke(call("sleep", 0.5), timeout_s=0.1)
        task_id = str(caught.value).split()[1]

        async def finished() -> bool:
            return (await session.get_task(task_id)).state is flame.TaskState.SUCCEED

        await eventually(finished, "the task goes on")


async def test_ten_sessions_of_a_thousand_tasks_each_get_their_own_outputs(connection: flame.Connection) -> None:
    async def one(number: int) -> None:
        async with await connection.create_session("flmping", max_instances=2) as session:
            inputs = [f"{number}/{task}".encode() for task in range(1000)]
            tasks = await asyncio.gather(*(session.invoke(data) for data in inputs))
            assert [task.output for task in tasks] == inputs
            assert len({task.id for task in tasks}) == 1000

    await asyncio.gather(*(one(number) for number in range(10)))
    ended = [info for info in await connection.list_sessions() if info.session.application == "flmping"]
    assert {(info.succeeded, info.failed, info.pending, info.running) for info in ended} == {(1000, 0, 0, 0)}


async def test_no_two_sessions_share_an_executor_or_its_memory(connection: flame.Connection, lab: str) -> None:
    """Over scale-out, a killed executor and a re-bind."""
    sessions = [await connection.create_session(lab, max_instances=3) for _ in range(3)]
    served: dict[str, set[tuple[int, str]]] = {session.id: set() for session in sessions}
    memory: dict[str, set[str]] = {session.id: set() for session in sessions}

    async def ask(session: flame.Session, answer: dict[str, Any]) -> None:
        assert answer["session"] == session.id
        served[session.id].add((answer["pid"], answer["started"]))
        memory[session.id].update(answer["seen"])

    for session in sessions:
        await asyncio.gather(*(session.invoke(call("sleep", 0.2)) for _ in range(8)))
    for session in sessions:
        for answer in await asyncio.gather(*(who(session) for _ in range(12))):
            await ask(session, answer)
    victim = await who(sessions[0])
    kill(victim["pid"])
    for answer in await asyncio.gather(*(who(sessions[0]) for _ in range(12))):
        assert answer["pid"] != victim["pid"]
        await ask(sessions[0], answer)
    everybody = [process for processes in served.values() for process in processes]
    assert len(everybody) == len(set(everybody))
    for session in sessions:
        mine = {session.id}
        others = {other.id for other in sessions} - mine
        assert mine <= memory[session.id]
        assert not others & memory[session.id]
        await session.close()


async def test_one_task_at_a_time_keeps_one_executor(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        pids = {(await who(session))["pid"] for _ in range(20)}
        assert len(pids) == 1


async def test_a_released_session_gets_a_new_executor_for_its_next_task(
    cluster: Cluster, connection: flame.Connection
) -> None:
    await connection.register_application("hasty", cluster.service("lab", delay_release_s=0.2))
    async with await connection.create_session("hasty") as session:
        first = await who(session)

        async def released() -> bool:
            return not await executors_of(connection, session.id)

        await eventually(released, "the idle executor is released")
        assert not alive(first["pid"])
        second = await who(session)
        assert (second["pid"], second["started"]) != (first["pid"], first["started"])
        assert len(second["seen"]) == 2  # the session and this task: nothing of the first executor's memory


async def test_a_killed_executors_task_runs_again_and_has_one_record(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    mark = tmp_path / "runs"
    async with await connection.create_session(lab, max_instances=1) as session:
        pid = (await who(session))["pid"]
        handle = await session.create_task(call("sleep", 1.0, str(mark)))
        await eventually(mark.exists, "the task runs")
        kill(pid)
        task = await asyncio.wait_for(handle, 30)
        assert task.state is flame.TaskState.SUCCEED
        assert int(task.output) != pid
        assert len(mark.read_text().splitlines()) == 2

        async def at_rest() -> bool:
            info = await connection.get_session(session.id)
            return (info.pending, info.running, info.succeeded) == (0, 0, 1)

        await eventually(at_rest, "one record of the two runs is counted, and nothing is left")


async def test_closing_lets_the_running_task_finish_and_cancels_the_waiting_ones(
    connection: flame.Connection, lab: str
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    await who(session)
    recorder = Recorder()
    running = await session.create_task(call("sleep", 2.0), recorder)
    waiting = [await session.create_task(call("echo", number)) for number in range(5)]
    await eventually(lambda: len(recorder.updates) > 1, "the first task runs")
    await session.close(timeout_s=30)
    assert (await running).state is flame.TaskState.SUCCEED
    for handle in waiting:
        with pytest.raises(flame.TaskCancelled):
            await handle
    with pytest.raises(flame.SessionNotOpen):
        await session.invoke(call("echo", 1))
    info = await connection.get_session(session.id)
    assert (info.succeeded, info.cancelled, info.pending, info.running) == (2, 5, 0, 0)


async def test_the_context_manager_waits_for_tasks_and_closes_at_once_on_an_exception(
    connection: flame.Connection, lab: str
) -> None:
    async with await connection.create_session(lab) as session:
        handle = await session.create_task(call("sleep", 0.3))
    assert (await handle).state is flame.TaskState.SUCCEED
    assert session.state is flame.SessionState.CLOSED

    handles: list[flame.TaskHandle] = []

    async def change_mind() -> None:
        async with await connection.create_session(lab, max_instances=1) as session:
            await who(session)
            handles.extend([await session.create_task(call("sleep", 0.3)) for _ in range(50)])
            raise KeyError("changed my mind")

    with pytest.raises(KeyError):
        await change_mind()
    states = [handle.task.state for handle in handles]
    assert states.count(flame.TaskState.CANCELLED) >= 45


async def test_a_second_client_opens_the_session_and_shares_it(
    cluster: Cluster, connection: flame.Connection, lab: str
) -> None:
    spec = flame.SessionSpec(application=lab, common_data=b"shared")
    async with cluster.connect() as other:
        mine = await connection.open_session("together", spec)
        theirs = await other.open_session("together", spec)
        assert (await who(mine))["pid"] == (await who(theirs))["pid"]
        with pytest.raises(flame.SpecMismatch, match="priority is 0, not 3"):
            await other.open_session("together", flame.SessionSpec(application=lab, common_data=b"shared", priority=3))
        with pytest.raises(flame.SpecMismatch, match="common_data"):
            await other.open_session("together", flame.SessionSpec(application=lab, common_data=b"else"))
        with pytest.raises(flame.SessionExists):
            await other.create_session(lab, session_id="together")
        await theirs.close()

        async def heard() -> bool:
            return mine.state is flame.SessionState.CLOSED

        await eventually(heard, "the first client hears of the end")
        with pytest.raises(flame.SessionNotOpen):
            await other.open_session("together", spec)


async def test_a_session_that_can_be_entered_only_later_is_entered(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    plan = json.dumps({"enter_fails": str(tmp_path / "tried"), "times": 3}).encode()
    async with await connection.create_session(lab, plan) as session:
        assert (await who(session))["session"] == session.id
    assert (tmp_path / "tried").read_text() == "4"


async def test_a_session_that_can_never_be_entered_fails_with_all_its_tasks(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    plan = json.dumps({"enter_fails": str(tmp_path / "tried"), "times": 1000}).encode()
    session = await connection.create_session(lab, plan)
    recorder = Recorder()
    handles = [await session.create_task(call("echo", number), recorder) for number in range(3)]
    for handle in handles:
        with pytest.raises(flame.TaskFailed, match=r"RuntimeError: not today \(5\)"):
            await handle
    await eventually(lambda: session.state is flame.SessionState.FAILED, "the client hears that the session failed")
    with pytest.raises(flame.SessionFailed, match="not today"):
        await session.invoke(call("echo", 1))
    with pytest.raises(flame.SessionFailed, match="not today"):
        await connection.open_session(session.id)
    assert recorder.errors == 3


async def test_tasks_that_are_longer_than_the_lease_run_once(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    mark = tmp_path / "runs"
    async with await connection.create_session(lab) as session:
        await session.invoke(call("sleep", 20, str(mark)))
    assert len(mark.read_text().splitlines()) == 1


async def test_executors_and_nodes_are_listed(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        pid = (await who(session))["pid"]

        async def bound() -> bool:
            found = [(e.pid, e.state, e.session) for e in await executors_of(connection, session.id)]
            return found == [(pid, ExecutorState.BOUND, session.id)]

        await eventually(bound, "the executor is listed as bound")
        [node] = await connection.list_nodes()
        assert node.state.value == "ready"
        assert node.cpu >= 1
        assert node.executors >= 1
