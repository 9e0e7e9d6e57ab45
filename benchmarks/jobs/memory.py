"""What a session of a service that imports much costs in memory."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from statistics import median
from typing import Final

import psutil

from benchmarks.cluster import FlameCluster
from benchmarks.figures import Figure, Measured
from benchmarks.heavy import heavy_import
from benchmarks.meters import private_bytes
from benchmarks.scale import PAYLOAD
from benchmarks.stage import Stage

_MIB: Final = 1024 * 1024
_EACH: Final = 150 * _MIB
"""What a process may take at most, to be careful."""
_AT_ONCE: Final = 10


async def run(stage: Stage) -> list[Figure]:
    """Measure sessions that are open at the same time, forked and fresh."""
    name = heavy_import()
    wanted = stage.scale.memory_sessions
    sessions = max(1, min(wanted, psutil.virtual_memory().available // _EACH))
    fewer = "" if sessions == wanted else f"; {wanted} would not fit into this machine's memory"
    figures = []
    async with stage.flame() as cluster:
        for way, spec in (("forked", {"warm_instances": 1}), ("fresh", {"fresh_process": True})):
            stage.say(f"{sessions} sessions of a service that imports {name}, {way}")
            await cluster.register(way, "heavy", environments={"BENCHMARK_IMPORT": name}, **spec)
            value, ways = await _private(cluster, way, sessions)
            figures.append(
                Figure(
                    name=f"{sessions} sessions of a service that imports {name}, {way}: private memory of each",
                    unit="MiB",
                    better="lower",
                    flame=value,
                    note=f"{ways}{fewer}",
                )
            )
    return figures


async def _private(cluster: FlameCluster, application: str, sessions: int) -> tuple[Measured, str]:
    """Return what each executor has of its own while all of them have run a task, and how they were started."""
    pids: list[int] = []
    ways: set[str] = set()
    gate = asyncio.Semaphore(_AT_ONCE)
    async with AsyncExitStack() as opened:

        async def open_one() -> None:
            async with gate:
                contestant = await opened.enter_async_context(cluster.session(application, executors=1))
                await contestant.invoke(PAYLOAD)
                (executor,) = await cluster.executors(contestant.session)
                pids.append(executor.pid)
                ways.add(executor.started)

        async with asyncio.TaskGroup() as group:
            for _ in range(sessions):
                group.create_task(open_one())
        values = [private_bytes(pid) / _MIB for pid in pids]
    return Measured(value=median(values), lowest=min(values), highest=max(values)), ", ".join(sorted(ways))
