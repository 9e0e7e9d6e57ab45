"""How far a task's run is, as it says itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flame.errors import InvalidArgument
from flame.protocol import defaults
from flame.protocol.codec import VERSION, pack
from flame.protocol.fields import frame, read_number, read_text


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a task's run is. What a service told last; steps in between may be left out."""

    done: float
    """How much is done, in a unit of the service's own."""
    total: float | None = None
    """How much there is to do; ``None`` if that isn't known."""
    message: str = ""
    """For people."""
    attempt: int = 1
    """Which run it is: a later one begins anew."""
    executor: str = ""
    """Who runs it."""
    at: float = 0.0
    """When it was told, Unix seconds by the executor's clock."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        fields: dict[str, Any] = {"v": VERSION, "kind": "progress", "done": self.done}
        if self.total is not None:
            fields["total"] = self.total
        if self.message:
            fields["message"] = self.message
        fields |= {"attempt": self.attempt, "executor": self.executor, "at": self.at}
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> Progress:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = frame(data, "progress")
        return cls(
            read_number(fields, "done", 0),
            None if fields.get("total") is None else read_number(fields, "total", 0),
            read_text(fields, "message"),
            read_number(fields, "attempt", 1),
            read_text(fields, "executor"),
            float(read_number(fields, "at", 0.0)),
        )


def check_progress(done: object, total: object, message: object) -> None:
    """Refuse what can be no progress."""
    for name, value in (("done", done), ("total", total)):
        if name == "total" and value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise InvalidArgument(f"progress: {name}: expected a number from 0, got {repr(value)[:60]}")
    if not isinstance(message, str):
        raise InvalidArgument(f"progress: message: expected text, got {type(message).__name__}")
    if len(message) > defaults.PROGRESS_MESSAGE:
        raise InvalidArgument(f"progress: message: {len(message)} characters, the limit is {defaults.PROGRESS_MESSAGE}")
