"""Reading the fields of a message: what has another type than it should is no message."""

from __future__ import annotations

from typing import Any

from flame.errors import MalformedMessage
from flame.protocol.codec import unpack


def frame(data: bytes, kind: str) -> dict[str, Any]:
    """Return the fields of a message of some kind."""
    fields = unpack(data)
    if fields.get("kind") != kind:
        raise MalformedMessage(f"expected a {kind}, got {fields.get('kind')!r}")
    return fields


def read_bytes(fields: dict[str, Any], key: str) -> bytes:
    """Return a field of bytes; none if it is absent."""
    value = fields.get(key, b"")
    if type(value) is not bytes:
        raise MalformedMessage(f"{key}: expected bytes, got {type(value).__name__}")
    return value


def read_text(fields: dict[str, Any], key: str) -> str:
    """Return a field of text; none if it is absent."""
    value = fields.get(key, "")
    if type(value) is not str:
        raise MalformedMessage(f"{key}: expected text, got {type(value).__name__}")
    return value


def read_number(fields: dict[str, Any], key: str, default: Any) -> Any:
    """Return a field that is a number."""
    value = fields.get(key, default)
    if type(value) is not int and type(value) is not float:
        raise MalformedMessage(f"{key}: expected a number, got {type(value).__name__}")
    return value
