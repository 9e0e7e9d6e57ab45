"""Tasks that may not be started yet, or not any more, in sessions that nobody serves, on a real cluster."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

import flame
from flame.protocol import subjects
from flame.protocol.codes import ReasonCode
from flame.protocol.states import CloseMode, SessionState
from tests.support.cluster import PATIENCE_S, Cluster, eventually, executors_of

MANAGER_OPTIONS = ("--cpu", "1000", "--memory", "1000g")
DELAY_S = 2.0


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def test_a_delayed_task_binds_nobody_before_it_may_be_started(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab)
    begun = time.time()
    handle = await session.create_task(call("echo", 1), options=flame.TaskOptions(delay_s=DELAY_S))
    looks = 0
    while time.time() < begun + DELAY_S / 2:
        assert await executors_of(connection, session.id) == []
        assert (await connection.get_session(session.id)).pending == 1
        looks += 1
    assert looks
    task = await asyncio.wait_for(handle, PATIENCE_S)
    assert task.started >= begun + DELAY_S
    await session.close()


async def test_a_task_that_is_due_does_not_wait_for_delayed_ones(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab)
    later = [
        await session.create_task(call("echo", number), options=flame.TaskOptions(delay_s=600)) for number in range(20)
    ]
    assert json.loads((await session.invoke(call("echo", 1), timeout_s=PATIENCE_S)).output) == 1
    await session.close()
    for handle in later:
        with pytest.raises(flame.TaskCancelled):
            await handle


async def test_a_delayed_task_is_run_although_its_sessions_executors_have_left(
    cluster: Cluster, connection: flame.Connection
) -> None:
    await connection.register_application("hasty", cluster.service("lab", delay_release_s=0.2))
    session = await connection.create_session("hasty")
    begun = time.time()
    handle = await session.create_task(call("echo", 2), options=flame.TaskOptions(delay_s=2 * DELAY_S))
    await session.invoke(call("echo", 1), timeout_s=PATIENCE_S)

    async def left() -> bool:
        return not await executors_of(connection, session.id)

    await eventually(left, "its executor has left")
    assert time.time() < begun + 2 * DELAY_S
    assert (await asyncio.wait_for(handle, PATIENCE_S)).started >= begun + 2 * DELAY_S
    await session.close()


async def test_a_session_that_drains_runs_its_delayed_tasks_first(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab)
    begun = time.time()
    handle = await session.create_task(call("echo", 1), options=flame.TaskOptions(delay_s=DELAY_S))
    await session.close(mode=CloseMode.DRAIN, timeout_s=PATIENCE_S)
    assert json.loads((await handle).output) == 1
    assert time.time() >= begun + DELAY_S
    info = await connection.get_session(session.id)
    assert (info.session.state, info.succeeded, info.cancelled) == (SessionState.CLOSED, 1, 0)


async def test_tasks_expire_in_time_although_nobody_can_serve_their_session(
    connection: flame.Connection, lab: str
) -> None:
    session = await connection.create_session(lab, resources="gpu=1")
    begun = time.time()
    expires = await session.create_task(call("echo", 1), options=flame.TaskOptions(expires_s=1))
    stays = await session.create_task(call("echo", 2))
    with pytest.raises(flame.TaskExpired):
        await asyncio.wait_for(expires, PATIENCE_S)
    assert begun + 1 <= time.time() < begun + 1 + PATIENCE_S / 2

    async def counted() -> bool:
        info = await connection.get_session(session.id)
        return (info.pending, info.failed, bool(info.waits_for)) == (1, 1, True)

    await eventually(counted, "it is counted, and the other one goes on waiting")
    await session.close()
    with pytest.raises(flame.TaskCancelled):
        await stays


async def test_a_session_whose_tasks_have_all_expired_waits_for_nothing(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab, resources="gpu=1")
    handle = await session.create_task(call("echo", 1), options=flame.TaskOptions(expires_s=1))

    async def waits() -> bool:
        return bool((await connection.get_session(session.id)).waits_for)

    async def waits_no_more() -> bool:
        return not await waits()

    await eventually(waits, "it waits for an executor")
    with pytest.raises(flame.TaskExpired):
        await asyncio.wait_for(handle, PATIENCE_S)
    await eventually(waits_no_more, "it waits for nothing")
    await session.close()


async def test_a_session_with_a_delayed_task_is_not_idle(cluster: Cluster, connection: flame.Connection) -> None:
    await connection.register_application("idles", cluster.service("lab", idle_timeout_s=1, delay_release_s=0.1))
    session = await connection.create_session("idles")
    handle = await session.create_task(call("echo", 1), options=flame.TaskOptions(delay_s=2 * DELAY_S))
    task = await asyncio.wait_for(handle, PATIENCE_S)

    async def ended() -> bool:
        return (await connection.get_session(session.id)).session.state is SessionState.CLOSED

    await eventually(ended, "it is closed for want of tasks")
    record = (await connection.get_session(session.id)).session
    assert record.code == ReasonCode.IDLE_TIMEOUT
    assert record.ended >= task.finished + 1
    tasks = subjects.session_tasks("idles", session.id)
    assert await connection.broker.first_stored(subjects.task_stream("idles"), tasks) is None


async def test_a_task_that_is_tried_again_later_binds_nobody_before(
    cluster: Cluster, connection: flame.Connection
) -> None:
    spec = cluster.service("lab", delay_release_s=0.1, max_attempts=2, retry_backoff_s=2 * DELAY_S)
    await connection.register_application("retries", spec)
    session = await connection.create_session("retries")
    handle = await session.create_task(call("fail", "no such luck"))

    async def bound() -> bool:
        return bool(await executors_of(connection, session.id))

    async def left() -> bool:
        return not await bound()

    await eventually(bound, "the task has its first run")
    await eventually(left, "its executor has left meanwhile")
    assert (await connection.get_session(session.id)).pending == 1
    with pytest.raises(flame.TaskFailed, match="no such luck") as caught:
        await asyncio.wait_for(handle, PATIENCE_S)
    assert caught.value.task.attempt == 2
    await session.close()
