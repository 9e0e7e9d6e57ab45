"""How much memory processes use, as far as it is their own."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Final, NamedTuple, Self

import psutil

_PROC: Final = Path("/proc")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_FIELD: Final = re.compile(
    rb"^(Pss|SwapPss|Private_Clean|Private_Dirty|Shared_Clean|Shared_Dirty):\s+(\d+)", re.MULTILINE
)


class Footprint(NamedTuple):
    """What some processes have in memory, in bytes."""

    proportional: int = 0
    """A page that several processes share counts for each of them in part."""
    private: int = 0
    """Pages that are one process's alone."""
    shared: int = 0
    """Pages that others have too, each in full."""

    def plus(self, other: Self) -> Footprint:
        """Return the sum."""
        return Footprint(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def used(self, inherited: int) -> int:
        """Return what counts as used, ``inherited`` bytes of which came from a template.

        Those don't count as long as they are shared. What the processes share among one another counts once.
        """
        return max(self.private, self.proportional - inherited)


def footprint(pids: Iterable[int]) -> Footprint:
    """Measure some processes; those that are gone count nothing. Takes milliseconds for each gigabyte."""
    total = Footprint()
    for pid in pids:
        total = total.plus(_footprint(pid))
    return total


def _footprint(pid: int) -> Footprint:
    try:
        text = (_PROC / str(pid) / "smaps_rollup").read_bytes()
    except OSError:  # gone, not ours to look at, or no Linux
        size = resident([pid])
        return Footprint(size, size)
    found = {name: int(kilobytes) * 1024 for name, kilobytes in _FIELD.findall(text)}
    return Footprint(
        found.get(b"Pss", 0) + found.get(b"SwapPss", 0),
        found.get(b"Private_Clean", 0) + found.get(b"Private_Dirty", 0),
        found.get(b"Shared_Clean", 0) + found.get(b"Shared_Dirty", 0),
    )


def resident(pids: Iterable[int]) -> int:
    """Return what some processes have in memory if nothing of it was shared: cheap to learn, and never too little.

    Memory that was swapped out isn't in it.
    """
    total = 0
    for pid in pids:
        try:
            total += int((_PROC / str(pid) / "statm").read_bytes().split()[1]) * _PAGE
        except OSError:
            with contextlib.suppress(psutil.Error):
                total += 0 if _PROC.joinpath("self").exists() else psutil.Process(pid).memory_info().rss
    return total


def members(leaders: Container[int]) -> dict[int, list[int]]:
    """Return the processes of each group, or session, that is led by one of ``leaders``."""
    found: dict[int, list[int]] = {}
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            leader = os.getpgid(pid)
            if leader not in leaders:
                leader = os.getsid(pid)
            if leader in leaders:
                found.setdefault(leader, []).append(pid)
    return found
