"""What processes use: processor time and memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from benchmarks.contestant import Processes


class CpuMeter:
    """Processor time, user and system, of this process and of others by the part that they play.

    It holds on a noisy machine where wall time doesn't. The kernel counts others' in steps of 10 ms.
    """

    def __init__(self, processes: Processes) -> None:
        """Begin."""
        self._processes = processes
        self._begin = self._read()

    def used_s(self) -> Mapping[str, float]:
        """Return seconds since the beginning, by part."""
        return {part: seconds - self._begin[part] for part, seconds in self._read().items()}

    def per_task_us(self, tasks: int) -> Mapping[str, float]:
        """Return microseconds for each task, by part."""
        return {part: seconds * 1e6 / tasks for part, seconds in self.used_s().items()}

    def _read(self) -> dict[str, float]:
        return {"client": time.process_time()} | {
            part: sum(map(_cpu_s, pids)) for part, pids in self._processes.items()
        }


def _cpu_s(pid: int) -> float:
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def private_bytes(pid: int) -> int:
    """Return the memory that a process shares with no other: what it costs to have it."""
    lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def resident_bytes(pids: list[int]) -> int:
    """Return the resident memory of processes."""
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def file_system(folder: Path) -> str:
    """Return the kind of the file system that holds a folder: in memory, a sync costs nothing."""
    path = os.path.realpath(folder)
    holds = [part for part in psutil.disk_partitions(all=True) if path.startswith(part.mountpoint)]
    return max(holds, key=lambda part: len(part.mountpoint)).fstype if holds else "unknown"
