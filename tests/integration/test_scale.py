"""How many executors a session gets, keeps and lets go, on a cluster that has room for all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

import flame
from flame.protocol.events import ClusterEvent, Noun
from flame.protocol.states import CloseMode, ExecutorState
from tests.support.cluster import PATIENCE_S, Cluster, eventually, executors_of
from tests.support.ear import Ear, listening

MANAGER_OPTIONS = ("--cpu", "1000", "--memory", "1000g")
MOST = 30
LONG_S = 60.0


def call(verb: str, *arguments: object) -> bytes:
    return json.dumps([verb, *arguments]).encode()


@pytest.fixture
async def ear(connection: flame.Connection) -> AsyncIterator[Ear]:
    async with listening(connection) as ear:
        yield ear


@pytest.fixture
async def wide(cluster: Cluster, connection: flame.Connection) -> AsyncIterator[Any]:
    """Open a session that may have many executors, of an application as it is said."""
    opened: list[flame.Session] = []

    async def open_session(name: str, *, options: dict[str, Any] | None = None, **spec: Any) -> flame.Session:
        usual = {"max_instances": MOST, "delay_release_s": 30}
        await connection.register_application(name, cluster.service("lab", **usual | spec))
        opened.append(await connection.create_session(name, **options or {}))
        return opened[-1]

    yield open_session
    for session in opened:
        await session.close(CloseMode.FORCE, timeout_s=LONG_S)


def told(ear: Ear, session: flame.Session, state: ExecutorState) -> list[ClusterEvent]:
    """Return what was told of executors that came into a state."""
    return [e for e in ear.events if e.noun is Noun.EXECUTOR and e.session == session.id and e.state == state]


async def bound(connection: flame.Connection, session: flame.Session) -> int:
    return sum(e.state is ExecutorState.BOUND for e in await executors_of(connection, session.id))


async def has(connection: flame.Connection, session: flame.Session, count: int) -> None:
    """Return when a session has so many executors that take tasks."""

    async def enough() -> bool:
        return await bound(connection, session) == count

    await eventually(enough, f"{count} executors take tasks", LONG_S)


# ---- out


async def test_a_thousand_tasks_of_a_millisecond_get_few_executors_and_fifty_of_200_get_all(
    connection: flame.Connection, ear: Ear, wide: Any
) -> None:
    session = await wide("scales")
    many = await session.create_tasks([call("sleep", 0.001)] * 1000)
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*many)
    few = len(told(ear, session, ExecutorState.BOUND))
    assert 1 <= few < MOST
    slow = await connection.create_session("scales")
    tasks = await slow.create_tasks([call("sleep", 0.2)] * 50)
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*tasks)
    assert few < len(told(ear, slow, ExecutorState.BOUND)) <= MOST
    await slow.close()


async def test_long_tasks_get_an_executor_each_and_not_many_more(
    connection: flame.Connection, ear: Ear, wide: Any
) -> None:
    session = await wide("long", max_instances=200)
    first = await session.create_task(call("sleep", 600))
    await has(connection, session, 1)
    await session.create_task(call("sleep", 600))
    await has(connection, session, 2)
    await ear.nothing(lambda e: e.noun is Noun.EXECUTOR and e.session == session.id, 1.5)
    await session.create_tasks([call("sleep", 600)] * 18)

    async def all_run() -> bool:
        executors = await executors_of(connection, session.id)
        return sum(executor.running for executor in executors) == 20

    await eventually(all_run, "each of them runs", LONG_S)
    assert 20 <= len(told(ear, session, ExecutorState.BOUND)) <= 40
    assert not first.done()


async def test_a_session_has_no_more_than_its_most(connection: flame.Connection, ear: Ear, wide: Any) -> None:
    session = await wide("bounded", options={"max_instances": 2})
    tasks = await session.create_tasks([call("sleep", 0.1)] * 40)
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*tasks)
    assert len(told(ear, session, ExecutorState.BOUND)) == 2


async def test_a_session_has_its_least_before_it_has_a_task_and_keeps_it(
    connection: flame.Connection, ear: Ear, wide: Any
) -> None:
    session = await wide("warm", min_instances=2, delay_release_s=0.2)
    await has(connection, session, 2)
    await session.invoke(call("echo", 1))
    await ear.nothing(lambda e: e.noun is Noun.EXECUTOR and e.session == session.id, 1.5)
    assert await bound(connection, session) == 2


# ---- in


async def test_an_executor_with_nothing_to_do_stays_as_long_as_it_is_said(
    connection: flame.Connection, ear: Ear, wide: Any
) -> None:
    session = await wide("stays", delay_release_s=1.5)
    first = await session.invoke(call("echo", 1))
    second = await session.invoke(call("echo", 2))
    assert second.executor == first.executor
    gone = await ear.until(lambda e: (e.id, e.state) == (first.executor, "released"), "it has left")
    assert 1.5 <= gone.at - second.finished < 1.5 + PATIENCE_S
    assert (gone.reason, gone.code) == ("", "")
    assert (await session.invoke(call("echo", 3), timeout_s=PATIENCE_S)).executor != first.executor


async def test_those_that_are_done_leave_and_the_busy_one_stays(
    connection: flame.Connection, ear: Ear, wide: Any
) -> None:
    session = await wide("shrinks", delay_release_s=0.3, max_instances=4)
    busy = await session.create_task(call("sleep", 600))
    short = await session.create_tasks([call("sleep", 4.0)] * 3)
    await has(connection, session, 4)
    async with asyncio.timeout(LONG_S):
        await asyncio.gather(*short)
    await has(connection, session, 1)
    [left] = [each for each in await executors_of(connection, session.id) if each.state is ExecutorState.BOUND]
    assert left.running == 1
    assert left.id not in {event.id for event in told(ear, session, ExecutorState.UNBINDING)}
    assert not busy.done()
