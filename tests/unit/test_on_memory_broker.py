"""Client, scheduler and executors together on the in-memory broker, in virtual time, with everything going wrong."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, ClassVar, TypeVar

import pytest

import flame
from flame.broker.memory import Faults, MemoryServer
from flame.errors import Unavailable
from flame.protocol import defaults, subjects
from flame.protocol.messages import ResultRecord
from flame.protocol.states import SessionState, TaskState
from tests.support.memory_cluster import MemoryCluster
from tests.support.virtual_time import run_virtually

T = TypeVar("T")

SEEDS = range(int(os.environ.get("FLAME_SEEDS", "10")))
"""One run of the property for each. A seed takes the same course every time, whatever the machine does."""

TROUBLE = Faults(
    delay_live=0.1,
    longest_delay_s=0.2,
    duplicate_live=0.1,
    lose_live=0.2,
    lose_requests=0.03,
    lose_answers=0.03,
    lose_stores=0.05,
    lose_store_answers=0.05,
    lose_deliveries=0.05,
    lose_acknowledgements=0.1,
    interrupt=0.002,
)


class Service:
    """Sleeps for as many seconds as the first word of its input says and returns the rest.

    Raises that after a ``!``, and after a ``?`` as long as it isn't the third attempt.
    """

    runs: ClassVar[Counter[bytes]] = Counter()

    def on_session_enter(self, context: flame.SessionContext) -> Awaitable[None]:
        self.common_data = context.common_data
        return asyncio.sleep(0)

    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        Service.runs[context.input] += 1
        seconds, _, rest = context.input.partition(b" ")
        await asyncio.sleep(float(seconds))
        if rest.startswith(b"!") or (rest.startswith(b"?") and context.attempt < 3):
            raise ValueError(rest.decode())
        return self.common_data + rest


def on_cluster(
    test: Callable[[MemoryCluster], Coroutine[Any, Any, T]], *, seed: int = 0, nodes: int = 1, limit_s: float = 3600
) -> T:
    """Run a test with a cluster of its own, in virtual time."""

    async def main() -> T:
        async with MemoryCluster(MemoryServer(seed), Service, nodes) as cluster:
            return await test(cluster)

    Service.runs.clear()
    return run_virtually(main(), seed=seed, limit_s=limit_s)


def now() -> float:
    return asyncio.get_running_loop().time()


async def insist(operation: Callable[[], Awaitable[T]]) -> T:
    """Ask again while the cluster can't do something, as a patient user would."""
    while True:
        try:
            return await operation()
        except Unavailable:
            await asyncio.sleep(0.1)


# ---- without faults


def test_a_session_from_its_creation_to_its_end() -> None:
    async def test(cluster: MemoryCluster) -> None:
        application = await cluster.application(max_instances=2, delay_release_s=5)
        client = cluster.client()
        heard: list[TaskState] = []

        class Informer(flame.TaskInformer):
            def on_update(self, task: flame.Task) -> None:
                heard.append(task.state)

        async with await client.create_session(application, b"common ") as session:
            assert (await session.invoke("0 first", Informer())).output == b"common first"
            tasks = await asyncio.gather(*(session.invoke(f"0 {n}") for n in range(100)))
            assert [task.output for task in tasks] == [b"common %d" % n for n in range(100)]
            with pytest.raises(flame.TaskFailed, match="ValueError: !no"):
                await session.invoke("0 !no")
            info = await client.get_session(session.id)
            assert info.session.state is SessionState.OPEN
        assert heard == [TaskState.PENDING, TaskState.RUNNING, TaskState.SUCCEED]
        assert session.state is SessionState.CLOSED
        info = await client.get_session(session.id)
        assert (info.succeeded, info.failed, info.cancelled, info.pending) == (101, 1, 0, 0)
        assert set(Service.runs.values()) == {1}
        assert not cluster.view.bindings
        assert now() < 10

    on_cluster(test)


def test_a_task_that_runs_for_long_keeps_its_lease_and_runs_once() -> None:
    async def test(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application())
        await session.invoke("60 x")
        assert 60 <= now() < 61

    on_cluster(test)
    assert Service.runs == {b"60 x": 1}


