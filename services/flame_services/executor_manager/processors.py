"""Holding executors to whole processors where no control group shares them out."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

CAN_CONFINE: Final = hasattr(os, "sched_setaffinity")


class Processors:
    """Which executor runs on which processors.

    One that asks for a processor or more is confined to as many, rounded up, those that the fewest others were given.
    One that asks for less than a whole one shares them all, as there is no part of a processor to confine it to.
    """

    def __init__(self, available: Iterable[int]) -> None:
        """Name the processors that executors may run on."""
        self._given: Counter[int] = Counter(dict.fromkeys(available, 0))

    def take(self, cpu: float) -> tuple[int, ...]:
        """Return the processors for an executor that asks for ``cpu``; none: it isn't confined."""
        count = math.ceil(cpu)
        if cpu < 1 or count >= len(self._given):
            return ()
        by_use = sorted(self._given, key=lambda processor: (self._given[processor], processor))
        taken = tuple(sorted(by_use[:count]))
        self._given.update(taken)
        return taken

    def give_back(self, processors: Sequence[int]) -> None:
        """Say that an executor with these is gone."""
        self._given.subtract(processors)


def confine(pids: Iterable[int], processors: Sequence[int]) -> None:
    """Have all threads of some processes, and what they start later, run on these processors only."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread.name), processors)
