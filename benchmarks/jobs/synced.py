"""What it costs that every message is on the disk before it is acknowledged."""

from __future__ import annotations

from benchmarks.figures import Figure
from benchmarks.jobs import pair
from benchmarks.stage import Stage


async def run(stage: Stage) -> list[Figure]:
    """Measure with ``sync_interval: always``."""
    tasks = stage.scale.synced_tasks
    stage.say(f"{tasks} tasks with sync_interval: always")
    async with stage.both(pair.EXECUTORS, sync_interval="always") as (session, floor):
        found = await pair.measured(stage, {"floor": floor, "flame": session}, tasks)
    return pair.figures("sync_interval: always", tasks, found["flame"], found["floor"])
