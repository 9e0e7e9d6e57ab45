"""Every row of every state table, brought about on a real cluster and observed by a client.

The parameters are the tables' rows: one that is new fails here until somebody says how it comes about.
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import pytest

import flame
from flame.protocol import defaults, subjects
from flame.protocol.codes import ErrorCode, ReasonCode
from flame.protocol.events import ClusterEvent, Noun
from flame.protocol.records import NodeRecord
from flame.protocol.states import (
    APPLICATION,
    EXECUTOR,
    NODE,
    SESSION,
    TASK,
    ApplicationEvent,
    ApplicationState,
    CloseMode,
    ExecutorEvent,
    ExecutorState,
    NodeEvent,
    NodeState,
    SessionEvent,
    SessionState,
    StateTable,
    TaskEvent,
    TaskState,
)
from tests.support.cluster import PATIENCE_S, Cluster, eventually, executors_of, kill, started_executors
from tests.support.ear import Ear, listening
from tests.support.records import at_rest

MANAGER_OPTIONS = ("--cpu", "1000", "--memory", "1000g", "--gpu", "0")
AWAY = "away"
"""A node that falls silent; nothing is placed there but what asks for its GPU."""
AWAY_OPTIONS = ("--cpu", "0.05", "--memory", "1000g", "--gpu", "1")
ON_AWAY = "cpu=0.05,gpu=1"
NOWHERE = "gpu=64"

Move = tuple[str, str]
S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True)
class Stage:
    """Where a row is brought about."""

    cluster: Cluster
    connection: flame.Connection
    ear: Ear
    folder: Path
    application: str
    """A name that no other row uses."""

    async def lab(self, **options: Any) -> flame.Session:
        """Open a session of the service that does what its input says, with one executor at most."""
        await self.connection.register_application(self.application, self.cluster.service("lab", **options))
        return await self.connection.create_session(self.application, max_instances=1)

    async def rogue(self, mode: str = "", enter: tuple[object, ...] = (), **options: Any) -> flame.Session:
        """Open a session of the service that breaks rules, and have it served by a process of its own."""
        usual = {"environments": {"MODE": mode}, "fresh_process": True, "delay_release_s": 30}
        spec = self.cluster.service("rogue", **usual, **options)
        await self.connection.register_application(self.application, spec)
        data = json.dumps(enter).encode() if enter else b""
        return await self.connection.create_session(self.application, data, min_instances=1, max_instances=4)

    async def hears(self, session: flame.Session, state: StrEnum, before: StrEnum | None = None) -> ClusterEvent:
        """Return the event that an executor of a session is in a state now."""

        def wanted(event: ClusterEvent) -> bool:
            ours = event.noun is Noun.EXECUTOR and event.session == session.id
            return ours and event.state == state and before in (None, event.before)

        return await self.ear.until(wanted, f"an executor is {state}, and was {before or 'anything'}")


Scenario = Callable[[Stage], Awaitable[Move]]


@pytest.fixture(scope="module", autouse=True)
def away(cluster: Cluster) -> Iterator[Future[dict[Move, str]]]:
    """What becomes of a node that falls silent twice, and what is seen of it; it takes its time beside other tests."""
    story: Future[dict[Move, str]] = Future()

    def run() -> None:
        try:
            story.set_result(asyncio.run(_life_of_a_node(cluster)))
        except BaseException as error:  # noqa: BLE001  # the test of a row raises it
            story.set_exception(error)

    cluster.start_manager(AWAY, *AWAY_OPTIONS)
    thread = threading.Thread(target=run)
    thread.start()
    yield story
    thread.join()


@pytest.fixture
async def stage(cluster: Cluster, connection: flame.Connection, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    async with listening(connection) as ear:
        name = "".join(char if char.isalnum() else "-" for char in request.node.name)[-40:].strip("-")
        yield Stage(cluster, connection, ear, tmp_path, name)
    for info in await connection.list_sessions(application=name):
        await connection.close_session(info.session.id, mode=CloseMode.FORCE)


def rows(table: StateTable[S, E]) -> pytest.MarkDecorator:
    """Have a test run for each row of a table."""
    named = {f"{state}, {event}": (state, event) for state, event in table.moves}
    return pytest.mark.parametrize("row", list(named.values()), ids=list(named))


def call(verb: str, *arguments: object) -> bytes:
    return json.dumps([verb, *arguments]).encode()


# ---- applications


async def an_application_is_disabled(stage: Stage) -> Move:
    session = await stage.lab()
    record = await stage.connection.disable_application(stage.application)
    assert record.state is ApplicationState.DISABLED
    with pytest.raises(flame.ApplicationDisabled, match="takes no new sessions"):
        await stage.connection.create_session(stage.application)
    assert (await session.invoke(call("echo", 1))).output == b"1"  # those that it has go on
    assert (await stage.connection.open_session(session.id)).id == session.id
    assert await stage.connection.disable_application(stage.application) == record
    return await _of_application(stage, ApplicationState.DISABLED)


async def an_application_is_enabled(stage: Stage) -> Move:
    await stage.lab()
    await stage.connection.disable_application(stage.application)
    record = await stage.connection.enable_application(stage.application)
    assert await stage.connection.enable_application(stage.application) == record
    assert (await stage.connection.create_session(stage.application)).state is SessionState.OPEN
    seen = stage.ear.of(Noun.APPLICATION, stage.application)
    await stage.ear.until(lambda e: (e.id, e.before, e.event) == (stage.application, "disabled", "enabled"), str(seen))
    return "disabled", record.state


async def _of_application(stage: Stage, state: ApplicationState) -> Move:
    event = await stage.ear.until(lambda e: (e.id, e.event) == (stage.application, state), f"it is {state}")
    return event.before, event.state


OF_APPLICATIONS: dict[tuple[ApplicationState, ApplicationEvent], Scenario] = {
    (ApplicationState.ENABLED, ApplicationEvent.DISABLE): an_application_is_disabled,
    (ApplicationState.DISABLED, ApplicationEvent.ENABLE): an_application_is_enabled,
}


@rows(APPLICATION)
async def test_of_applications(stage: Stage, row: tuple[ApplicationState, ApplicationEvent]) -> None:
    assert row in OF_APPLICATIONS, "say how it comes about"
    assert await OF_APPLICATIONS[row](stage) == (row[0], APPLICATION.next(*row))


# ---- sessions


async def _of_session(stage: Stage, session: flame.Session, event: str, before: str = "") -> Move:
    heard = await stage.ear.until(
        lambda e: e.noun is Noun.SESSION and (e.id, e.event) == (session.id, event) and before in ("", e.before),
        f"the session is {event}",
    )
    return heard.before, heard.state


async def _refusing(stage: Stage, limit: int) -> flame.Session:
    """Open a session that can't be entered."""
    spec = stage.cluster.service("lab", session_retry_limit=limit)
    await stage.connection.register_application(stage.application, spec)
    plan = {"enter_fails": str(stage.folder / "tried"), "times": 1000}
    return await stage.connection.create_session(stage.application, json.dumps(plan).encode())


