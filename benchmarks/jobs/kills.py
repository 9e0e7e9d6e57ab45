"""How long a task is away when its executor dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks import targets
from benchmarks.cluster import FlameCluster
from benchmarks.figures import MS, Figure, Target, percentile, single
from benchmarks.stage import Stage

_APPLICATION: Final = "holding"


class Bell:
    """A socket that services tell of each task that they start."""

    def __init__(self, path: Path) -> None:
        """Listen; the path must be short."""
        self.path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(self.path)

    async def next(self) -> tuple[int, float]:
        """Return the process that started a task, and when, by the clock that all processes share."""
        # Not sock_recv: uvloop has it for streams alone.
        loop = asyncio.get_running_loop()
        rung = asyncio.Event()
        loop.add_reader(self._socket, rung.set)
        try:
            await rung.wait()
        finally:
            loop.remove_reader(self._socket)
        pid, at = self._socket.recv(128).decode().split()
        return int(pid), float(at)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        Path(self.path).unlink()


@contextmanager
def _bell(path: Path) -> Iterator[Bell]:
    bell = Bell(path)
    try:
        yield bell
    finally:
        bell.close()


async def run(stage: Stage) -> list[Figure]:
    """Kill executors in the middle of a task, with another one waiting and without."""
    async with stage.flame() as cluster:
        await cluster.register(_APPLICATION, "holding", warm_instances=1)
        with _bell(stage.folder / "bell") as bell:
            return [
                *await _figures(stage, cluster, bell, 2, "another executor of the session", targets.KILLED_TO_OTHER),
                *await _figures(stage, cluster, bell, 1, "a new executor", targets.KILLED_TO_NEW),
            ]


async def _figures(
    stage: Stage, cluster: FlameCluster, bell: Bell, executors: int, where: str, target: Target
) -> list[Figure]:
    kills = stage.scale.kills
    stage.say(f"{kills} kills, each task goes to {where}")
    gaps_ms = [await _gap_ms(cluster, bell, executors) for _ in range(kills)]
    name = f"killed in a task → it runs on {where}"
    return [
        Figure(
            name=f"{name}: p50",
            unit="ms",
            better="lower",
            flame=single(percentile(gaps_ms, 50)),
            target=target,
            note=f"of {kills}",
        ),
        Figure(name=f"{name}: max", unit="ms", better="lower", flame=single(max(gaps_ms)), note=f"of {kills}"),
    ]


async def _gap_ms(cluster: FlameCluster, bell: Bell, executors: int) -> float:
    """Return the time between the death of a task's executor and the next start of the task."""
    async with cluster.session(_APPLICATION, executors=executors) as contestant:
        handle = await contestant.session.create_task(bell.path)
        first, _ = await bell.next()
        killed = time.monotonic()
        os.kill(first, signal.SIGKILL)
        second, started = await bell.next()
        if second == first:
            raise RuntimeError("a killed executor has started a task")
        await handle
        return (started - killed) * MS