def test_closing_lets_running_tasks_finish_and_cancels_waiting_ones() -> None:
    async def test(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application(max_instances=1))
        running = await session.create_task("20 x")
        await asyncio.sleep(1)
        waiting = [await session.create_task(f"0 {n}") for n in range(10)]
        await session.close()
        assert (await running).output == b"x"
        for task in waiting:
            with pytest.raises(flame.TaskCancelled):
                await task

    on_cluster(test)
    assert Service.runs == {b"20 x": 1}


# ---- one trouble at a time


def test_an_end_that_nobody_heard_of_is_found_by_asking() -> None:
    async def test(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application())
        await session.invoke("0 warm")
        cluster.server.faults = Faults(lose_live=1)
        begun = now()
        assert (await session.invoke("0 x")).output == b"x"
        assert defaults.RECONCILE_FIRST_S <= now() - begun < 2 * defaults.RECONCILE_FIRST_S

    on_cluster(test)


def test_a_task_that_nobody_heard_of_is_found_by_looking() -> None:
    async def test(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application())
        await asyncio.sleep(5)
        cluster.server.faults = Faults(lose_live=1)  # also of the subscription that waits for a session's first task
        assert (await session.invoke("0 x")).output == b"x"
        assert now() < 60

    on_cluster(test)


def test_tasks_of_a_consumer_that_was_lost_go_on_and_none_runs_twice() -> None:
    async def test(cluster: MemoryCluster) -> None:
        application = await cluster.application(max_instances=2)
        session = await cluster.client().create_session(application)
        tasks = [await session.create_task(f"0.5 {n}") for n in range(40)]
        for _ in range(3):
            await asyncio.sleep(2.2)
            cluster.server.restart()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
        await session.close()

    on_cluster(test)
    assert len(Service.runs) == 40
    # What ran when the consumer went is delivered to another executor at once; everything else runs once.
    assert sum(count - 1 for count in Service.runs.values()) <= 3 * 2


def test_the_task_of_an_executor_that_was_lost_runs_again() -> None:
    async def test(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application(max_instances=1))
        task = await session.create_task("30 x")
        await asyncio.sleep(10)
        [manager] = cluster.managers
        manager.crash(*manager.living)
        assert (await task).output == b"x"
        assert now() < 10 + defaults.ACK_WAIT_S + 30 + 5

    on_cluster(test)
    assert Service.runs == {b"30 x": 2}


def test_no_acknowledgement_that_arrives_is_needed_for_a_task_to_have_one_record() -> None:
    async def test(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application(max_instances=1))
        cluster.server.faults = Faults(lose_acknowledgements=0.7)
        tasks = await asyncio.gather(*(session.invoke(f"0 {n}") for n in range(20)))
        assert [task.output for task in tasks] == [b"%d" % n for n in range(20)]
        cluster.server.faults = Faults()
        await session.close()

    on_cluster(test)
    assert set(Service.runs.values()) == {1}  # a delivery that comes again finds the record


def test_an_executor_that_runs_several_tasks_at_once_runs_all_that_it_holds() -> None:
    async def test(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application(max_instances=1, concurrency=3))
        await asyncio.gather(*(session.invoke(f"0 {n}") for n in range(60)))
        begun = now()
        await asyncio.gather(*(session.invoke(f"0 {n}") for n in range(60)))
        assert now() - begun < 5

    on_cluster(test)


def test_an_executor_that_runs_several_tasks_at_once_leaves_although_it_holds_some() -> None:
    async def test(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application(max_instances=1, concurrency=3))
        for n in range(20):
            await session.invoke(f"0 {n}")  # such short ones are taken many at once
        await asyncio.gather(*(session.create_task(f"5 {n}") for n in range(20)))
        await asyncio.sleep(10)
        await session.close(timeout_s=60)

    on_cluster(test)


# ---- all at once


KINDS = {7: "!", 5: "?", 1: "slow", 2: "late", 4: "unwanted"}
"""What is special about a task whose number ends like this.

It fails, has to be retried, is stopped, delayed, or cancelled at some time.
"""


