"""Amounts of cpu, memory and gpu: what a node has and what an executor of a session asks for."""

from __future__ import annotations

import math
import re
from typing import Final, NamedTuple, Self

from flame.errors import InvalidArgument

_UNITS: Final = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_MOST: Final = 2**63 - 1
"""What every language can count to."""
_FORM: Final = "expected cpu=NUMBER,mem=NUMBER[k|m|g|t],gpu=NUMBER, such as cpu=0.5,mem=512m,gpu=1"


class Resources(NamedTuple):
    """An amount of each resource."""

    cpu: float = 0.0
    """Processors; parts are possible."""
    memory: int = 0
    """Bytes."""
    gpu: int = 0
    """Whole devices."""

    @classmethod
    def parse(cls, text: str, default: Self | None = None) -> Self:
        """Read ``cpu=0.5,mem=512m,gpu=1``; what is left out is taken from ``default``.

        Raises `InvalidArgument` that quotes the text and says what was expected.
        """
        values = (default or cls())._asdict()
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, amount = (piece.strip() for piece in part.partition("="))
            key = {"cpu": "cpu", "mem": "memory", "memory": "memory", "gpu": "gpu"}.get(name)
            if not equals or key is None:
                raise InvalidArgument(f"resources {text!r}: {part!r} is not understood; {_FORM}")
            try:
                values[key] = {"cpu": _cpu, "memory": _memory, "gpu": _gpu}[key](amount)
            except (ValueError, OverflowError):
                raise InvalidArgument(f"resources {text!r}: {amount!r} is no amount of {name}; {_FORM}") from None
        return cls(**values).check()

    def check(self) -> Self:
        """Return it if each is an amount, from 0 to 2⁶³ - 1; otherwise raise `InvalidArgument`."""
        for name, amount in self._asdict().items():
            if not 0 <= amount <= _MOST:  # no number at all is not, either
                raise InvalidArgument(f"resources: {amount} is no amount of {name}; {_FORM}")
        return self

    def __str__(self) -> str:
        """Write it as `parse` reads it."""
        cpu = int(self.cpu) if self.cpu == int(self.cpu) else self.cpu
        return f"cpu={cpu},mem={format_bytes(self.memory)},gpu={self.gpu}"

    def fits_in(self, free: Resources) -> bool:
        """Whether ``free`` has at least this much of each."""
        return self.cpu <= free.cpu + 1e-9 and self.memory <= free.memory and self.gpu <= free.gpu

    def plus(self, other: Resources) -> Resources:
        """Return the sum."""
        return Resources(self.cpu + other.cpu, self.memory + other.memory, self.gpu + other.gpu)

    def minus(self, other: Resources) -> Resources:
        """Return the difference; it may be negative."""
        return Resources(self.cpu - other.cpu, self.memory - other.memory, self.gpu - other.gpu)


def format_bytes(amount: int) -> str:
    """Write bytes in the largest unit that divides them, as `Resources.parse` reads them."""
    for unit in ("t", "g", "m", "k"):
        if amount and amount % _UNITS[unit] == 0:
            return f"{amount // _UNITS[unit]}{unit}"
    return str(amount)


def _cpu(text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(text)
    return value


def _memory(text: str) -> int:
    match = _MEMORY.fullmatch(text)
    if match is None:
        raise ValueError(text)
    unit = _UNITS[match[2].lower()]
    return int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)


def _gpu(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value