async def a_session_is_closed(stage: Stage) -> Move:
    session = await stage.lab()
    await session.close()
    return await _of_session(stage, session, "closing")


async def a_session_can_not_be_entered(stage: Stage) -> Move:
    session = await _refusing(stage, 2)
    task = await session.create_task(call("echo", 1))
    with pytest.raises(flame.TaskFailed, match=r"RuntimeError: not today \(2\)"):
        await task
    return await _of_session(stage, session, "failed")


async def a_session_that_drains_is_forced(stage: Stage) -> Move:
    session = await stage.lab()
    task = await session.create_task(call("sleep", 600))
    await stage.connection.close_session(session.id, mode=CloseMode.DRAIN)
    await stage.connection.close_session(session.id, mode=CloseMode.FORCE)
    with pytest.raises(flame.TaskCancelled):
        await task
    return await _of_session(stage, session, "closing", before="closing")


async def a_session_that_drains_can_not_be_entered(stage: Stage) -> Move:
    session = await _refusing(stage, 4)
    task = await session.create_task(call("echo", 1))
    await stage.ear.until(lambda e: (e.id, e.event) == (session.id, "retrying"), "the first attempt failed")
    await stage.connection.close_session(session.id, mode=CloseMode.DRAIN)
    with pytest.raises(flame.TaskFailed, match=r"RuntimeError: not today \(4\)"):
        await asyncio.wait_for(task, PATIENCE_S)
    move = await _of_session(stage, session, "failed")
    await at_rest(stage.connection, session, 1)
    record = (await stage.connection.get_session(session.id)).session
    assert (record.bind_failures, record.code) == (4, ReasonCode.ENTER_FAILED)
    await session.close(timeout_s=PATIENCE_S)
    retries = [e for e in stage.ear.events if (e.id, e.event) == (session.id, "retrying")]
    assert [e.reason.partition(" failed")[0] for e in retries] == [f"attempt {number} of 4" for number in (1, 2, 3)]
    return move


