"""How long a session takes from its order to its first result."""

from __future__ import annotations

import time
from typing import Final

from benchmarks import targets
from benchmarks.cluster import FlameCluster
from benchmarks.figures import MS, Figure, percentile, single
from benchmarks.heavy import heavy_import
from benchmarks.scale import PAYLOAD
from benchmarks.stage import ECHO, Stage

_FRESH: Final = "fresh"
_HEAVY: Final = "heavy"
_HEAVY_FRESH: Final = "heavy-fresh"
_WARM_UP: Final = 3


async def run(stage: Stage) -> list[Figure]:
    """Measure a small service and one that imports much, each forked and fresh."""
    scale = stage.scale
    name = heavy_import()
    async with stage.flame() as cluster:
        imports = {"BENCHMARK_IMPORT": name}
        await cluster.register(_FRESH, "echo", fresh_process=True)
        await cluster.register(_HEAVY, "heavy", environments=imports, warm_instances=1)
        await cluster.register(_HEAVY_FRESH, "heavy", environments=imports, fresh_process=True)
        return [
            *await _figures(stage, cluster, ECHO, "small service", scale.creations, targeted=True),
            *await _figures(stage, cluster, _FRESH, "small service", scale.creations),
            *await _figures(stage, cluster, _HEAVY, f"service that imports {name}", scale.creations, targeted=True),
            *await _figures(stage, cluster, _HEAVY_FRESH, f"service that imports {name}", scale.heavy_creations),
        ]


async def _figures(
    stage: Stage, cluster: FlameCluster, application: str, what: str, sessions: int, *, targeted: bool = False
) -> list[Figure]:
    stage.say(f"{sessions} sessions of {application}")
    for _ in range(_WARM_UP):
        await _first_result_ms(cluster, application)
    times_ms, ways = [], set()
    for _ in range(sessions):
        time_ms, way = await _first_result_ms(cluster, application)
        times_ms.append(time_ms)
        ways.add(way)
    way = ", ".join(sorted(ways))
    return [
        Figure(
            name=f"session to first result, {what}, {'fresh' if not targeted else 'from its template'}: p{percent}",
            unit="ms",
            better="lower",
            flame=single(percentile(times_ms, percent)),
            target=target if targeted else None,
            note=f"of {sessions}; {way}",
        )
        for percent, target in ((50, targets.FIRST_RESULT_P50), (99, targets.FIRST_RESULT_P99))
    ]


async def _first_result_ms(cluster: FlameCluster, application: str) -> tuple[float, str]:
    """Return how long one session took, and how its executor was started."""
    begin = time.perf_counter()
    session = await cluster.connection.create_session(application, max_instances=1)
    await session.invoke(PAYLOAD)
    elapsed_ms = (time.perf_counter() - begin) * MS
    (executor,) = await cluster.bound(session, 1)
    await session.close()
    return elapsed_ms, executor.started
