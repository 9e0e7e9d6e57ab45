"""What an open session costs that has nothing to do."""

from __future__ import annotations

import asyncio
from typing import Final

import nats

import flame
from benchmarks import targets
from benchmarks.cluster import FlameCluster
from benchmarks.figures import Figure, single
from benchmarks.meters import CpuMeter, resident_bytes
from benchmarks.scale import PAYLOAD
from benchmarks.stage import ECHO, Stage
from flame.protocol import subjects

_A_CLIENT: Final = 500
"""Sessions that one client opens, before it goes away and leaves them open."""
_AT_ONCE: Final = 16
_REST_S: Final = 2.0


async def run(stage: Stage) -> list[Figure]:
    """Open sessions, leave them, and watch broker and scheduler."""
    count = stage.scale.idle_sessions
    async with stage.flame() as cluster:
        async with await cluster.connection.create_session(ECHO) as session:
            await session.invoke(PAYLOAD)
        broker, scheduler = cluster.servers.pids(), [cluster.scheduler.pid]
        watched = [*broker, *scheduler]
        await asyncio.sleep(_REST_S)
        rested_share = await _cpu_share(watched, stage.scale.idle_watch_s)
        before = resident_bytes(broker), resident_bytes(scheduler)
        stage.say(f"{count} sessions are opened")
        for first in range(0, count, _A_CLIENT):
            await _open(cluster, min(_A_CLIENT, count - first))
        await asyncio.sleep(_REST_S)
        stage.say("they are watched")
        share = await _cpu_share(watched, stage.scale.idle_watch_s)
        of_broker = (resident_bytes(broker) - before[0]) / count
        of_scheduler = (resident_bytes(scheduler) - before[1]) / count
        consumers = await _consumers(cluster)
    what = f"{count:,} open idle sessions"
    return [
        Figure(
            name=f"{what}: memory of broker and scheduler for each",
            unit="bytes",
            better="lower",
            flame=single(of_broker + of_scheduler),
            target=targets.IDLE_BYTES,
            note=f"broker {of_broker:,.0f}, scheduler {of_scheduler:,.0f}",
        ),
        Figure(
            name=f"{what}: consumers on the task stream",
            unit="consumers",
            better="lower",
            flame=single(consumers),
            target=targets.IDLE_CONSUMERS,
        ),
        Figure(
            name=f"{what}: broker and scheduler",
            unit="% of a core",
            better="lower",
            flame=single(100 * share),
            note=f"{100 * rested_share:.2g} % before they were opened",
        ),
    ]


async def _open(cluster: FlameCluster, count: int) -> None:
    left = iter(range(count))
    async with await flame.connect(cluster.servers.endpoint) as connection:

        async def worker() -> None:
            for _ in left:
                await connection.create_session(ECHO)

        async with asyncio.TaskGroup() as workers:
            for _ in range(_AT_ONCE):
                workers.create_task(worker())


async def _cpu_share(pids: list[int], watch_s: float) -> float:
    meter = CpuMeter({"watched": pids})
    await asyncio.sleep(watch_s)
    return meter.used_s()["watched"] / watch_s


async def _consumers(cluster: FlameCluster) -> int:
    nc = await nats.connect(cluster.servers.endpoint.split(","))
    try:
        return int((await nc.jetstream().stream_info(subjects.task_stream(ECHO))).state.consumer_count)
    finally:
        await nc.close()
