"""What a typed handler takes and returns, read from its annotations."""

from __future__ import annotations

import inspect
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass
from enum import Enum, auto
from types import NoneType
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints

from flame.errors import ConfigurationError
from flame.service.contexts import SessionContext, TaskContext
from flame.typed.codec import NotDefined

T = TypeVar("T")


class Source(Enum):
    """Where an argument comes from."""

    VALUE = auto()
    """What is read: a task's input, or in ``enter`` the session's common data."""
    TASK = auto()
    SESSION = auto()
    COMMON = auto()


CommonData = Annotated[T, Source.COMMON]
"""Marks a parameter that gets the session's common data: ``prompt: flame.CommonData[Prompt]``."""


@dataclass(frozen=True, slots=True)
class Argument:
    """A parameter that is filled in for each call."""

    name: str
    source: Source
    by_name: bool
    """It can't be given by position."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What a handler takes and returns."""

    value: Any
    """The type of its first parameter; `NoneType` if it has none but contexts."""
    returns: Any
    yields: Any
    """The type of what it yields; ``None`` if it is no generator. Then `returns` is what that returns in the end."""
    common: Any
    """The type of the common data that it takes; ``None`` if it takes none."""
    arguments: tuple[Argument, ...]


def read_signature(
    function: Callable[..., Any], what: str, names: Mapping[str, Any], *, method: bool, returns: bool = True
) -> Signature:
    """Read a function's annotations.

    Args:
        function: The handler.
        what: How to call it in errors.
        names: What annotations may name besides the function's globals.
        method: Its first parameter is ``self``.
        returns: It has to say what it returns.

    Raises:
        NotDefined: An annotation names what is not there (yet).
        ConfigurationError: It can't be a typed handler; the text says why.
    """
    hints = _hints(function, what, names)
    parameters = list(inspect.signature(function).parameters.values())[1 if method else 0 :]
    arguments: list[Argument] = []
    value: Any = NoneType
    common: Any = None
    for parameter in parameters:
        source, kind = _source(parameter, hints, what)
        if source is Source.VALUE:
            if arguments:
                if parameter.default is not parameter.empty:
                    continue  # it keeps its default
                raise ConfigurationError(
                    f"{what}: {parameter.name}: expected one input, as the first parameter, and after it only contexts;"
                    " put several values into one dataclass"
                )
            value = kind
        elif source is Source.COMMON:
            common = kind
        arguments.append(Argument(parameter.name, source, parameter.kind is parameter.KEYWORD_ONLY))
    if "return" not in hints and returns:
        raise ConfigurationError(f"{what}: it doesn't say what it returns: annotate it, with -> None for nothing")
    output = hints.get("return")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        return Signature(value, *_of_a_generator(output, what), common, tuple(arguments))
    return Signature(value, output, None, common, tuple(arguments))


def _of_a_generator(hint: Any, what: str) -> tuple[Any, Any]:
    """Return of which types are what a generator returns in the end, and what it yields."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind not in _GENERATORS or not parts:
        raise ConfigurationError(f"{what}: it yields; expected it to return something like AsyncIterator[Chunk]")
    return (parts[2] if kind is Generator and len(parts) > 2 else NoneType), parts[0]


_GENERATORS: Final = (AsyncIterator, AsyncIterable, AsyncGenerator, Iterator, Iterable, Generator)


def _hints(function: Callable[..., Any], what: str, names: Mapping[str, Any]) -> dict[str, Any]:
    module = sys.modules.get(function.__module__)
    known = {**vars(module)} if module is not None else {}
    try:
        return get_type_hints(function, known, dict(names), include_extras=True)
    except NameError as error:
        raise NotDefined(f"{what}: an annotation names what is not there: {error}") from None


def _source(parameter: inspect.Parameter, hints: Mapping[str, Any], what: str) -> tuple[Source, Any]:
    """Return where an argument comes from, and its type."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise ConfigurationError(
            f"{what}: {parameter.name}: expected one input and contexts, each with a name of its own"
        )
    if parameter.name not in hints:
        raise ConfigurationError(f"{what}: {parameter.name} has no annotation: say of which type it is")
    hint = hints[parameter.name]
    if hint is TaskContext:
        return Source.TASK, hint
    if hint is SessionContext:
        return Source.SESSION, hint
    if get_origin(hint) is Annotated and Source.COMMON in get_args(hint)[1:]:
        return Source.COMMON, get_args(hint)[0]
    return Source.VALUE, hint
