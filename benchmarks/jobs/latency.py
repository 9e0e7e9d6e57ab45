"""How long a task takes there and back."""

from __future__ import annotations

from functools import partial

from benchmarks import measure, targets
from benchmarks.contestant import Contestant
from benchmarks.figures import Figure
from benchmarks.scale import IN_FLIGHT, PAYLOAD
from benchmarks.stage import Stage

_EXECUTORS = 2


async def run(stage: Stage) -> list[Figure]:
    """Measure one at a time, and several in flight."""
    scale = stage.scale
    async with stage.both(_EXECUTORS) as (session, floor):
        contestants: dict[str, Contestant] = {"floor": floor, "flame": session}
        for contestant in contestants.values():
            await measure.warm(contestant, PAYLOAD, scale.warm_up)
        stage.say(f"{scale.in_turn} tasks, one at a time")
        turns = await measure.in_turn(
            contestants, scale.rounds, partial(measure.one_at_a_time, data=PAYLOAD, tasks=scale.in_turn)
        )
        stage.say(f"{scale.at_once} tasks, {IN_FLIGHT} in flight")
        flights = await measure.in_turn(
            contestants, scale.rounds, partial(measure.in_flight, data=PAYLOAD, tasks=scale.at_once)
        )
    one, many = "invoke, one at a time", f"invoke, {IN_FLIGHT} in flight"
    return [
        Figure(
            name=f"{name}: {key}",
            unit="ms" if key != "tasks/s" else key,
            better="lower" if key != "tasks/s" else "higher",
            flame=rounds["flame"].measured(key),
            floor=rounds["floor"].measured(key),
            target=target,
        )
        for name, rounds, key, target in (
            (one, turns, "p50", targets.INVOKE_P50),
            (one, turns, "p99", None),
            (many, flights, "p50", None),
            (many, flights, "p99", None),
            (many, flights, "tasks/s", None),
        )
    ]
