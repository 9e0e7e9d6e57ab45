"""Other systems, each by a program of ``benchmarks/peers`` and whichever interpreter has it installed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from statistics import median
from typing import Final

import psutil

from benchmarks import measure
from benchmarks.cluster import FlameCluster
from benchmarks.figures import MS, Peer
from benchmarks.scale import PAYLOAD
from benchmarks.stage import ECHO, Stage

_PROGRAMS: Final = {"Ray actor": "ray_actor.py", "Dask actor": "dask_actor.py"}
_FOLDER: Final = Path(__file__).parents[1] / "peers"
_NEW: Final = 5
"""New sessions; the programs make as many actors."""
_NOT_INSTALLED: Final = 3
"""The status with which a program ends whose system is not there."""


async def run(stage: Stage) -> list[Peer]:
    """Measure Flame with one executor, then whoever is installed."""
    stage.say("Flame")
    peers = [await _flame(stage)]
    for name, program in _PROGRAMS.items():
        stage.say(name)
        peers.append(await _peer(stage, name, _FOLDER / program))
    return peers


async def _flame(stage: Stage) -> Peer:
    scale = stage.scale
    async with stage.flame() as cluster:
        first_ms = [await _first_result_ms(cluster) for _ in range(1 + _NEW)]
        async with cluster.session(ECHO, executors=1) as contestant:
            await measure.warm(contestant, PAYLOAD, scale.warm_up)
            turns = await measure.one_at_a_time(contestant, PAYLOAD, scale.in_turn)
            many = await measure.throughput(contestant, PAYLOAD, scale.peer_tasks)
    return Peer(
        name="Flame",
        invoke_p50_ms=turns.values["p50"],
        invoke_p99_ms=turns.values["p99"],
        tasks_per_s=many.values["tasks/s"],
        first_result_ms=median(first_ms[1:]),  # the first one has waited for its template
        note="stored before it runs, with its result",
    )


async def _first_result_ms(cluster: FlameCluster) -> float:
    begin = time.perf_counter()
    async with await cluster.connection.create_session(ECHO, max_instances=1) as session:
        await session.invoke(PAYLOAD)
        return (time.perf_counter() - begin) * MS


async def _peer(stage: Stage, name: str, program: Path) -> Peer:
    scale = stage.scale
    sizes = ("--tasks", str(scale.peer_tasks), "--in-turn", str(scale.in_turn), "--warm-up", str(scale.warm_up))
    process = await asyncio.create_subprocess_exec(
        stage.peers_python,
        str(program),
        *sizes,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = await process.communicate()
    finally:
        await _end(process)
    if process.returncode == _NOT_INSTALLED:
        return Peer(name=name, note="not installed")
    if process.returncode:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        return Peer(name=name, note=f"failed: {last[:120]}")
    return Peer(name=name, **json.loads(output.decode().strip().rpartition("\n")[2]))


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a program that was interrupted, with the daemons that it started."""
    if process.returncode is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        program = psutil.Process(process.pid)
        for each in (program, *program.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    await process.wait()