async def a_session_is_settled(stage: Stage) -> Move:
    session = await stage.lab()
    waiting = [await session.create_task(call("sleep", 0.2)) for _ in range(3)]
    await session.close(CloseMode.DRAIN)
    assert [(await task).state for task in waiting] == [TaskState.SUCCEED] * 3
    move = await _of_session(stage, session, "closed")
    info = await stage.connection.get_session(session.id)
    assert (info.session.settled, info.succeeded, info.pending) == (True, 3, 0)
    assert await executors_of(stage.connection, session.id) == []
    return move


OF_SESSIONS: dict[tuple[SessionState, SessionEvent], Scenario] = {
    (SessionState.OPEN, SessionEvent.CLOSE): a_session_is_closed,
    (SessionState.OPEN, SessionEvent.FAIL): a_session_can_not_be_entered,
    (SessionState.CLOSING, SessionEvent.CLOSE): a_session_that_drains_is_forced,
    (SessionState.CLOSING, SessionEvent.FAIL): a_session_that_drains_can_not_be_entered,
    (SessionState.CLOSING, SessionEvent.SETTLED): a_session_is_settled,
}


@rows(SESSION)
async def test_of_sessions(stage: Stage, row: tuple[SessionState, SessionEvent]) -> None:
    assert row in OF_SESSIONS, "say how it comes about"
    assert await OF_SESSIONS[row](stage) == (row[0], SESSION.next(*row))


# ---- tasks


class Informer(flame.TaskInformer):
    """Keeps a task's states."""

    def __init__(self) -> None:
        self.states: list[TaskState] = []

    def on_update(self, task: flame.Task) -> None:
        self.states.append(task.state)

    async def runs(self) -> None:
        await eventually(lambda: TaskState.RUNNING in self.states, "the task runs")

    def last(self) -> Move:
        before, after = self.states[-2:]
        return before, after


async def a_task_is_started(stage: Stage) -> Move:
    informer = Informer()
    session = await stage.lab()
    await session.create_task(call("sleep", 600), informer)
    await informer.runs()
    return informer.last()


async def a_task_that_waits_is_cancelled(stage: Stage) -> Move:
    await stage.lab()
    session = await stage.connection.create_session(stage.application, resources=NOWHERE)
    informer = Informer()
    task = await session.create_task(call("echo", 1), informer)
    assert await task.cancel() is TaskState.CANCELLED
    with pytest.raises(flame.TaskCancelled):
        await task
    return informer.last()


async def a_task_is_never_started(stage: Stage) -> Move:
    await stage.lab()
    session = await stage.connection.create_session(stage.application, resources=NOWHERE)
    informer = Informer()
    task = await session.create_task(call("echo", 1), informer, options=flame.TaskOptions(expires_s=0.3))
    with pytest.raises(flame.TaskExpired):
        await asyncio.wait_for(task, PATIENCE_S)
    assert task.task.attempt == 0
    return informer.last()


