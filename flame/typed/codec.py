"""A Python type on the wire: JSON, as pydantic reads and writes it; bytes stay what they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Final, Generic, Literal, Protocol, TypeVar, get_args

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from flame.errors import ConfigurationError, InvalidInput
from flame.protocol.records import explain

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741  # what a service takes
O = TypeVar("O")  # noqa: E741  # what it returns
T_co = TypeVar("T_co", covariant=True)

_NULL: Final = b"null"


class Unfit(Exception):
    """A value, or bytes, are not what a type says; the text names every wrong field."""


class NotDefined(ConfigurationError):
    """A type names another one that is not defined, or not yet."""


class Coder(Protocol[T_co]):
    """How values travel."""

    @property
    def name(self) -> str:
        """What people call the values."""

    def encode(self, value: Any) -> bytes:
        """Return a value as it travels. Raises `Unfit`."""

    def decode(self, data: bytes) -> T_co:
        """Return what travelled. Raises `Unfit`."""


class Contract(ABC, Generic[I, O]):
    """Something that says of which types the inputs and outputs of a service are, such as an entrypoint."""

    @abstractmethod
    def codecs(self) -> tuple[Codec[I], Codec[O]]:
        """Return how they travel. Raises `ConfigurationError` if they can't."""


class Codec(Generic[T]):
    """How values of one type travel: a pydantic model, a dataclass, a `TypedDict`, or what else JSON can hold.

    ``bytes`` itself is sent as it is. No bytes at all are read as JSON's ``null``, so that a task without an input is
    one for a service that takes ``None``.
    """

    def __init__(self, kind: Any, what: str) -> None:
        """Take a type; ``what`` names it in errors.

        Raises:
            ConfigurationError: It is none that JSON can hold.
        """
        self.kind = kind
        self.name = type_name(kind)
        self.raw = kind is bytes
        try:
            self._adapter: TypeAdapter[T] | None = None if self.raw else TypeAdapter(kind)
            if self._adapter is not None:
                self._adapter.rebuild()  # names that it refers to, and that are not there, are found now
        except NameError as error:
            raise NotDefined(f"{what}: {self.name} names what is not there: {error}") from None
        except (PydanticUserError, TypeError, ValueError) as error:  # the last two: what is no type at all
            reason = str(error).partition("\n")[0]
            raise ConfigurationError(f"{what}: {self.name} can't be sent as JSON: {reason}") from None

    def encode(self, value: object) -> bytes:
        """Return a value as it travels. Raises `Unfit`.

        What pydantic takes for the type is taken: a dict for a model, ``"1"`` for a number.
        """
        if self._adapter is None:
            if isinstance(value, bytes | bytearray | memoryview):
                return bytes(value)
            raise Unfit(f"expected bytes, got {type(value).__name__}")
        try:
            return self._adapter.dump_json(self._adapter.validate_python(value), by_alias=True, warnings="error")
        except ValidationError as error:
            raise Unfit(explain(error)) from None
        except PydanticSerializationError as error:
            raise Unfit(" ".join(str(error).split())) from None

    def decode(self, data: bytes) -> T:
        """Return what travelled. Raises `Unfit`."""
        if self._adapter is None:
            return data  # type: ignore[return-value]  # T is bytes
        try:
            return self._adapter.validate_json(data or _NULL)
        except ValidationError as error:
            raise Unfit(explain(error)) from None

    def input_schema(self) -> dict[str, Any]:
        """Return the JSON schema of what is read; empty for bytes, of which nothing can be said."""
        return self._schema("validation")

    def output_schema(self) -> dict[str, Any]:
        """Return the JSON schema of what is written; empty for bytes."""
        return self._schema("serialization")

    def _schema(self, mode: Literal["validation", "serialization"]) -> dict[str, Any]:
        if self._adapter is None:
            return {}
        try:
            return self._adapter.json_schema(mode=mode)
        except PydanticUserError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigurationError(f"{self.name} has no JSON schema: {reason}") from None


def type_name(kind: object) -> str:
    """Return what people call a type."""
    if isinstance(kind, type) and not get_args(kind):
        return kind.__qualname__
    return "None" if kind is None else str(kind).replace("typing.", "")


def as_json(value: Any, kind: Any = None) -> bytes:
    """Return a value as typed services read it: UTF-8 JSON. For common data, and wherever else bytes are wanted.

    Args:
        value: A pydantic model, a dataclass, or plain Python values.
        kind: The type to check it as; ``None``: its own.

    Raises:
        InvalidInput: It is not what ``kind`` says; the text names the field.
        ConfigurationError: ``kind`` is nothing that JSON can hold.
    """
    codec: Codec[Any] = Codec(type(value) if kind is None else kind, "as_json")
    try:
        return codec.encode(value)
    except Unfit as error:
        raise InvalidInput(f"as_json: not {codec.name}: {error}") from None
