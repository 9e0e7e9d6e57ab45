"""What a run finds out: figures with their targets. Values and their arithmetic, nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final, Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a figure has to reach. Each bound counts unless it is ``None``."""

    at_least: float | None = None
    at_most: float | None = None
    ratio_at_least: float | None = None
    """Of Flame's value to the floor's."""
    ratio_at_most: float | None = None

    def text(self) -> str:
        """Write it as the table shows it."""
        bounds = (
            ("≥ {:g} of floor", self.ratio_at_least),
            ("≤ {:g} of floor", self.ratio_at_most),
            ("≥ {:,g}", self.at_least),
            ("≤ {:,g}", self.at_most),
        )
        return ", ".join(form.format(bound) for form, bound in bounds if bound is not None)

    def met(self, flame: float, floor: float | None) -> bool | None:
        """Tell whether it is reached; ``None`` if that takes a floor and there is none."""
        ratio = None if not floor else flame / floor
        if ratio is None and (self.ratio_at_least is not None or self.ratio_at_most is not None):
            return None
        return _within(flame, self.at_least, self.at_most) and _within(
            ratio or 0.0, self.ratio_at_least, self.ratio_at_most
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A value, from one round or the median of several."""

    value: float
    lowest: float
    highest: float
    cpu_us: Mapping[str, float] = field(default_factory=dict)
    """Microseconds of processor time for each task, by part: client, broker, executors, control."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A line of the table."""

    name: str
    unit: str
    better: Better = "higher"
    flame: Measured | None = None
    """``None``: not available, and ``note`` says why."""
    floor: Measured | None = None
    target: Target | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Flame's value to the floor's."""
        if self.flame is None or self.floor is None or not self.floor.value:
            return None
        return self.flame.value / self.floor.value

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; ``None`` if there is none, or nothing to compare."""
        if self.flame is None or self.target is None:
            return None
        return self.target.met(self.flame.value, None if self.floor is None else self.floor.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What another system does with a task that does nothing. ``None``: not measured."""

    name: str
    version: str = ""
    invoke_p50_ms: float | None = None
    invoke_p99_ms: float | None = None
    tasks_per_s: float | None = None
    first_result_ms: float | None = None
    """From nothing to the first result of a new session or actor."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one round has measured."""

    values: Mapping[str, float]
    cpu_us: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rounds:
    """What several rounds have measured. Median, since one disturbance must not decide."""

    samples: Sequence[Sample]

    def measured(self, key: str) -> Measured:
        """Return one of the values."""
        values = [sample.values[key] for sample in self.samples]
        parts = self.samples[0].cpu_us
        cpu = {part: median(sample.cpu_us[part] for sample in self.samples) for part in parts}
        return Measured(value=median(values), lowest=min(values), highest=max(values), cpu_us=cpu)


def single(value: float) -> Measured:
    """Return a value that was measured once."""
    return Measured(value=value, lowest=value, highest=value)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that ``percent`` of the values are not above."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


MS: Final = 1000.0
"""Milliseconds in a second."""