async def a_task_succeeds(stage: Stage) -> Move:
    informer = Informer()
    session = await stage.lab()
    await session.invoke(call("echo", 1), informer)
    return informer.last()


async def a_task_raises(stage: Stage) -> Move:
    informer = Informer()
    session = await stage.lab()
    with pytest.raises(flame.TaskFailed) as failed:
        await session.invoke(call("fail", "no luck"), informer)
    error = failed.value.task.error
    assert error is not None
    assert (error.code, error.type, error.message) == (ErrorCode.TASK_FAILED, "ValueError", "no luck")
    assert "do_fail" in error.traceback
    return informer.last()


async def a_task_that_runs_is_cancelled(stage: Stage) -> Move:
    informer = Informer()
    session = await stage.lab()
    task = await session.create_task(call("sleep", 600), informer)
    await informer.runs()
    assert await task.cancel() is TaskState.CANCELLED
    with pytest.raises(flame.TaskCancelled):
        await task
    return informer.last()


async def _again(session: flame.Session, task: flame.TaskHandle) -> Move:
    """Return that a task waits after it ran; it must succeed then, in its second run."""

    async def waits() -> bool:
        return [found.state for found in await session.list_tasks()] == [TaskState.PENDING]

    await eventually(waits, "the task waits again")
    assert not task.done()
    assert (await asyncio.wait_for(task, PATIENCE_S)).attempt == 2
    assert [found.state for found in await session.list_tasks()] == [TaskState.SUCCEED]
    return "running", "pending"


async def a_tasks_executor_is_lost(stage: Stage) -> Move:
    counter = stage.folder / "tried"
    counter.write_text("5")  # so it is entered at once
    plan = json.dumps({"enter_fails": str(counter), "times": 4}).encode()
    await stage.connection.register_application(
        stage.application, stage.cluster.service("lab", session_retry_limit=100)
    )
    session = await stage.connection.create_session(stage.application, plan, max_instances=1)
    informer = Informer()
    task = await session.create_task(call("try", str(stage.folder / "mark"), "sleep"), informer)
    await informer.runs()
    (executor,) = await started_executors(stage.connection, session.id)
    counter.write_text("0")  # the next one takes its time
    kill(executor.pid)
    return await _again(session, task)


async def a_task_is_tried_again(stage: Stage) -> Move:
    session = await stage.lab(max_attempts=2, retry_backoff_s=1.5)
    informer = Informer()
    task = await session.create_task(call("try", str(stage.folder / "mark"), "raise"), informer)
    await informer.runs()
    return await _again(session, task)


OF_TASKS: dict[tuple[TaskState, TaskEvent], Scenario] = {
    (TaskState.PENDING, TaskEvent.START): a_task_is_started,
    (TaskState.PENDING, TaskEvent.CANCEL): a_task_that_waits_is_cancelled,
    (TaskState.PENDING, TaskEvent.FAIL): a_task_is_never_started,
    (TaskState.RUNNING, TaskEvent.SUCCEED): a_task_succeeds,
    (TaskState.RUNNING, TaskEvent.FAIL): a_task_raises,
    (TaskState.RUNNING, TaskEvent.CANCEL): a_task_that_runs_is_cancelled,
    (TaskState.RUNNING, TaskEvent.LOST): a_tasks_executor_is_lost,
    (TaskState.RUNNING, TaskEvent.RETRY): a_task_is_tried_again,
}


@rows(TASK)
async def test_of_tasks(stage: Stage, row: tuple[TaskState, TaskEvent]) -> None:
    assert row in OF_TASKS, "say how it comes about"
    assert await OF_TASKS[row](stage) == (row[0], TASK.next(*row))


# ---- executors


