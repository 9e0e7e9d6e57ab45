"""A cluster in memory comes to the same as a real one: each scenario is played on both, and what it shows compared."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

import flame
from flame.protocol.states import ExecutorState
from flame.testing import EmbeddedCluster, EventLog, MemoryCluster, VirtualClock
from tests.support.cluster import SERVICES, kill

SCRIPT = SERVICES / "testee.py"


class Stage:
    """A cluster that scenarios are played on."""

    def __init__(self, connection: flame.Connection, events: EventLog, kill: Callable[[str], object]) -> None:
        self.connection = connection
        self.events = events
        self.kill = kill
        self.register: Callable[..., Awaitable[str]]

    async def open(self, common_data: bytes = b"", **spec: Any) -> flame.Session:
        name = await self.register(**{"delay_release_s": 30, "max_instances": 1, **spec})
        return await self.connection.create_session(name, common_data)

    async def running(self, task: flame.TaskHandle) -> str:
        """Wait until a task runs and return where."""
        return (await self.events.expect(task=task, state="running", within_s=20)).executor


async def ended(task: flame.TaskHandle) -> tuple[Any, ...]:
    """What a task's record says that can be compared."""
    done = await asyncio.wait_for(task.finished(), 60)
    fault = ("", "", "") if done.error is None else (done.error.code, done.error.type, done.error.message)
    return (done.state, done.output, done.attempt, *fault)


async def answers(stage: Stage) -> Any:
    session = await stage.open(b"data")
    return [await ended(task) for task in await session.create_tasks([b"echo 1", b"fail x", b"wrong", b"none"])]


async def is_tried_again(stage: Stage) -> Any:
    session = await stage.open(max_attempts=3, retry_backoff_s=0.05)
    tasks = await session.create_tasks([b"until 3", b"until 5", b"fail x"])
    return [await ended(task) for task in tasks]


async def is_tried_again_after_some_errors(stage: Stage) -> Any:
    session = await stage.open(max_attempts=3, retry_backoff_s=0.05, retry_on=["KeyError"])
    return [await ended(task) for task in await session.create_tasks([b"until 2", b"fail x"])]


async def takes_too_long(stage: Stage) -> Any:
    session = await stage.open(timeout_s=0.3)
    tasks = await session.create_tasks([b"sleep 60", b"echo next"])
    return [await ended(task) for task in tasks]


async def does_not_stop(stage: Stage) -> Any:
    session = await stage.open(timeout_s=0.3)
    tasks = await session.create_tasks([b"stubborn", b"echo next"])
    return [await ended(task) for task in tasks]


async def expires(stage: Stage) -> Any:
    session = await stage.open()
    await session.invoke(b"echo ready")  # so the first is started in time, however busy the machine is
    running = await session.create_task(b"sleep 1")
    late = await session.create_task(b"echo late", options=flame.TaskOptions(expires_s=0.3))
    return [await ended(task) for task in (running, late)]


async def is_cancelled(stage: Stage) -> Any:
    session = await stage.open()
    running, waiting, other = await session.create_tasks([b"sleep 60", b"sleep 60", b"echo other"])
    await stage.running(running)
    await session.cancel_tasks([waiting.id, running.id], "enough")
    return [await ended(task) for task in (running, waiting, other)]


async def loses_its_executor(stage: Stage) -> Any:
    session = await stage.open()
    lost, waiting = await session.create_tasks([b"sleep 1", b"echo waits"])
    stage.kill(await stage.running(lost))
    released = await stage.events.expect(noun="executor", session=session, state="released")
    return [await ended(lost), await ended(waiting), released.code, released.reason]


async def loses_every_executor(stage: Stage) -> Any:
    session = await stage.open()
    task = await session.create_task(b"sleep 60")
    last = None
    for _ in range(3):
        run = await stage.events.expect(task=task, state="running", within_s=20, after=last)
        stage.kill(run.executor)
        last = run
    return await ended(task)


async def ends_by_itself(stage: Stage) -> Any:
    session = await stage.open()
    task = await session.create_task(b"exit 3")
    seen = [await stage.events.expect(noun="executor", session=session, state="released", within_s=20)]
    return [await ended(task), seen[0].code, seen[0].reason.partition("\n")[0]]


async def can_not_be_entered(stage: Stage) -> Any:
    session = await stage.open(b"never", session_retry_limit=3)
    task = await session.create_task(b"echo x")
    failed = await stage.events.expect(session=session, state="failed", within_s=20)
    with pytest.raises(flame.FlameError) as refusal:
        await session.invoke(b"echo y")
    tried = stage.events.matching(noun="executor", session=session, state="released")
    found = await ended(task)
    reason = failed.reason.partition("\n")[0].replace(session.id, "ID")
    return [found[:4], failed.code, reason, len(tried), type(refusal.value)]


