"""Throughput and latency beside the floor, for a broker that is run in another way."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks import measure
from benchmarks.contestant import Contestant
from benchmarks.figures import Figure, Rounds
from benchmarks.scale import PAYLOAD
from benchmarks.stage import Stage

EXECUTORS = 2
_PART = 10
"""One at a time it is a tenth of the tasks."""


async def measured(stage: Stage, contestants: Mapping[str, Contestant], tasks: int) -> dict[str, tuple[Rounds, Rounds]]:
    """Measure throughput and latency of each."""
    turns = max(10, min(stage.scale.in_turn, tasks // _PART))
    for contestant in contestants.values():
        await measure.warm(contestant, PAYLOAD, min(stage.scale.warm_up, turns))
    rounds = stage.scale.rounds
    throughput = await measure.in_turn(contestants, rounds, partial(measure.throughput, data=PAYLOAD, tasks=tasks))
    latency = await measure.in_turn(contestants, rounds, partial(measure.one_at_a_time, data=PAYLOAD, tasks=turns))
    return {name: (throughput[name], latency[name]) for name in contestants}


def figures(what: str, tasks: int, flame: tuple[Rounds, Rounds], floor: tuple[Rounds, Rounds]) -> list[Figure]:
    """Return the lines."""
    (throughput, latency), (floor_throughput, floor_latency) = flame, floor
    return [
        Figure(
            name=f"{what}: {tasks:,} tasks, {EXECUTORS} executors",
            unit="tasks/s",
            flame=throughput.measured("tasks/s"),
            floor=floor_throughput.measured("tasks/s"),
        ),
        *(
            Figure(
                name=f"{what}: invoke, one at a time: {key}",
                unit="ms",
                better="lower",
                flame=latency.measured(key),
                floor=floor_latency.measured(key),
            )
            for key in ("p50", "p99")
        ),
    ]
