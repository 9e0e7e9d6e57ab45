"""How many sessions a second come and go."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from benchmarks import targets
from benchmarks.figures import MS, Figure, percentile, single
from benchmarks.scale import PAYLOAD
from benchmarks.stage import ECHO, Stage

_AT_ONCE: Final = 16
_WARM_UP: Final = 3


async def run(stage: Stage) -> list[Figure]:
    """Create sessions, run one task in each, close them; a bounded number at once."""
    count = stage.scale.short_sessions
    stage.say(f"{count} sessions, {_AT_ONCE} at once")
    left = iter(range(count))
    lives_ms: list[float] = []
    async with stage.flame() as cluster:

        async def live() -> None:
            async with await cluster.connection.create_session(ECHO, max_instances=1) as session:
                await session.invoke(PAYLOAD)

        async def worker() -> None:
            for _ in left:
                begin = time.perf_counter()
                await live()
                lives_ms.append((time.perf_counter() - begin) * MS)

        for _ in range(_WARM_UP):
            await live()
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as workers:
            for _ in range(_AT_ONCE):
                workers.create_task(worker())
        elapsed_s = time.perf_counter() - begin
    what = f"{count:,} short sessions, {_AT_ONCE} at once"
    return [
        Figure(name=what, unit="sessions/s", flame=single(count / elapsed_s), target=targets.SHORT_SESSIONS),
        Figure(name=f"{what}: a whole life, p50", unit="ms", better="lower", flame=single(percentile(lives_ms, 50))),
        Figure(name=f"{what}: a whole life, p99", unit="ms", better="lower", flame=single(percentile(lives_ms, 99))),
    ]
