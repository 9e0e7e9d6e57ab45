"""How many tasks a second one session runs."""

from __future__ import annotations

from functools import partial

from benchmarks import measure, targets
from benchmarks.cluster import MappedSession
from benchmarks.contestant import Contestant
from benchmarks.figures import Figure
from benchmarks.scale import PAYLOAD
from benchmarks.stage import Stage

REFERENCE = 2
"""The floor that the target refers to has so many executors."""


async def run(stage: Stage) -> list[Figure]:
    """Measure with each number of executors."""
    return [figure for executors in stage.scale.executors for figure in await _with(stage, executors)]


async def _with(stage: Stage, executors: int) -> list[Figure]:
    scale = stage.scale
    stage.say(f"{scale.tasks} tasks, {executors} executors")
    async with stage.both(executors) as (session, floor):
        contestants: dict[str, Contestant] = {"floor": floor, "flame": session, "map": MappedSession(session)}
        for contestant in contestants.values():
            await measure.warm(contestant, PAYLOAD, scale.warm_up)
        measurement = partial(measure.throughput, data=PAYLOAD, tasks=scale.tasks)
        rounds = await measure.in_turn(contestants, scale.rounds, measurement)
    what = f"{scale.tasks:,} tasks, {executors} executor{'s' if executors > 1 else ''}"
    target = targets.THROUGHPUT if executors == REFERENCE else None
    floored = rounds["floor"].measured("tasks/s")
    return [
        Figure(
            name=f"{what}: create_tasks",
            unit="tasks/s",
            flame=rounds["flame"].measured("tasks/s"),
            floor=floored,
            target=target,
        ),
        Figure(
            name=f"{what}: map, 1,000 in flight",
            unit="tasks/s",
            flame=rounds["map"].measured("tasks/s"),
            floor=floored,
        ),
    ]
