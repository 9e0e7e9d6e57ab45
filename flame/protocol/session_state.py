"""What an executor and its manager say of the session's state: values by key, which end with the session."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from flame.errors import MalformedMessage
from flame.protocol.codec import VERSION, pack, peek
from flame.protocol.fields import frame
from flame.protocol.messages import TaskFault

REQUEST: Final = "state"
ANSWER: Final = "state_answer"


class StateVerb(StrEnum):
    """What can be asked of a session's state."""

    GET = "get"
    PUT = "put"
    DELETE = "delete"
    KEYS = "keys"


@dataclass(slots=True)
class StateRequest:
    """Asks for something of the state of the session that the executor serves. Sent where it reports."""

    verb: StateVerb
    key: str = ""
    """Which value; with `StateVerb.KEYS`: what the keys asked for begin with."""
    value: bytes = b""
    expected: int | None = None
    """Change it only if it has this revision; 0: if there is none. ``None``: whatever there is."""
    again: bool = False
    """It was asked before and no answer came: it may have been done."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        fields: dict[str, Any] = {"v": VERSION, "kind": REQUEST, "verb": self.verb.value, "key": self.key}
        if self.value:
            fields["value"] = self.value
        if self.expected is not None:
            fields["expected"] = self.expected
        if self.again:
            fields["again"] = True
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> StateRequest:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = frame(data, REQUEST)
        try:
            verb = StateVerb(str(fields.get("verb")))
        except ValueError:
            raise MalformedMessage(f"state: {fields.get('verb')!r} is no verb") from None
        key, value, expected = fields.get("key", ""), fields.get("value", b""), fields.get("expected")
        if type(key) is not str or type(value) is not bytes or not (expected is None or type(expected) is int):
            raise MalformedMessage("state: expected a key that is text, a value in bytes, a whole number for expected")
        return cls(verb, key, value, expected, bool(fields.get("again")))


@dataclass(slots=True)
class StateAnswer:
    """What came of it."""

    value: bytes | None = None
    """``None``: there is none."""
    revision: int = 0
    """Of the value that was read or written; 0 if there is none."""
    keys: tuple[str, ...] = ()
    error: TaskFault | None = None
    """Why it was refused. Nothing was changed then."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        fields: dict[str, Any] = {"v": VERSION, "kind": ANSWER}
        if self.value is not None:
            fields["value"] = self.value
        if self.revision:
            fields["revision"] = self.revision
        if self.keys:
            fields["keys"] = list(self.keys)
        if self.error is not None:
            fields["error"] = self.error.fields()
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> StateAnswer:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = frame(data, ANSWER)
        value, revision, keys = fields.get("value"), fields.get("revision", 0), fields.get("keys", ())
        if (
            not (value is None or type(value) is bytes)
            or type(revision) is not int
            or not isinstance(keys, list | tuple)
        ):
            raise MalformedMessage("state: expected a value in bytes, a revision and a list of keys")
        return cls(value, revision, tuple(str(key) for key in keys), TaskFault.from_fields(fields.get("error")))


def is_state_request(data: bytes) -> bool:
    """Whether what came where executors report is about the state."""
    return peek(data).get("kind") == REQUEST
