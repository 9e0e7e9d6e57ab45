"""Values checked by the JSON schema that an application publishes: for clients that don't have its types."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from flame.errors import ConfigurationError
from flame.typed.codec import Unfit

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError
    from jsonschema.protocols import Validator

_TEXT: Final = 200
"""How much of a complaint is shown: it may quote the whole value."""
_FAULTS: Final = 10
"""How many complaints are."""


class SchemaCodec:
    """JSON values, of which those that are sent are checked. Without a schema: bytes, which are not."""

    def __init__(self, schema: dict[str, Any], what: str, *, sends: bool) -> None:
        """Take a schema; ``what`` names it in errors. Those that are only read need nothing to check them by.

        Raises:
            ConfigurationError: There is a schema, but nothing to check it by; or it is none.
        """
        self.name = str(schema.get("title", "what the schema says")) if schema else "bytes"
        self._raw = not schema
        self._validator = _validator(schema, what) if schema and sends else None

    def encode(self, value: Any) -> bytes:
        """Return a value as it travels; bytes are taken for JSON text. Raises `Unfit`."""
        if self._validator is None:
            return _plain(value)
        try:
            data = bytes(value) if isinstance(value, bytes | bytearray | memoryview) else _dumped(value)
            read = json.loads(data)
        except (TypeError, ValueError, RecursionError) as error:
            raise Unfit(f"no JSON: {error}") from None
        faults = [_told(error) for error in self._validator.iter_errors(read)]
        if faults:
            more = f"; and {len(faults) - _FAULTS} more" if len(faults) > _FAULTS else ""
            raise Unfit("; ".join(faults[:_FAULTS]) + more)
        return data

    def decode(self, data: bytes) -> Any:
        """Return what travelled. Raises `Unfit`."""
        if self._raw:
            return data
        try:
            return json.loads(data or b"null")
        except (ValueError, RecursionError) as error:
            raise Unfit(f"no JSON: {error}") from None


def codecs(
    application: str, input_schema: dict[str, Any], output_schema: dict[str, Any]
) -> tuple[SchemaCodec, SchemaCodec]:
    """Return how values travel to and from an application that publishes these schemas.

    Raises:
        ConfigurationError: It publishes none, or they can't be checked by.
    """
    if not (input_schema or output_schema):
        raise ConfigurationError(
            f"application {application} publishes no schemas of its inputs and outputs: give their types,"
            " Session.typed(Question, Answer), or use Session.invoke, which takes bytes"
        )
    what = f"application {application}"
    return (
        SchemaCodec(input_schema, f"{what}: input_schema", sends=True),
        SchemaCodec(output_schema, f"{what}: output_schema", sends=False),
    )


def _validator(schema: dict[str, Any], what: str) -> Validator:
    try:
        from jsonschema import Draft202012Validator  # noqa: PLC0415  # an extra, and only for those who need it
        from jsonschema.exceptions import SchemaError  # noqa: PLC0415
        from jsonschema.validators import validator_for  # noqa: PLC0415
    except ImportError:
        raise ConfigurationError(
            f"{what}: checking by it needs a library that is not installed: pip install 'flame-engine[typed]';"
            " or give the types, as in Session.typed(Question, Answer)"
        ) from None
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigurationError(f"{what}: no JSON schema: {error.message[:_TEXT]}") from None
    return kind(schema, format_checker=kind.FORMAT_CHECKER)


def _told(error: ValidationError) -> str:
    """Say which field is wrong, and how."""
    from jsonschema.exceptions import best_match  # noqa: PLC0415

    nearest = best_match([error]) or error  # of several alternatives the one that was probably meant
    text = nearest.message
    text = text if len(text) <= _TEXT else f"{text[:_TEXT]}…"
    where = ".".join(str(part) for part in nearest.absolute_path)
    return f"{where}: {text}" if where else text


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _plain(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise Unfit(f"expected bytes or str, as nothing is said of inputs, got {type(value).__name__}")