async def an_executor_is_ready(stage: Stage) -> Move:
    return await _told_to_leave_while_it_starts(stage, ExecutorState.IDLE)


async def an_executor_that_is_idle_goes(stage: Stage) -> Move:
    return await _told_to_leave_while_it_starts(stage, ExecutorState.RELEASED)


async def _told_to_leave_while_it_starts(stage: Stage, state: ExecutorState) -> Move:
    session = await stage.rogue("is late")
    await stage.hears(session, ExecutorState.STARTING)
    await stage.connection.close_session(session.id)
    event = await stage.hears(session, state)
    assert (event.reason, event.code) == ("", "")
    return event.before, event.state


async def an_executor_is_given_its_session(stage: Stage) -> Move:
    session = await stage.rogue(enter=("sleep", 0.5), min_instances=4)
    event = await stage.hears(session, ExecutorState.BINDING, before=ExecutorState.IDLE)  # of one it may be missed
    return event.before, event.state


async def an_executor_has_entered(stage: Stage) -> Move:
    session = await stage.rogue(enter=("sleep", 0.5))
    event = await stage.hears(session, ExecutorState.BOUND)
    return event.before, event.state


async def an_executor_leaves(stage: Stage) -> Move:
    return await _leaves(stage, ExecutorState.UNBINDING)


async def an_executor_has_left(stage: Stage) -> Move:
    return await _leaves(stage, ExecutorState.RELEASED)


async def _leaves(stage: Stage, state: ExecutorState) -> Move:
    session = await stage.rogue("leaves slowly")
    await session.invoke(call("echo", 1))
    await session.close()
    event = await stage.hears(session, state)
    assert (event.reason, event.code) == ("", "")
    return event.before, event.state


async def an_executor_ends_before_it_is_ready(stage: Stage) -> Move:
    session = await stage.rogue("exits", session_retry_limit=1)
    event = await stage.hears(session, ExecutorState.RELEASED)
    assert (event.code, event.reason) == (
        ReasonCode.ENDED_EARLY,
        "exited with status 0 before it was ready\nthe end of its stderr:\nI have better things to do",
    )
    return event.before, event.state


async def an_executor_is_killed_while_it_enters(stage: Stage) -> Move:
    session = await stage.rogue(enter=("sleep", 600), session_retry_limit=1)
    return await _killed(stage, session, ExecutorState.BINDING, "while entering the session")


async def an_executor_is_killed_while_it_serves(stage: Stage) -> Move:
    session = await stage.rogue()
    return await _killed(stage, session, ExecutorState.BOUND, "while bound")


async def _killed(stage: Stage, session: flame.Session, state: ExecutorState, when: str) -> Move:
    event = await stage.hears(session, state)
    kill((await stage.connection.get_executor(event.id)).pid)
    event = await stage.hears(session, ExecutorState.RELEASED)
    assert event.code == ReasonCode.KILLED
    assert event.reason.startswith(f"killed by signal SIGKILL {when}")
    return event.before, event.state


OF_EXECUTORS: dict[tuple[ExecutorState, ExecutorEvent], Scenario] = {
    (ExecutorState.STARTING, ExecutorEvent.READY): an_executor_is_ready,
    (ExecutorState.IDLE, ExecutorEvent.ASSIGN): an_executor_is_given_its_session,
    (ExecutorState.BINDING, ExecutorEvent.ENTERED): an_executor_has_entered,
    (ExecutorState.BOUND, ExecutorEvent.LEAVE): an_executor_leaves,
    (ExecutorState.STARTING, ExecutorEvent.GONE): an_executor_ends_before_it_is_ready,
    (ExecutorState.IDLE, ExecutorEvent.GONE): an_executor_that_is_idle_goes,
    (ExecutorState.BINDING, ExecutorEvent.GONE): an_executor_is_killed_while_it_enters,
    (ExecutorState.BOUND, ExecutorEvent.GONE): an_executor_is_killed_while_it_serves,
    (ExecutorState.UNBINDING, ExecutorEvent.GONE): an_executor_has_left,
}


