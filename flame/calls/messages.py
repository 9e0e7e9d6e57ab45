"""What clients of functions and the service that runs them tell each other. It means nothing to anybody else.

A session's common data says what can be called; the input of a task says what is. Both are MessagePack maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flame.calls.pickling import PYTHON
from flame.errors import InvalidInput, MalformedMessage
from flame.protocol.codec import VERSION, pack, unpack


@dataclass(frozen=True, slots=True)
class Definitions:
    """What a session can be asked to call: functions, or the methods of one object."""

    functions: Mapping[bytes, bytes] = field(default_factory=dict)
    """Pickled functions, by what calls name them by."""
    instance: Call | None = None
    """How the object is made: ``function`` is the pickled class itself."""

    def encode(self) -> bytes:
        """Return the common data."""
        fields: dict[str, Any] = {"v": VERSION}
        if self.functions:
            fields["functions"] = dict(self.functions)
        if self.instance is not None:
            fields["instance"] = self.instance.encode()
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> Definitions:
        """Read common data; a session of nothing yet has none. Raises `MalformedMessage`."""
        if not data:
            return cls()
        fields = unpack(data)
        instance = fields.get("instance")
        return cls(_of_type(fields, "functions", dict), None if instance is None else Call.decode(instance))


@dataclass(slots=True)
class Call:
    """What is to be called, with what."""

    name: str
    """For people; of a method, the one."""
    function: bytes = b""
    """Which function of the session; empty: the method called ``name`` of its object."""
    arguments: bytes = b""
    """Pickled positional and named ones."""
    references: list[str | bytes] = field(default_factory=list)
    """What is put into their places: the output of another task of the session, by its id, or one as it is."""
    incarnation: int = 0
    """Of a method: how often the object has been made, as far as its client knows."""
    python: str = PYTHON
    """The version that the code and the arguments are of."""

    def encode(self) -> bytes:
        """Return the input of a task."""
        fields: dict[str, Any] = {"v": VERSION, "name": self.name, "python": self.python, "arguments": self.arguments}
        if self.function:
            fields["function"] = self.function
        if self.references:
            fields["references"] = self.references
        if self.incarnation:
            fields["incarnation"] = self.incarnation
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> Call:
        """Read the input of a task. Raises `MalformedMessage`."""
        fields = unpack(data)
        return cls(
            _of_type(fields, "name", str),
            _of_type(fields, "function", bytes),
            _of_type(fields, "arguments", bytes),
            _of_type(fields, "references", list),
            _of_type(fields, "incarnation", int),
            _of_type(fields, "python", str),
        )


def _of_type(fields: dict[str, Any], key: str, kind: type[Any]) -> Any:
    value = fields.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise MalformedMessage(f"{key}: expected {kind.__name__}, got {type(value).__name__}")
    return value


class InstanceGone(InvalidInput):
    """Raised by the service: the object that a method was called of is not there any more, and a new one is."""

    def __init__(self, text: str, incarnation: int = 0) -> None:
        """Say how often the object has been made by now."""
        super().__init__(text, incarnation)
        self.incarnation = incarnation

    def __str__(self) -> str:
        """Return the text."""
        return str(self.args[0])