async def exits_while_it_enters(stage: Stage) -> Any:
    session = await stage.open(b"exit", session_retry_limit=2)
    await session.create_task(b"echo x")
    failed = await stage.events.expect(session=session, state="failed", within_s=20)
    return [failed.code, failed.reason.partition("\n")[0]]


def is_closed(mode: str) -> Callable[[Stage], Awaitable[Any]]:
    async def scenario(stage: Stage) -> Any:
        session = await stage.open()
        running, waiting = await session.create_tasks([b"sleep 1", b"echo waits"])
        executor = await stage.running(running)
        await session.close(mode, timeout_s=60)
        closed = await stage.events.expect(session=session, state="closed")
        released = await stage.events.expect(executor=executor, state="released")
        tasks = [await ended(task) for task in (running, waiting)]
        for n, task in enumerate(tasks):
            tasks[n] = (*task[:-1], str(task[-1]).replace(session.id, "ID"))
        return [tasks, closed.code, released.code, released.reason]

    scenario.__name__ = f"is_closed_{mode}"
    return scenario


async def is_released(stage: Stage) -> Any:
    session = await stage.open(delay_release_s=0.3)
    first = await session.invoke(b"echo 1")
    released = await stage.events.expect(executor=first.executor, state="released", within_s=20)
    second = await session.invoke(b"echo 2")
    return [released.code, released.reason, second.executor != first.executor]


async def has_several_executors(stage: Stage) -> Any:
    session = await stage.open(max_instances=3)
    tasks = await session.create_tasks([b"sleep 2"] * 3)
    executors = {await stage.running(task) for task in tasks}
    return [len(executors), *[await ended(task) for task in tasks]]


async def moves_through_its_states(stage: Stage) -> Any:
    session = await stage.open()
    executor = (await session.invoke(b"echo 1")).executor
    await session.close(timeout_s=60)
    await stage.events.expect(executor=executor, state="released")
    of_session = [event.event for event in stage.events.matching(noun="session", session=session)]
    of_executor = [event.event for event in stage.events.matching(executor=executor)]
    quick = {ExecutorState.IDLE, ExecutorState.BINDING, ExecutorState.UNBINDING}  # a fork has its session at once
    return [of_session, [state for state in of_executor if state not in quick]]


SCENARIOS: list[Callable[[Stage], Awaitable[Any]]] = [
    answers,
    can_not_be_entered,
    does_not_stop,
    ends_by_itself,
    exits_while_it_enters,
    expires,
    has_several_executors,
    is_cancelled,
    is_closed("close"),
    is_closed("drain"),
    is_closed("force"),
    is_released,
    is_tried_again,
    is_tried_again_after_some_errors,
    loses_every_executor,
    loses_its_executor,
    moves_through_its_states,
    takes_too_long,
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedCluster]:
    made = EmbeddedCluster(tmp_path_factory.mktemp("cluster")).start_blocking()
    try:
        yield made
    finally:
        made.stop_blocking()


@contextlib.asynccontextmanager
async def real(cluster: EmbeddedCluster, name: str) -> AsyncIterator[Stage]:
    async with await cluster.connect() as connection, cluster.events(connection) as events:
        pids: dict[str, int] = {}

        async def end(executor: str) -> None:
            pids[executor] = (await connection.get_executor(executor)).pid
            kill(pids[executor])

        ending: set[asyncio.Task[None]] = set()
        stage = Stage(connection, events, lambda executor: ending.add(asyncio.create_task(end(executor))))
        stage.register = lambda **spec: cluster.register(SCRIPT, name, **spec)
        yield stage


@contextlib.asynccontextmanager
async def in_memory(name: str) -> AsyncIterator[Stage]:
    module = importlib.util.spec_from_file_location("testee", SCRIPT)
    assert module is not None
    assert module.loader is not None
    testee = importlib.util.module_from_spec(module)
    module.loader.exec_module(testee)
    async with MemoryCluster(clock=VirtualClock()) as cluster, cluster.events() as events:
        stage = Stage(cluster.connection, events, cluster.kill_executor)
        stage.register = lambda **spec: cluster.register(testee.Testee, name, **spec)
        yield stage


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_a_session_in_memory_is_like_one_of_a_cluster(
    cluster: EmbeddedCluster, scenario: Callable[[Stage], Awaitable[Any]]
) -> None:
    name = scenario.__name__.replace("_", "-")
    async with in_memory(name) as stage:
        found = await scenario(stage)
    async with real(cluster, name) as stage:
        expected = await scenario(stage)
    assert found == expected
