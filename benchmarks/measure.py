"""The measurements that Flame and the floor go through alike."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Mapping

from benchmarks.contestant import Contestant
from benchmarks.figures import MS, Rounds, Sample, percentile
from benchmarks.meters import CpuMeter
from benchmarks.scale import IN_FLIGHT

Measurement = Callable[[Contestant], Awaitable[Sample]]


async def in_turn(contestants: Mapping[str, Contestant], rounds: int, measurement: Measurement) -> dict[str, Rounds]:
    """Measure all of them in each round: what disturbs the machine for a while disturbs all."""
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            gc.collect()
            samples[name].append(await measurement(contestant))
    return {name: Rounds(taken) for name, taken in samples.items()}


async def warm(contestant: Contestant, data: bytes, tasks: int) -> None:
    """Run tasks until everything has been used once, and check that they return their input."""
    for _ in range(tasks):
        if await contestant.invoke(data) != data:
            raise RuntimeError("a task did not return its input")


async def throughput(contestant: Contestant, data: bytes, tasks: int) -> Sample:
    """Store many tasks at once and wait for all."""
    inputs = [data] * tasks
    meter = CpuMeter(contestant.processes())
    begin = time.perf_counter()
    await contestant.run_all(inputs)
    elapsed_s = time.perf_counter() - begin
    return Sample({"tasks/s": tasks / elapsed_s}, meter.per_task_us(tasks))


async def one_at_a_time(contestant: Contestant, data: bytes, tasks: int) -> Sample:
    """Invoke a task, wait for it, invoke the next."""
    meter = CpuMeter(contestant.processes())
    latencies_ms = []
    for _ in range(tasks):
        begin = time.perf_counter()
        await contestant.invoke(data)
        latencies_ms.append((time.perf_counter() - begin) * MS)
    return Sample(_summary(latencies_ms), meter.per_task_us(tasks))


async def in_flight(contestant: Contestant, data: bytes, tasks: int) -> Sample:
    """Keep `IN_FLIGHT` tasks under way."""
    left = iter(range(tasks))
    latencies_ms = []

    async def worker() -> None:
        for _ in left:
            begin = time.perf_counter()
            await contestant.invoke(data)
            latencies_ms.append((time.perf_counter() - begin) * MS)

    meter = CpuMeter(contestant.processes())
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as workers:
        for _ in range(IN_FLIGHT):
            workers.create_task(worker())
    elapsed_s = time.perf_counter() - begin
    return Sample(_summary(latencies_ms) | {"tasks/s": tasks / elapsed_s}, meter.per_task_us(tasks))


def _summary(latencies_ms: list[float]) -> dict[str, float]:
    return {"p50": percentile(latencies_ms, 50), "p99": percentile(latencies_ms, 99)}
