"""A cluster with a limit on all its sessions' executors together."""

from __future__ import annotations

import asyncio
import json

import flame
from tests.support.cluster import PATIENCE_S, Cluster, eventually, executors_of

SCHEDULER_OPTIONS = ("--max-executors", "1")
MANAGER_OPTIONS = ("--cpu", "1000", "--memory", "1000g")


async def test_no_more_executors_are_bound_than_the_cluster_may_have(
    cluster: Cluster, connection: flame.Connection
) -> None:
    await connection.register_application("limited", cluster.service("lab", delay_release_s=0.1))
    first, second = [await connection.create_session("limited") for _ in range(2)]
    running = await first.create_task(json.dumps(["sleep", 2]))
    await eventually(lambda: executors_of(connection, first.id), "the first session is served")
    waiting = await second.create_task(json.dumps(["echo", 1]))

    async def waits() -> str:
        return (await connection.get_session(second.id)).waits_for

    assert await eventually(waits, "the second session waits") == "the cluster has its 1 executors"
    assert len(await connection.list_executors()) == 1
    await asyncio.wait_for(running, PATIENCE_S)
    assert json.loads((await asyncio.wait_for(waiting, PATIENCE_S)).output) == 1
    assert await waits() == ""
    for session in (first, second):
        await session.close()
