"""What is announced live when something of the cluster changes: one event a transition, with its reason.

The scheduler that plans publishes each once, when it has learnt of the change and so after the record in the bucket was
written. Nobody keeps them: whoever misses one finds the present state through the control API, as with changes that
were made while no scheduler planned. Two changes that follow each other at once may be told as one; ``before`` says so.
A scheduler that begins to plan repeats nothing, but judges anew which nodes live and what sessions wait for.

Those of sessions and executors are published on `subjects.session_events`, of nodes on `subjects.node_events`, of
applications on `subjects.application_events`. Tasks have notifications of their own, see `subjects.event`. In all of
them ``event`` is the new ``state``, or:

- *application*: ``updated``, it has another specification; ``removed``, it was unregistered and has no state any more.
- *session*: ``waiting``, it has fewer executors than it could use, for a ``reason`` that is new, or empty once it waits
  for nothing any more. ``retrying``, ``executor`` on ``node`` could not enter it: ``reason`` and ``code`` say why,
  which of how many attempts that was, and when the next one is. ``settled``, every task of a failed one has its
  record; one that is closed is ``closed`` only then. ``removed``, its record went with its results. ``closing`` comes
  again if it is to be closed with a mode that goes further. Every one but ``removed`` has the session's ``record``.
- *executor*: none. ``released`` has a ``reason`` and a ``code`` if it did not end as it was told to.
- *node*: ``stopping``, it is still ready, but nothing new is placed there; ``removed``, it has signed off.
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
    TASK = "task"
    """Never published as such: clients make it out of a task's own notifications."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterEvent:
    """That something is in another state, or that a session waits for something else."""

    noun: Noun
    id: str
    event: str
    """What happened: the new state, or what this module says."""
    state: str
    """What it is in now; empty for something that was removed."""
    before: str = ""
    """What it was in before; empty for something new."""
    at: float = 0.0
    """Unix seconds, by the clock of whoever made the change."""
    application: str = ""
    session: str = ""
    node: str = ""
    executor: str = ""
    """Of a task: who runs or ran it; of a session that is tried again: who failed."""
    code: str = ""
    """An `flame.protocol.codes.ReasonCode`, where there is a reason; of a task an `flame.protocol.codes.ErrorCode`."""
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
