"""What it costs that everything is stored on three servers."""

from __future__ import annotations

from benchmarks.figures import Figure
from benchmarks.jobs import pair
from benchmarks.stage import ECHO, Stage


async def run(stage: Stage) -> list[Figure]:
    """Measure on three servers of this machine: the floor, then Flame, since six would be too many for it."""
    tasks = stage.scale.replicated_tasks
    async with stage.three_servers() as servers:
        stage.say(f"{tasks} tasks on three servers, the floor")
        async with stage.floor_on(servers, pair.EXECUTORS) as floor:
            found = await pair.measured(stage, {"floor": floor}, tasks)
        stage.say(f"{tasks} tasks on three servers, Flame")
        async with stage.flame_on(servers) as cluster, cluster.session(ECHO, executors=pair.EXECUTORS) as session:
            found |= await pair.measured(stage, {"flame": session}, tasks)
    return pair.figures("three servers, three replicas", tasks, found["flame"], found["floor"])