async def _ask(session: flame.Session, number: int, after_s: float) -> flame.Task:
    """Run one of many tasks, of which some take long, some very long, and some fail."""
    await asyncio.sleep(after_s)
    kind = KINDS.get(number % 10, "")
    seconds = 40 if number % 20 == 9 or kind == "slow" else 5 if kind == "unwanted" else 0.3 if number % 4 == 3 else 0
    options = {
        "?": flame.TaskOptions(max_attempts=3),
        "slow": flame.TaskOptions(timeout_s=2),
        "late": flame.TaskOptions(delay_s=15),
    }
    mark = kind if kind in ("!", "?") else ""
    handle = await session.create_task(f"{seconds} {mark}{session.id}-{number}", options=options.get(kind))
    if kind == "unwanted":
        await asyncio.sleep(after_s)
        await insist(handle.cancel)
    try:
        return await handle
    except flame.TaskError as error:
        return error.task


async def _make_trouble(cluster: MemoryCluster, chance: random.Random) -> None:
    """Lose consumers and executors now and then."""
    for _ in range(3):
        await asyncio.sleep(chance.uniform(1, 15))
        cluster.server.restart(lose_consumers=chance.random() < 0.8)
        manager = chance.choice(cluster.managers)
        if manager.living:
            manager.crash(chance.choice(manager.living))


async def _course(cluster: MemoryCluster, seed: int) -> dict[str, flame.Task]:
    """Let three clients have their tasks run while everything fails, and return what each task ended with."""
    chance = random.Random(seed)
    server = cluster.server
    application = await cluster.application(delay_release_s=3, max_instances=3)
    server.faults = TROUBLE
    clients = [cluster.client(f"client{n}") for n in range(3)]
    spec = flame.SessionSpec(application=application)
    sessions = [await insist(partial(client.open_session, f"s{n}", spec)) for n, client in enumerate(clients)]
    trouble = asyncio.create_task(_make_trouble(cluster, chance))
    asked = [(session, number) for session in sessions for number in range(30)]
    tasks = await asyncio.gather(*(_ask(session, number, chance.uniform(0, 10)) for session, number in asked))
    await trouble
    for session in sessions:
        await insist(session.close)
    server.faults = Faults()
    return {f"{session.id}-{number}": task for (session, number), task in zip(asked, tasks, strict=True)}


async def _check(cluster: MemoryCluster, tasks: dict[str, flame.Task]) -> None:
    """Every task has one record, its client was told what is in that, and nothing is left over."""
    broker = cluster.server.connect("check")
    [application] = {task.application for task in tasks.values()}
    for name, task in tasks.items():
        kind = KINDS.get(int(name[-1]), "")
        if kind in ("!", "slow"):
            assert task.state is TaskState.FAILED
            assert task.error is not None
            assert task.error.message == (f"!{name}" if kind == "!" else "the run took longer than 2 s")
        elif kind != "unwanted" or task.state is not TaskState.CANCELLED:
            assert task.output.decode() == ("?" if kind == "?" else "") + name
        subject = subjects.result(application, task.session_id, task.id)
        stored = await broker.last(subjects.result_stream(application), subject)
        assert stored is not None
        record = ResultRecord.decode(stored.data)
        assert (record.state, record.output, record.executor) == (task.state, task.output, task.executor)
    results = await broker.subjects(subjects.result_stream(application), ">")
    assert len(results) == len(tasks)
    assert set(results.values()) == {1}
    assert await broker.subjects(subjects.task_stream(application), ">") == {}
    await asyncio.sleep(30)
    assert await broker.consumers(subjects.task_stream(application)) == []
    assert cluster.view.bindings == {}
    assert [manager.living for manager in cluster.managers] == [[], []]
    for session in {task.session_id for task in tasks.values()}:
        info = await cluster.client().get_session(session)
        ended = Counter(task.state for task in tasks.values() if task.session_id == session)
        assert (info.pending, info.running) == (0, 0)
        told = {TaskState.SUCCEED: info.succeeded, TaskState.FAILED: info.failed, TaskState.CANCELLED: info.cancelled}
        assert told == {state: ended[state] for state in told}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_task_gets_exactly_one_record_and_every_client_its_answer(seed: int) -> None:
    async def test(cluster: MemoryCluster) -> None:
        await _check(cluster, await _course(cluster, seed))

    on_cluster(test, seed=seed, nodes=2)
    assert 90 - 9 <= len(Service.runs) <= 90


def test_the_same_seed_takes_the_same_course() -> None:
    async def test(cluster: MemoryCluster) -> list[tuple[str, flame.Task]]:
        return sorted((await _course(cluster, 1)).items())

    course = on_cluster(test, seed=1, nodes=2)
    assert course == on_cluster(test, seed=1, nodes=2)