@rows(EXECUTOR)
async def test_of_executors(stage: Stage, row: tuple[ExecutorState, ExecutorEvent]) -> None:
    assert row in OF_EXECUTORS, "say how it comes about"
    assert await OF_EXECUTORS[row](stage) == (row[0], EXECUTOR.next(*row))


# ---- nodes


async def _life_of_a_node(cluster: Cluster) -> dict[Move, str]:
    """Have a node beat, fall silent, come back, be given up and come back; return the rows that were seen, and how."""
    seen: dict[Move, str] = {}
    async with cluster.connect() as connection, listening(connection) as ear:

        async def ready() -> bool:
            return any(node.name == AWAY and node.state == NodeState.READY for node in await connection.list_nodes())

        async def beat() -> int:
            entry = await connection.broker.bucket(subjects.NODES).get(AWAY)
            return 0 if entry is None or entry.value is None else NodeRecord.decode(entry.value).beat

        async def becomes(state: NodeState) -> None:
            begin = len(ear.events)
            limit_s = defaults.NODE_GIVEN_UP_S + PATIENCE_S
            event = await ear.until(
                lambda e: (e.noun, e.id, e.event) == (Noun.NODE, AWAY, state), f"it is {state}", limit_s, since=begin
            )
            event_of = {NodeState.READY: "beat", NodeState.UNKNOWN: "missed", NodeState.NOT_READY: "given up"}
            seen[event.before, event_of[state]] = event.state

        def manager(number: signal.Signals) -> None:
            cluster.managers[AWAY].send_signal(number)

        await eventually(ready, "the node is there")
        first = await beat()

        async def beats() -> bool:
            return await beat() >= first + 2

        await eventually(beats, "its heart beats")
        assert (await connection.get_node(AWAY)).state is NodeState.READY
        assert [before for before, _ in ear.of(Noun.NODE, AWAY) if before] == []  # it is what it was
        seen["ready", "beat"] = "ready"

        spec = cluster.service("lab", session_retry_limit=100, max_instances=1)
        await connection.register_application("away", spec)
        try:
            manager(signal.SIGSTOP)
            await becomes(NodeState.UNKNOWN)
            session = await connection.create_session("away", resources=ON_AWAY)
            task = await session.create_task(call("who"))

            async def waits() -> bool:
                return bool((await connection.get_session(session.id)).waits_for)

            await eventually(waits, "nothing new is placed there")
            assert await connection.list_executors(session=session.id) == []
            manager(signal.SIGCONT)
            await becomes(NodeState.READY)
            served = await asyncio.wait_for(task, PATIENCE_S)

            manager(signal.SIGSTOP)
            await becomes(NodeState.UNKNOWN)
            assert (await session.invoke(call("echo", 1), timeout_s=PATIENCE_S)).executor == served.executor
            await becomes(NodeState.NOT_READY)
            gone = await ear.until(lambda e: (e.id, e.event) == (served.executor, "released"), "its executor went, too")
            assert gone.code == ReasonCode.NODE_LOST
            # Its process lives, but can't reach the session any more.
            task = await session.create_task(call("who"))
            await eventually(waits, "the session is to be bound elsewhere, and nowhere can it be")
            assert not task.done()
            manager(signal.SIGCONT)
            await becomes(NodeState.READY)
            other = await asyncio.wait_for(task, PATIENCE_S)
            assert (other.executor != served.executor, other.attempt) == (True, 1)
            assert json.loads(other.output)["pid"] != json.loads(served.output)["pid"]
        finally:
            manager(signal.SIGCONT)
        await at_rest(connection, session, 3)
        await session.close()
    return seen


@rows(NODE)
async def test_of_nodes(away: Future[dict[Move, str]], row: tuple[NodeState, NodeEvent]) -> None:
    seen = await asyncio.wait_for(asyncio.wrap_future(away), 90)
    assert seen.get(row) == NODE.next(*row)
