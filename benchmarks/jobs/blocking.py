"""How evenly tasks that block their executor's loop are spread."""

from __future__ import annotations

import time
from typing import Final

from benchmarks import targets
from benchmarks.cluster import FlameCluster
from benchmarks.figures import Figure, Rounds, Sample
from benchmarks.stage import Stage

_APPLICATION: Final = "blocking"
_EXECUTORS: Final = 4
_TASK_S: Final = 0.05


async def run(stage: Stage) -> list[Figure]:
    """Measure executors that know nothing of their tasks yet, in each round new ones."""
    tasks = stage.scale.blocking_tasks
    async with stage.flame() as cluster:
        await cluster.register(_APPLICATION, "blocking", max_instances=_EXECUTORS, warm_instances=1)
        samples = []
        for number in range(stage.scale.rounds):
            stage.say(f"{tasks} tasks of {_TASK_S * 1000:g} ms over {_EXECUTORS} executors, round {number + 1}")
            samples.append(await _round(cluster, tasks))
    return [
        Figure(
            name=f"{tasks} blocking tasks of {_TASK_S * 1000:g} ms over {_EXECUTORS} executors: makespan",
            unit="of ideal",
            better="lower",
            flame=Rounds(samples).measured("makespan"),
            target=targets.SPREAD,
            note=f"ideal {tasks * _TASK_S / _EXECUTORS:g} s",
        ),
        Figure(
            name="the same: tasks of the busiest executor",
            unit="of the mean",
            better="lower",
            flame=Rounds(samples).measured("busiest"),
        ),
    ]


async def _round(cluster: FlameCluster, tasks: int) -> Sample:
    async with cluster.session(_APPLICATION, executors=_EXECUTORS) as contestant:
        begin = time.perf_counter()
        handles = await contestant.session.create_tasks([str(_TASK_S)] * tasks)
        finished = [await handle for handle in handles]
        elapsed_s = time.perf_counter() - begin
    shares: dict[str, int] = {}
    for task in finished:
        shares[task.executor] = shares.get(task.executor, 0) + 1
    return Sample(
        {
            "makespan": elapsed_s / (tasks * _TASK_S / _EXECUTORS),
            "busiest": max(shares.values()) / (tasks / _EXECUTORS),
        }
    )
