"""How many sessions a second come and go."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from typing import Final

from benchmarks import targets
from benchmarks.cluster import FlameCluster
from benchmarks.figures import MS, Figure, Measured, percentile, single
from benchmarks.meters import CpuMeter
from benchmarks.scale import PAYLOAD
from benchmarks.stage import ECHO, Stage

_AT_ONCE: Final = 16
_WARM_UP: Final = 3
_PHASES: Final = ("created", "first result", "closed")


async def run(stage: Stage) -> list[Figure]:
    """Create sessions, run one task in each, close them; a bounded number at once."""
    count = stage.scale.short_sessions
    stage.say(f"{count} sessions, {_AT_ONCE} at once")
    left = iter(range(count))
    lives: list[list[float]] = []
    async with stage.flame() as cluster:

        async def worker() -> None:
            for _ in left:
                lives.append(await _live(cluster))  # noqa: PERF401  # the list is all workers'

        for _ in range(_WARM_UP):
            await _live(cluster)
        control = [cluster.scheduler.pid, cluster.manager.pid]
        meter = CpuMeter({"broker": cluster.servers.pids(), "control": control})
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as workers:
            for _ in range(_AT_ONCE):
                workers.create_task(worker())
        elapsed_s = time.perf_counter() - begin
        cpu_us = meter.per_task_us(count)
    what = f"{count:,} short sessions, {_AT_ONCE} at once"
    rate = count / elapsed_s
    return [
        Figure(
            name=what,
            unit="sessions/s",
            flame=Measured(value=rate, lowest=rate, highest=rate, cpu_us=cpu_us),
            target=targets.SHORT_SESSIONS,
        ),
        *(
            Figure(
                name=f"{what}: {phase}, p{percent}",
                unit="ms",
                better="lower",
                flame=single(percentile([life[place] for life in lives], percent)),
                note="since the step before" if place else "",
            )
            for place, phase in enumerate(_PHASES)
            for percent in (50, 99)
        ),
    ]


async def _live(cluster: FlameCluster) -> list[float]:
    """Run one session and return how many milliseconds each of its phases took."""
    times = [time.perf_counter()]
    session = await cluster.connection.create_session(ECHO, max_instances=1)
    times.append(time.perf_counter())
    await session.invoke(PAYLOAD)
    times.append(time.perf_counter())
    await session.close()
    times.append(time.perf_counter())
    return [(after - before) * MS for before, after in pairwise(times)]
