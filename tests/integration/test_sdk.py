"""The rest of the SDK on a real cluster: what is found, listed, updated and watched."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.protocol.states import ExecutorState
from tests.support.cluster import Cluster, eventually, executors_of


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


# ---- sessions


async def test_sessions_are_found_by_application_state_and_labels(connection: flame.Connection, lab: str) -> None:
    team = {"team": "blue", "tier/1": ""}
    blue = await connection.create_session(lab, labels=team)
    red = await connection.create_session(lab, labels={"team": "red"})
    other = await connection.create_session("flmping", labels=team)
    await other.close()

    async def found(**filters: Any) -> set[str]:
        mine = {blue.id, red.id, other.id}
        return {info.session.id for info in await connection.list_sessions(**filters)} & mine

    assert await found() == {blue.id, red.id, other.id}
    assert await found(application=lab) == {blue.id, red.id}
    assert await found(labels={"team": "blue"}) == {blue.id, other.id}
    assert await found(labels=team, state="open") == {blue.id}
    assert await found(state=flame.SessionState.CLOSED) == {other.id}
    assert await found(application="nope") == set()
    assert (await connection.get_session(blue.id)).session.options.labels == team
    with pytest.raises(flame.SpecMismatch, match="labels"):
        await connection.open_session(blue.id, flame.SessionSpec(application=lab, labels={"team": "green"}))
    spec = flame.SessionSpec(application=lab, labels=team)
    assert (await connection.open_session(blue.id, spec)).id == blue.id
    for session in (blue, red):
        await session.close()


async def test_a_long_list_is_read_in_pages(connection: flame.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [await connection.create_session("flmping", labels={"page": "yes"}) for _ in range(7)]
    listed = await connection.list_sessions(labels={"page": "yes"})
    assert [info.session.id for info in listed] == sorted(session.id for session in sessions)
    for session in sessions:
        await connection.close_session(session.id)


# ---- tasks


async def test_tasks_are_listed_in_pages_in_every_state(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab, max_instances=1) as session:
        assert await session.list_tasks() == []
        done = [await session.create_task(call("echo", number)) for number in range(5)]
        failed = await session.create_task(call("fail", "no luck"))
        for handle in done:
            await handle
        with pytest.raises(flame.TaskFailed):
            await failed
        running = await session.create_task(call("sleep", 3))
        waiting = [await session.create_task(call("echo", 1)) for _ in range(3)]

        async def listed() -> list[flame.Task] | None:
            tasks = await session.list_tasks()
            return tasks if [task.state.value for task in tasks].count("running") == 1 else None

        tasks: list[flame.Task] = await eventually(listed, "the running task is known to run")
        handles = [*done, failed, running, *waiting]
        assert [task.id for task in tasks] == [handle.id for handle in handles]
        states = [task.state.value for task in tasks]
        assert states == ["succeed"] * 5 + ["failed", "running"] + ["pending"] * 3
        assert [json.loads(task.output) for task in tasks[:5]] == list(range(5))
        assert tasks[0] == await done[0]
        assert tasks[5].error is not None
        assert tasks[5].error.message == "no luck"
        first = await session.list_tasks(limit=4)
        rest = await session.list_tasks(after=first[-1].id, limit=100)
        assert [task.id for task in (*first, *rest)] == [task.id for task in tasks]
    ended = await connection.list_tasks(session.id)
    assert [task.state.value for task in ended] == ["succeed"] * 5 + ["failed"] + ["succeed"] * 4


async def test_many_large_outputs_are_listed_whole(connection: flame.Connection) -> None:
    async with await connection.create_session("flmping") as session:
        outputs = [bytes([number]) * 200_000 for number in range(60)]
        handles = await session.create_tasks(outputs)
        for handle in handles:
            await handle
        tasks = await session.list_tasks(limit=50)
        assert [task.output for task in tasks] == outputs[:50]
        assert [task.output for task in await session.list_tasks(after=tasks[-1].id)] == outputs[50:]


# ---- applications


async def test_an_update_is_for_executors_that_start_after_it(cluster: Cluster, connection: flame.Connection) -> None:
    before = cluster.service("lab", delay_release_s=30, environments={"COLOUR": "blue"}, url="https://a.example")
    await connection.register_application("painter", before)
    session = await connection.create_session("painter", max_instances=1)
    first = json.loads((await session.invoke(call("who"))).output)

    schema = {"type": "object", "properties": {"a": {"type": ["number", "null"], "minimum": 0.5}}}
    after = cluster.service(
        "lab",
        description="repainted",
        image="painter:2",
        input_schema=schema,
        labels={"team": "blue"},
        delay_release_s=0.1,
    )
    record = await connection.update_application("painter", after)
    assert record.updated >= record.created
    assert record.spec.input_schema == schema
    assert record.spec.environments == {}
    assert await connection.get_application("painter") == record
    [listed] = [found for found in await connection.list_applications() if found.name == "painter"]
    assert listed == record

    assert json.loads((await session.invoke(call("who"))).output)["pid"] == first["pid"]

    async def released() -> bool:
        return not await executors_of(connection, session.id)

    await eventually(released, "the new delay counts for the open session")
    assert json.loads((await session.invoke(call("who"))).output)["pid"] != first["pid"]
    await session.close()
    await connection.unregister_application("painter")
    with pytest.raises(flame.ApplicationNotFound, match="painter"):
        await connection.get_application("painter")


async def test_a_session_that_is_served_gets_more_executors_when_it_is_served_anew(
    cluster: Cluster, connection: flame.Connection
) -> None:
    await connection.register_application("grows", cluster.service("lab", max_instances=1, delay_release_s=0.2))
    session = await connection.create_session("grows")
    await session.invoke(call("echo", 1))
    await connection.update_application("grows", cluster.service("lab", max_instances=3, delay_release_s=0.2))
    handles = await session.create_tasks(call("sleep", 0.3) for _ in range(6))
    assert len({(await handle).executor for handle in handles}) == 1

    async def released() -> bool:
        return not await executors_of(connection, session.id)

    await eventually(released, "the executor leaves")
    handles = await session.create_tasks(call("sleep", 0.5) for _ in range(9))
    assert len({(await handle).executor for handle in handles}) > 1
    await session.close()


async def test_forcing_an_unregistration_ends_its_sessions(cluster: Cluster, connection: flame.Connection) -> None:
    await connection.register_application("doomed", cluster.service("lab"))
    session = await connection.create_session("doomed")
    await session.invoke(call("echo", 1))
    with pytest.raises(flame.ApplicationInUse, match="doomed"):
        await connection.unregister_application("doomed")
    await connection.unregister_application("doomed", force=True)
    assert (await connection.get_session(session.id)).session.state is flame.SessionState.CLOSED


# ---- executors and nodes


async def test_executors_and_nodes_are_found(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        task = await session.invoke(call("echo", 1))
        [mine] = await connection.list_executors(session=session.id)
        assert mine.id == task.executor
        assert await connection.list_executors(session=session.id, node="elsewhere") == []
        assert mine.id in {executor.id for executor in await connection.list_executors(node=mine.node)}
        found = await connection.get_executor(task.executor)
        assert (found.id, found.state, found.session) == (mine.id, ExecutorState.BOUND, session.id)
        node = await connection.get_node(mine.node)
        assert (node.name, node.state.value) == (mine.node, "ready")


# ---- watching


def told(events: list[flame.SessionEvent], task_id: str) -> list[str]:
    return [event.task_state.value for event in events if event.task_id == task_id and event.task_state]


async def collect(session: flame.Session) -> list[flame.SessionEvent]:
    return [event async for event in session.watch()]


async def test_a_watch_tells_of_the_session_and_its_tasks_and_ends_with_it(
    cluster: Cluster, connection: flame.Connection, lab: str
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    watching = asyncio.create_task(collect(session))
    await asyncio.sleep(0)
    async with cluster.connect() as other:
        theirs = await other.open_session(session.id)
        good = await session.create_task(call("sleep", 0.3))
        bad = await session.create_task(call("fail", "no luck"))
        foreign = await theirs.create_task(call("sleep", 0.3))
        for handle in (good, foreign):
            await handle
        with pytest.raises(flame.TaskFailed):
            await bad
    await session.close()
    async with asyncio.timeout(10):
        events = await watching
    assert [event.session_state.value for event in events if event.kind == "session"] == ["open", "closing", "closed"]
    assert told(events, good.id) == ["pending", "running", "succeed"]
    assert told(events, bad.id) == ["pending", "failed"]
    assert told(events, foreign.id) == ["running", "succeed"]
    [reason] = [event.reason for event in events if event.task_state is flame.TaskState.FAILED]
    assert reason == "no luck"
    assert all(event.time > 0 and event.session_id == session.id for event in events)


async def test_a_watch_goes_on_with_what_happened_while_the_broker_was_away(
    cluster: Cluster, connection: flame.Connection, lab: str
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    await session.invoke(call("echo", 1))
    watch = session.watch()
    handle = await session.create_task(call("sleep", 1.5))
    events = []
    async with asyncio.timeout(60):
        async for event in watch:
            events.append(event)
            if event.task_state is flame.TaskState.RUNNING:
                await cluster.broker.stop()
                await asyncio.sleep(2)
                await cluster.broker.start()
            if event.task_state is flame.TaskState.SUCCEED:
                await connection.close_session(session.id)
    assert told(events, handle.id) == ["pending", "running", "succeed"]
    assert events[-1].session_state is flame.SessionState.CLOSED


async def test_a_watch_tells_why_a_session_failed(connection: flame.Connection, lab: str, tmp_path: Path) -> None:
    plan = json.dumps({"enter_fails": str(tmp_path / "tried"), "times": 1000}).encode()
    session = await connection.create_session(lab, plan)
    watch = session.watch()
    handle = await session.create_task(call("echo", 1))
    async with asyncio.timeout(30):
        events = [event async for event in watch]
    assert told(events, handle.id) == ["pending", "failed"]
    [last] = [event for event in events if event.session_state is flame.SessionState.FAILED and event.kind == "session"]
    assert "not today" in last.reason


async def test_a_watch_of_a_closed_connection_is_told(cluster: Cluster, lab: str) -> None:
    async with cluster.connect() as connection:
        session = await connection.create_session(lab)
        watch = session.watch()
        assert (await anext(watch)).session_state is flame.SessionState.OPEN
    with pytest.raises(flame.BrokerUnavailable, match="closed"):
        await anext(watch)
    async with cluster.connect() as connection:
        await connection.close_session(session.id)


# ---- where to connect


async def test_a_client_connects_to_the_current_context(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flame.yaml"
    file.write_text(f"contexts: [{{name: test, cluster: {{endpoint: '{cluster.broker.endpoint}'}}}}]")
    monkeypatch.setenv("FLAME_CONFIG", str(file))
    monkeypatch.delenv("FLAME_ENDPOINT", raising=False)
    async with await flame.connect() as connection:
        assert connection.endpoint == cluster.broker.endpoint
        assert (await connection.info()).nodes == 1


# ---- cancelling


async def test_a_waiting_task_is_cancelled_and_never_runs(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    async with await connection.create_session(lab, max_instances=1) as session:
        busy = await session.create_task(call("sleep", 1))
        waiting = await session.create_tasks(call("touch", str(mark)) for _ in range(3))
        assert await waiting[0].cancel("no longer needed") is flame.TaskState.CANCELLED
        with pytest.raises(flame.TaskCancelled, match="no longer needed") as caught:
            await waiting[0]
        assert caught.value.task.attempt == 0
        ids = [handle.id for handle in waiting]
        assert await session.cancel_tasks([*ids, "never-was"]) == dict.fromkeys(ids, flame.TaskState.CANCELLED)
        assert (await busy).state is flame.TaskState.SUCCEED
        assert await busy.cancel() is flame.TaskState.SUCCEED
        assert await connection.cancel_tasks(session.id, [busy.id]) == {busy.id: flame.TaskState.SUCCEED}
    assert not mark.exists()
    info = await connection.get_session(session.id)
    assert (info.succeeded, info.cancelled, info.failed, info.pending, info.running) == (1, 3, 0, 0, 0)


async def test_a_running_task_is_cancelled_and_its_executor_goes_on(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab, max_instances=1) as session:
        pid = json.loads((await session.invoke(call("who"))).output)["pid"]
        running = asyncio.Event()

        class Informer(flame.TaskInformer):
            def on_update(self, task: flame.Task) -> None:
                if task.state is flame.TaskState.RUNNING:
                    running.set()

        handle = await session.create_task(call("sleep", 60), Informer())
        async with asyncio.timeout(10):
            await running.wait()
            assert await handle.cancel() is flame.TaskState.CANCELLED
            with pytest.raises(flame.TaskCancelled):
                await handle
            assert json.loads((await session.invoke(call("who"))).output)["pid"] == pid


# ---- closing


async def test_a_session_that_drains_runs_what_waits_and_tells_how_far_it_is(
    connection: flame.Connection, lab: str
) -> None:
    session = await connection.create_session(lab, max_instances=1)
    handles = await session.create_tasks(call("sleep", 0.4) for _ in range(4))
    told: list[flame.SessionInfo] = []
    closing = asyncio.create_task(session.close("drain", on_progress=told.append))

    async def refused() -> bool:
        return (await connection.get_session(session.id)).session.close_mode is flame.CloseMode.DRAIN

    await eventually(refused, "it drains")
    with pytest.raises(flame.SessionNotOpen):
        await session.invoke(call("echo", 1))
    async with asyncio.timeout(20):
        await closing
    assert [(await handle).state.value for handle in handles] == ["succeed"] * 4
    assert told[0].session.state is flame.SessionState.CLOSING
    assert (told[-1].session.state, told[-1].succeeded, told[-1].pending) == (flame.SessionState.CLOSED, 4, 0)
    counts = [info.succeeded for info in told]
    assert counts == sorted(counts)


async def test_a_closing_session_can_be_forced(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab, max_instances=1)
    running = await session.create_task(call("sleep", 60))
    waiting = await session.create_task(call("echo", 1))

    async def runs() -> bool:
        return bool((await connection.get_session(session.id)).running)

    await eventually(runs, "the first one runs")
    with pytest.raises(flame.TimedOut, match="still closing"):
        await session.close(timeout_s=0.5)
    async with asyncio.timeout(10):
        await session.close(flame.CloseMode.FORCE)
    for handle in (running, waiting):
        with pytest.raises(flame.TaskCancelled):
            await handle
    info = await connection.get_session(session.id)
    assert (info.cancelled, info.succeeded, info.failed) == (2, 0, 0)
    assert info.session.close_mode is flame.CloseMode.FORCE


# ---- limits of a task


async def test_a_task_has_the_limits_that_it_was_created_with(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab, max_instances=1) as session:
        with pytest.raises(flame.TaskTimeout, match=r"longer than 0\.3 s") as caught:
            await session.invoke(call("sleep", 60), timeout_s=20, options=flame.TaskOptions(timeout_s=0.3))
        assert caught.value.task.error is not None
        assert caught.value.task.error.type == "TaskTimeout"
        busy = await session.create_task(call("sleep", 1))
        expired = await session.create_task(call("echo", 1), options=flame.TaskOptions(expires_s=0.2))
        late = await session.create_task(call("echo", 2), options=flame.TaskOptions(delay_s=1.5))
        await busy
        with pytest.raises(flame.TaskExpired, match="not started"):
            await expired
        assert (await late).started - (await busy).started >= 1.2
        with pytest.raises(flame.TaskFailed) as failed:
            await session.invoke(call("fail", "no luck"), options=flame.TaskOptions(max_attempts=3))
        assert failed.value.task.attempt == 3


# ---- events


async def test_events_tell_of_everything_that_changes(cluster: Cluster, connection: flame.Connection) -> None:
    async with connection.events(tasks=True) as events:
        await connection.register_application("fleeting", cluster.service("lab"))
        async with await connection.create_session("fleeting", session_id="fleeting-1") as session:
            task = await session.invoke(call("sleep", 0.3))
        await connection.unregister_application("fleeting")
        told: list[flame.ClusterEvent] = []
        async with asyncio.timeout(10):
            async for event in events:
                if event.application == "fleeting" or event.id == "fleeting":
                    told.append(event)
                if (event.id, event.event) == ("fleeting", "removed"):
                    break

    def of(noun: str) -> list[str]:
        return [event.event for event in told if event.noun == noun]

    assert of("application") == ["enabled", "disabled", "removed"]
    assert [event for event in of("session") if event not in ("waiting", "removed")] == ["open", "closing", "closed"]
    assert of("task") == ["running", "succeed"]
    assert of("executor")[-1] == "released"
    assert {"bound", "unbinding"} <= set(of("executor"))
    assert {event.id for event in told if event.noun == "task"} == {task.id}
    executors = [event for event in told if event.noun == "executor"]
    assert {(event.id, event.session) for event in executors} == {(task.executor, "fleeting-1")}
    assert all(before.state == after.before for before, after in itertools.pairwise(executors))
    assert all(event.at > 0 for event in told)


async def test_a_watch_tells_what_a_session_waits_for_and_of_its_executors(
    connection: flame.Connection, lab: str
) -> None:
    session = await connection.create_session(lab, resources="gpu=1000")
    watch = session.watch()
    await session.create_task(call("echo", 1))
    async with asyncio.timeout(20):
        async for event in watch:
            if event.kind == "waiting" and event.reason:
                break
        assert "gpu=1000" in event.reason
        assert (await connection.get_session(session.id)).waits_for == event.reason
    await session.close()
    async with await connection.create_session(lab) as other:
        watch = other.watch()
        task = await other.invoke(call("echo", 1))
    async with asyncio.timeout(20):
        states = [event.executor_state for event in [found async for found in watch] if event.kind == "executor"]
    assert task.executor
    assert states[-1] is ExecutorState.RELEASED
    assert ExecutorState.BOUND in states


async def test_a_session_is_closed_when_it_has_been_idle_for_as_long_as_it_may(
    connection: flame.Connection,
) -> None:
    session = await connection.create_session("flmping", idle_timeout_s=0.5, weight=2)
    assert (await connection.get_session(session.id)).session.options.weight == 2
    watch = session.watch()
    async with asyncio.timeout(20):
        events = [event async for event in watch if event.kind == "session"]
    assert events[-1].session_state is flame.SessionState.CLOSED
    assert (await connection.get_session(session.id)).session.code == "idle_timeout"
    with pytest.raises(flame.SessionNotOpen):
        await session.invoke(b"too late")
