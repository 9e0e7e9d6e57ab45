"""What may go wrong on the in-memory broker, and the seed that decides when it does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from flame.errors import ConfigurationError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How likely each fault is, each time it could happen: 0 is never, 1 is always. Delays are in seconds."""

    delay_live: float = 0.0
    """A live message comes late, behind those that were sent after it."""
    longest_delay_s: float = 0.05
    duplicate_live: float = 0.0
    """A live message comes twice."""
    lose_live: float = 0.0
    """A live message, or a bucket's change on its way to a watch, doesn't come. A watch notices and reads again."""
    lose_requests: float = 0.0
    """A request, to the broker or to whoever serves its subject, doesn't arrive: nothing happens, nobody answers."""
    lose_answers: float = 0.0
    """A request is carried out, and its answer doesn't come."""
    lose_stores: float = 0.0
    """A message that should be stored, or a bucket's value, doesn't arrive: `NotAcknowledged`."""
    lose_store_answers: float = 0.0
    """It is stored, and its acknowledgement doesn't come: `NotAcknowledged`."""
    lose_deliveries: float = 0.0
    """A task that was handed out doesn't arrive. It comes again after ``ack_wait``."""
    lose_acknowledgements: float = 0.0
    """What is said about a delivery (finished, extend, hand back) doesn't arrive: it comes again after ``ack_wait``."""
    interrupt: float = 0.0
    """A connection breaks when something is sent. What is under way either way is lost; then it comes back."""
    longest_interruption_s: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no probability and no time."""
        for field in fields(self):
            value = getattr(self, field.name)
            most = float("inf") if field.name.endswith("_s") else 1.0
            if not 0.0 <= value <= most:
                raise ConfigurationError(f"faults: {field.name} is {value!r}, expected 0 to {most:g}")


class Chance:
    """Decides by a seed. What can't happen takes nothing from the seed's sequence."""

    def __init__(self, seed: int, faults: Faults) -> None:
        """Begin the sequence of ``seed``."""
        self._random = random.Random(seed)
        self.faults = faults
        """What may happen from now on."""

    def happens(self, probability: float) -> bool:
        """Tell whether something of this probability happens now."""
        return probability > 0.0 and self._random.random() < probability

    def below(self, most: float) -> float:
        """Return a number between 0 and ``most``."""
        return self._random.random() * most

    def choose(self, items: Sequence[T]) -> T:
        """Return one of them."""
        return items[0] if len(items) == 1 else self._random.choice(items)
