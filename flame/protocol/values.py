"""Values that are too large for a message: where their parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flame.errors import MalformedMessage, PayloadTooLarge
from flame.protocol import defaults, subjects
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.fields import read_bytes, read_number, read_text


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRef:
    """Names a value of a session that is stored in parts, on the subjects that `subjects.blob` builds.

    It doesn't say of which session: whoever holds it looks in its own.
    """

    id: str
    """A token that no other value of the session has."""
    size: int
    """Bytes, of all parts together."""
    parts: int
    """How many there are, numbered from 0."""
    digest: bytes = b""
    """The SHA-256 of the value, where values are compared: of common data. Otherwise empty."""

    def fields(self) -> dict[str, Any]:
        """Return the map on the wire."""
        fields: dict[str, Any] = {"id": self.id, "size": self.size, "parts": self.parts}
        if self.digest:
            fields["digest"] = self.digest
        return fields

    @classmethod
    def from_fields(cls, fields: object) -> ValueRef:
        """Read one from the map on the wire; raise `MalformedMessage` if it is none, or of more than may be."""
        if not isinstance(fields, dict):
            raise MalformedMessage(f"reference: expected a map, got {type(fields).__name__}")
        # What it says becomes part of subjects, and is what is reserved in memory: nothing may slip through here.
        ref = cls(
            id=read_text(fields, "id"),
            size=read_number(fields, "size", 0),
            parts=read_number(fields, "parts", 0),
            digest=read_bytes(fields, "digest"),
        )
        if not subjects.is_token(ref.id):
            raise MalformedMessage(f"reference: id: {ref.id[:60]!r} is no token")
        if type(ref.size) is not int or not 0 < ref.size <= defaults.VALUE_LIMIT_BYTES:
            raise MalformedMessage(f"reference: size: expected 1 to {defaults.VALUE_LIMIT_BYTES}, got {ref.size}")
        if type(ref.parts) is not int or not 0 < ref.parts <= ref.size:
            raise MalformedMessage(f"reference: parts: expected 1 to {ref.size}, got {ref.parts}")
        return ref

    def encode(self) -> bytes:
        """Return the bytes in a bucket."""
        return pack({"v": VERSION, **self.fields()})

    @classmethod
    def decode(cls, data: bytes) -> ValueRef:
        """Read one from a bucket; raise `MalformedMessage` if it is none."""
        return cls.from_fields(unpack(data))


def check_size(what: str, size: int) -> None:
    """Refuse what no value may hold, naming the limit, by `PayloadTooLarge`."""
    if size > defaults.VALUE_LIMIT_BYTES:
        raise PayloadTooLarge(
            f"{what} of {size:,} bytes: the limit is {defaults.VALUE_LIMIT_BYTES:,}; pass a reference to larger data"
            " instead"
        )
