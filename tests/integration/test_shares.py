"""Who gets how much of a full cluster: two nodes with room for four executors each."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest

import flame
from flame.protocol.events import ClusterEvent, Noun
from flame.protocol.states import CloseMode, ExecutorState, TaskState
from tests.support.cluster import Cluster, eventually, executors_of
from tests.support.ear import Ear, listening
from tests.support.records import at_rest, records_of

NODES = 2
MANAGER_OPTIONS = ("--cpu", "0.4", "--memory", "1000g", "--gpu", "0")
ROOM = 8
LONG_S = 60.0
"""How long a test waits for a share: executors leave when they have run what they hold."""
CALM_S = 3.0
"""For so long nobody leaves who has a right to stay."""
BACKLOG = 600
"""Tasks that are always outstanding: more than the whole room runs in some seconds."""
TASK_S = 0.05


def call(verb: str, *arguments: object) -> bytes:
    return json.dumps([verb, *arguments]).encode()


class Load:
    """A session that never runs out of short tasks, until it is told to come to an end."""

    def __init__(self, session: flame.Session) -> None:
        self.session = session
        self.finished: list[flame.Task] = []
        self._goes_on = True
        self._workers: list[asyncio.Task[None]] = []

    async def start(self) -> Self:
        self._workers = [asyncio.create_task(self._work()) for _ in range(BACKLOG)]
        return self

    async def _work(self) -> None:
        while self._goes_on:
            self.finished.append(await self.session.invoke(call("sleep", TASK_S)))

    async def end(self) -> None:
        """Let what is outstanding be run, and nothing else."""
        self._goes_on = False
        async with asyncio.timeout(LONG_S):
            await asyncio.gather(*self._workers)

    async def abandon(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        await self.session.close(CloseMode.FORCE, timeout_s=LONG_S)

    def runs_are_first_ones(self) -> bool:
        """Whether no task was run a second time, or ended otherwise than it should."""
        return {(task.state, task.attempt) for task in self.finished} == {(TaskState.SUCCEED, 1)}


@pytest.fixture
async def application(cluster: Cluster, connection: flame.Connection) -> str:
    """One that leaves it to the cluster how many executors a session has."""
    name = "wide"
    if name not in {application.name for application in await connection.list_applications()}:
        spec = cluster.service("lab", max_instances=100, delay_release_s=30)
        await connection.register_application(name, spec)
    return name


@pytest.fixture
async def ear(connection: flame.Connection) -> AsyncIterator[Ear]:
    async with listening(connection) as ear:
        yield ear


class Loads:
    """Opens sessions that never run out of tasks."""

    def __init__(self, connection: flame.Connection, application: str) -> None:
        self._connection = connection
        self._application = application
        self._loads: list[Load] = []

    async def open(self, **options: Any) -> Load:
        session = await self._connection.create_session(self._application, **options)
        load = Load(session)
        self._loads.append(load)
        return await load.start()

    async def abandon(self) -> None:
        await asyncio.gather(*(load.abandon() for load in self._loads))


@pytest.fixture
async def loads(connection: flame.Connection, application: str) -> AsyncIterator[Loads]:
    made = Loads(connection, application)
    yield made
    await made.abandon()


async def serving(connection: flame.Connection, *sessions: flame.Session) -> list[int]:
    """Return how many executors serve each session."""
    counted = Counter(e.session for e in await connection.list_executors() if e.state is ExecutorState.BOUND)
    return [counted[session.id] for session in sessions]


async def shared(connection: flame.Connection, wanted: dict[flame.Session, int], what: str) -> None:
    """Return when each session has as many executors as it should."""
    found: list[int] = []

    async def as_wanted() -> bool:
        found[:] = await serving(connection, *wanted)
        return found == list(wanted.values())

    try:
        await eventually(as_wanted, what, LONG_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {found}") from None


def leaves(event: ClusterEvent) -> bool:
    return event.noun is Noun.EXECUTOR and event.state in (ExecutorState.UNBINDING, ExecutorState.RELEASED)


async def taken_over(connection: flame.Connection, load: Load) -> None:
    await shared(connection, {load.session: ROOM}, "it has the whole cluster")


async def why(connection: flame.Connection, session: flame.Session) -> str:
    return (await connection.get_session(session.id)).waits_for


# ---- shares


async def test_two_sessions_of_equal_weight_get_equal_shares_and_keep_them(
    connection: flame.Connection, loads: Loads, ear: Ear
) -> None:
    first = await loads.open()
    await taken_over(connection, first)
    second = await loads.open()
    equal = {first.session: ROOM // 2, second.session: ROOM // 2}
    await shared(connection, equal, "both have the same")
    await ear.nothing(leaves, CALM_S)
    assert await serving(connection, *equal) == list(equal.values())
    assert first.runs_are_first_ones()
    assert second.runs_are_first_ones()


async def test_of_a_session_with_three_times_the_weight_three_times_as_many_executors_serve(
    connection: flame.Connection, loads: Loads, ear: Ear
) -> None:
    first = await loads.open(weight=1)
    await taken_over(connection, first)
    second = await loads.open(weight=3)
    shares = {first.session: ROOM // 4, second.session: ROOM * 3 // 4}
    await shared(connection, shares, "one has three times as many")
    await ear.nothing(leaves, CALM_S)
    assert await serving(connection, *shares) == list(shares.values())


async def test_when_one_ends_the_other_gets_what_it_had(connection: flame.Connection, loads: Loads) -> None:
    first, second = await loads.open(), await loads.open()
    await shared(connection, {first.session: 4, second.session: 4}, "both have the same")
    await second.abandon()
    await taken_over(connection, first)


async def test_an_applications_weight_is_that_of_its_sessions(
    connection: flame.Connection, cluster: Cluster, loads: Loads
) -> None:
    first = await loads.open()
    await connection.register_application("heavy", cluster.service("lab", max_instances=100, weight=3))
    heavy = Loads(connection, "heavy")
    try:
        second = await heavy.open()
        await shared(connection, {first.session: 2, second.session: 6}, "one has three times as many")
    finally:
        await heavy.abandon()


async def test_idle_executors_make_room_at_once_although_they_might_stay(
    connection: flame.Connection, loads: Loads, application: str
) -> None:
    holder = await connection.create_session(application, priority=1)
    tasks = await holder.create_tasks([call("sleep", 2.0)] * ROOM)
    await shared(connection, {holder: ROOM}, "it has everything")
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*tasks)
    async with asyncio.timeout(20):  # they may stay for 30 s
        load = await loads.open(priority=1)
        await taken_over(connection, load)
    assert await executors_of(connection, holder.id) == []
    assert (await connection.get_session(holder.id)).session.state is flame.SessionState.OPEN
    await holder.close()


# ---- priorities


async def test_a_high_priority_overtakes_between_tasks_and_the_low_one_comes_back(
    connection: flame.Connection, loads: Loads
) -> None:
    low = await loads.open(priority=1)
    await taken_over(connection, low)
    high = await loads.open(priority=2)
    await shared(connection, {low.session: 0, high.session: ROOM}, "the high one has everything")
    await high.end()
    await high.session.close()
    await taken_over(connection, low)
    await low.end()
    for load in (low, high):
        assert load.runs_are_first_ones()  # so none was killed
        await at_rest(connection, load.session, len(load.finished))
        assert {record.attempt for record in (await records_of(connection, load.session)).values()} == {1}


async def test_a_low_one_has_what_the_high_one_may_not_use(
    connection: flame.Connection, loads: Loads, ear: Ear
) -> None:
    low = await loads.open(priority=1)
    await taken_over(connection, low)
    high = await loads.open(priority=2, max_instances=3)
    shares = {low.session: ROOM - 3, high.session: 3}
    await shared(connection, shares, "the high one has its maximum, the low one the rest")
    await ear.nothing(leaves, CALM_S)
    assert await serving(connection, *shares) == list(shares.values())
    assert low.runs_are_first_ones()


@pytest.mark.parametrize(
    ("resources", "reason"),
    [("gpu=1", "needs gpu=1; no node has one"), ("cpu=0.6", "needs cpu=0.6; the most any node has is cpu=0.4")],
)
async def test_a_low_one_has_what_fits_no_high_one(
    connection: flame.Connection, loads: Loads, application: str, ear: Ear, resources: str, reason: str
) -> None:
    low = await loads.open(priority=1)
    await taken_over(connection, low)
    high = await connection.create_session(application, priority=2, resources=resources)
    await high.create_task(call("echo", 1))
    assert await eventually(lambda: why(connection, high), "the high one waits") == reason
    await ear.nothing(leaves, 1.0)
    assert await serving(connection, low.session) == [ROOM]
    await high.close()


async def test_a_session_that_can_not_be_entered_blocks_nobody(
    connection: flame.Connection, cluster: Cluster, loads: Loads, tmp_path: Path
) -> None:
    await connection.register_application("stuck", cluster.service("lab", session_retry_limit=1000))
    plan = json.dumps({"enter_fails": str(tmp_path / "tried"), "times": 10**6}).encode()
    stuck = await connection.create_session("stuck", plan, priority=10)
    await stuck.create_tasks(call("echo", number) for number in range(100))
    low = await loads.open()
    await shared(connection, {low.session: ROOM - 1}, "it has all but the place of one attempt")

    async def says_so() -> bool:
        return "failed to enter" in (await why(connection, stuck) or "")  # in between room is made for it again

    await eventually(says_so, "it says why it waits")
    assert (await connection.get_session(stuck.id)).session.state is flame.SessionState.OPEN
    await stuck.close(CloseMode.FORCE, timeout_s=LONG_S)
    await taken_over(connection, low)


# ---- limits


async def test_an_application_has_no_more_executors_than_it_may(
    connection: flame.Connection, cluster: Cluster, ear: Ear
) -> None:
    spec = cluster.service("lab", max_instances=100, max_executors=4)
    await connection.register_application("narrow", spec)
    made = Loads(connection, "narrow")
    try:
        first = await made.open()
        await shared(connection, {first.session: 4}, "the first one has all that the application may have")
        second = await made.open()
        await shared(connection, {first.session: 2, second.session: 2}, "they share that")
        assert await why(connection, second.session) == "application narrow has its 4 executors"
        await ear.nothing(leaves, 1.0)
        assert len(await connection.list_executors()) == 4
    finally:
        await made.abandon()


async def test_executors_that_must_begin_together_do_or_none_does(
    connection: flame.Connection, application: str
) -> None:
    holder = await connection.create_session(application, max_instances=4)
    held = [await holder.create_task(call("sleep", 600)) for _ in range(4)]
    await shared(connection, {holder: 4}, "half of the cluster is held")
    gang = await connection.create_session(application, min_instances=6, max_instances=6)
    reason = "needs 6 executors at once (min_instances); there is room for 4"
    assert await eventually(lambda: why(connection, gang), "they wait") == reason
    small = await connection.create_session(application, min_instances=3, max_instances=3)
    await shared(connection, {small: 3}, "fewer of another session find room")
    assert await executors_of(connection, gang.id) == []
    for task in held:
        await task.cancel()
    await holder.close()
    await small.close()
    await shared(connection, {gang: 6}, "now they begin")
    assert await why(connection, gang) == ""
    await gang.close()
    for task in held:
        with pytest.raises(flame.TaskCancelled):
            await task


# ---- places


@pytest.mark.parametrize(("placement", "expected"), [("spread", [2, 2]), ("pack", [4])])
async def test_an_applications_executors_are_placed_as_it_says(
    connection: flame.Connection, cluster: Cluster, placement: str, expected: list[int]
) -> None:
    await connection.register_application(placement, cluster.service("lab", placement=placement, delay_release_s=30))
    async with _one_by_one(connection, placement, 4) as session:
        on_nodes = Counter(executor.node for executor in await executors_of(connection, session.id))
    assert sorted(on_nodes.values()) == expected


@asynccontextmanager
async def _one_by_one(connection: flame.Connection, application: str, count: int) -> AsyncIterator[flame.Session]:
    """Have a session get one executor after the other."""
    session = await connection.create_session(application, max_instances=count)
    tasks = []
    for number in range(1, count + 1):
        tasks.append(await session.create_task(call("sleep", 600)))
        await shared(connection, {session: number}, f"it has {number}")
    yield session
    await session.close(CloseMode.FORCE, timeout_s=LONG_S)
    for task in tasks:
        with pytest.raises(flame.TaskCancelled):
            await task
