"""What the size of inputs and outputs costs."""

from __future__ import annotations

from functools import partial
from typing import Final

from benchmarks import measure
from benchmarks.contestant import Contestant
from benchmarks.figures import Figure
from benchmarks.scale import IN_FLIGHT
from benchmarks.stage import Stage
from flame.protocol.defaults import INLINE_LIMIT_BYTES

_EXECUTORS: Final = 2
_SIZES: Final = {"64 B": 64, "10 KB": 10_000, "200 KB": 200_000, "1 MB": 1_000_000}
_IN_PARTS: Final = "over 256 KiB: Flame stores it beside the task and the record; the floor has it in one message"
_WARM_UP: Final = 20
_MOST_BYTES: Final = 200_000_000
"""That the tasks of one measurement carry, each way."""


async def run(stage: Stage) -> list[Figure]:
    """Measure every size, one at a time and in flight."""
    figures: list[Figure] = []
    async with stage.both(_EXECUTORS) as (session, floor):
        for what, length in _SIZES.items():
            data = bytes(length)
            tasks = max(IN_FLIGHT, min(stage.scale.payload_tasks, _MOST_BYTES // length))
            stage.say(f"{tasks} tasks of {what}")
            contestants: dict[str, Contestant] = {"floor": floor, "flame": session}
            for contestant in contestants.values():
                await measure.warm(contestant, data, _WARM_UP)
            rounds = stage.scale.rounds
            turns = await measure.in_turn(contestants, rounds, partial(measure.one_at_a_time, data=data, tasks=tasks))
            in_parts = length > INLINE_LIMIT_BYTES
            figures.append(
                Figure(
                    name=f"{what} there and back, one at a time: p50",
                    unit="ms",
                    better="lower",
                    flame=turns["flame"].measured("p50"),
                    floor=turns["floor"].measured("p50"),
                    note=_IN_PARTS if in_parts else "",
                )
            )
            if in_parts:
                continue  # so many whole ones are more than the server keeps for one connection: it cuts the floor off
            flights = await measure.in_turn(contestants, rounds, partial(measure.in_flight, data=data, tasks=tasks))
            figures.append(
                Figure(
                    name=f"{what} there and back, {IN_FLIGHT} in flight",
                    unit="tasks/s",
                    flame=flights["flame"].measured("tasks/s"),
                    floor=flights["floor"].measured("tasks/s"),
                )
            )
    return figures
