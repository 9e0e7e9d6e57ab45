"""How many tasks an executor takes at once: a function of how long they take."""

from __future__ import annotations

from typing import Final

MOST: Final = 256
"""Tasks in a burst at most."""
TARGET_S: Final = 0.02
"""The work that an executor may hold back from the others of its session."""
SLOW_S: Final = 0.05
"""A task this long is never taken together with another."""
_WEIGHT: Final = 0.3


class ServiceTime:
    """Keeps how long tasks take, quick to believe that they have become slow."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self.mean_s: float | None = None
        self.last_s = 0.0

    def note(self, elapsed_s: float, tasks: int = 1) -> None:
        """Learn from ``tasks`` that took ``elapsed_s`` together."""
        each = elapsed_s / tasks
        self.last_s = each
        if self.mean_s is None or each > self.mean_s:
            self.mean_s = each
        else:
            self.mean_s += _WEIGHT * (each - self.mean_s)

    def burst(self, concurrency: int) -> int:
        """Return how many tasks to take when none is held."""
        return burst_size(self.mean_s, self.last_s, concurrency)


def burst_size(mean_s: float | None, last_s: float, concurrency: int) -> int:
    """Return how many tasks to take: one for each that can run at once, more only of very short ones."""
    if mean_s is None or last_s >= SLOW_S:
        return concurrency
    return max(concurrency, min(MOST, int(TARGET_S / max(mean_s, 1e-6))))
