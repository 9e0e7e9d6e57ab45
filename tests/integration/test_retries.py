"""Tasks that run again after their service raised, whoever serves them by then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.protocol.states import TaskState
from tests.support.cluster import Cluster
from tests.support.records import at_rest, records_of


def call(mark: Path, *outcomes: str) -> bytes:
    return json.dumps(["try", str(mark), *outcomes]).encode()


def runs(mark: Path) -> list[tuple[int, float]]:
    """Return which attempt each run was, and when it began."""
    lines = [line.split() for line in mark.read_text().splitlines()]
    return [(int(attempt), float(at)) for attempt, at in lines]


async def application(connection: flame.Connection, cluster: Cluster, name: str, **spec: Any) -> str:
    await connection.register_application(name, cluster.service("lab", delay_release_s=30, **spec))
    return name


async def test_a_task_runs_again_after_a_pause_and_once_more_until_it_may_not(
    connection: flame.Connection, cluster: Cluster, tmp_path: Path
) -> None:
    retried = await application(connection, cluster, "retried", max_attempts=3, retry_backoff_s=0.4)
    session = await connection.create_session(retried, max_instances=2)
    good, bad = tmp_path / "good", tmp_path / "bad"
    handles = [
        await session.create_task(call(good, "raise", "raise")),
        await session.create_task(call(bad, *["raise"] * 9)),
    ]
    assert (await handles[0]).output == b"3"
    with pytest.raises(flame.TaskFailed, match="ValueError: not yet"):
        await handles[1]
    for mark in (good, bad):
        assert [attempt for attempt, _ in runs(mark)] == [1, 2, 3]
        first, second, third = (at for _, at in runs(mark))
        assert second - first >= 0.2
        assert third - second >= 0.4
    records = await records_of(connection, session)
    assert [records[handle.id].attempt for handle in handles] == [3, 3]
    await at_rest(connection, session, 2)
    await session.close()


async def test_a_task_says_itself_how_often_it_may_run(
    connection: flame.Connection, cluster: Cluster, tmp_path: Path
) -> None:
    plain = await application(connection, cluster, "plain")
    session = await connection.create_session(plain, max_instances=1)
    with pytest.raises(flame.TaskFailed):
        await session.invoke(call(tmp_path / "once", "raise"))
    task = await session.invoke(call(tmp_path / "twice", "raise"), options=flame.TaskOptions(max_attempts=2))
    assert task.output == b"2"
    assert len(runs(tmp_path / "once")) == 1
    await at_rest(connection, session, 2)
    await session.close()


async def test_only_the_errors_that_are_named_are_retried_a_time_limit_among_them(
    connection: flame.Connection, cluster: Cluster, tmp_path: Path
) -> None:
    choosy = await application(
        connection, cluster, "choosy", max_attempts=3, retry_on=["TaskTimeout"], timeout_s=0.5, retry_backoff_s=0.1
    )
    session = await connection.create_session(choosy, max_instances=1)
    with pytest.raises(flame.TaskFailed, match="not yet"):
        await session.invoke(call(tmp_path / "raises", "raise"))
    assert (await session.invoke(call(tmp_path / "sleeps", "sleep"))).output == b"2"
    assert len(runs(tmp_path / "raises")) == 1
    await at_rest(connection, session, 2)
    await session.close()


async def test_a_lost_executor_counts_as_an_attempt_and_takes_none_away(
    connection: flame.Connection, cluster: Cluster, tmp_path: Path
) -> None:
    shaken = await application(connection, cluster, "shaken", max_attempts=2, retry_backoff_s=0.2)
    session = await connection.create_session(shaken, max_instances=1)
    mark = tmp_path / "mark"
    task = await session.invoke(call(mark, "raise", "exit"), timeout_s=60)
    assert (task.state, task.output) == (TaskState.SUCCEED, b"3")
    assert [attempt for attempt, _ in runs(mark)] == [1, 2, 3]
    await at_rest(connection, session, 1)
    await session.close()
