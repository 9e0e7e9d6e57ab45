"""What is announced live when something of the cluster changes: one event a transition, with its reason.

Published by the scheduler that plans; whoever misses one finds the present state through the control API. Tasks have
events of their own, see `flame.protocol.subjects.event`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final

from flame.errors import MalformedMessage
from flame.protocol.codec import VERSION, pack, unpack


class Noun(StrEnum):
    """What an event is about."""

    APPLICATION = "application"
    SESSION = "session"
    EXECUTOR = "executor"
    NODE = "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """That something is in another state, or that a session waits for something else."""

    noun: Noun
    id: str
    event: str
    """What happened: the new state, ``waiting`` where a session lacks executors, ``retrying`` after one failed."""
    state: str
    """What it is in now."""
    before: str = ""
    """What it was in before; empty for something new."""
    at: float = 0.0
    """Unix seconds, by the clock of whoever made the change."""
    application: str = ""
    session: str = ""
    node: str = ""
    code: str = ""
    """An `flame.protocol.codes.ReasonCode`, where there is a reason."""
    reason: str = ""
    record: bytes = b""
    """Of a session: its record, as in the bucket."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        told = {
            name: str(value) if isinstance(value, StrEnum) else value
            for name in _FIELDS
            if (value := getattr(self, name)) or name in _ALWAYS
        }
        return pack({"v": VERSION, "kind": "event", **told})

    @classmethod
    def decode(cls, data: bytes) -> ClusterEvent:
        """Read one; raise `MalformedMessage` if it is none."""
        found: dict[str, Any] = unpack(data)
        if found.get("kind") != "event":
            raise MalformedMessage(f"expected an event, got {found.get('kind')!r}")
        known = {name: found[name] for name in _FIELDS if name in found}
        for name, value in known.items():
            if not isinstance(value, _TYPES.get(name, str)):
                raise MalformedMessage(f"event: {name}: expected {_TYPES.get(name, str)}, got {type(value).__name__}")
        try:
            return cls(**{**known, "noun": Noun(known["noun"])})
        except (TypeError, KeyError, ValueError) as error:
            raise MalformedMessage(f"event: {error}") from None


_FIELDS: Final = tuple(field.name for field in fields(ClusterEvent))
_ALWAYS: Final = frozenset({"noun", "id", "event", "state"})
_TYPES: Final[dict[str, Any]] = {"at": (int, float), "record": bytes}
