"""MessagePack maps with a version: the one encoding of everything on the wire.

Unknown keys are ignored, so a newer side may add some. A change that an older reader would misunderstand raises
`VERSION`, and readers refuse what is newer than they are.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack

from flame.errors import MalformedMessage, UnsupportedVersion

VERSION: Final = 1

_pack = msgpack.packb
_unpack = msgpack.unpackb


def pack(fields: dict[str, Any]) -> bytes:
    """Encode a map; the caller puts ``v`` in (see `VERSION`)."""
    packed: bytes = _pack(fields)
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """Decode a map and check its version; raise `MalformedMessage` for anything else."""
    try:
        fields = _unpack(data)
    except Exception as error:  # msgpack raises half a dozen unrelated types for bad bytes
        raise MalformedMessage(f"{len(data)} bytes are not MessagePack: {error}") from error
    if type(fields) is not dict:
        raise MalformedMessage(f"expected a MessagePack map, got {type(fields).__name__}")
    version = fields.get("v")
    if version != VERSION:
        _refuse_version(version)
    return fields


def peek(data: bytes) -> dict[str, Any]:
    """Decode a map of any version, for the few things that each of them says the same way; empty if it is none."""
    try:
        fields = _unpack(data)
    except Exception:  # noqa: BLE001  # as above; what can't be read says nothing
        return {}
    return fields if type(fields) is dict else {}


def _refuse_version(version: object) -> None:
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise UnsupportedVersion(f"wire format {version} is newer than {VERSION}, the newest this program speaks")
    if version != VERSION:
        raise MalformedMessage(f"wire format: expected v={VERSION}, got {version!r}")
