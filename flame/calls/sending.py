"""Making bytes of what is to be sent, and saying what of it can't be."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final

from flame.calls.pickling import dump, dump_arguments, name_of
from flame.errors import ConfigurationError, Unpicklable

_DEPTH: Final = 3
"""How far what can't be pickled is looked for, from function to function."""


def definition_bytes(thing: Any, kind: str, modules: Iterable[str]) -> bytes:
    """Return a function or class as bytes; raise `Unpicklable`, which names the part of it that can't be."""
    try:
        return dump(thing, modules)
    except ConfigurationError:
        raise
    except Exception as error:  # reducers are anybody's code
        culprit = _culprit(thing, tuple(modules), _DEPTH) or "it"
        text = f"{kind} {name_of(thing)} can't be sent: {culprit} can't be pickled: {_text_of(error)}"
        raise Unpicklable(text) from error


def argument_bytes(name: str, arguments: Sequence[object], named: dict[str, object], modules: Iterable[str]) -> bytes:
    """Return the arguments of a call as bytes; raise `Unpicklable`, which names the one that can't be."""
    try:
        return dump_arguments(arguments, named, modules)
    except ConfigurationError:
        raise
    except Exception as error:  # as above
        numbered = ((f"argument {number}", value) for number, value in enumerate(arguments, 1))
        for what, value in (*numbered, *((f"argument {key!r}", value) for key, value in named.items())):
            reason = _refusal(value, tuple(modules))
            if reason:
                text = f"call of {name}: {what} ({type(value).__qualname__}) can't be pickled: {reason}"
                raise Unpicklable(text) from error
        raise Unpicklable(f"call of {name}: its arguments can't be pickled: {_text_of(error)}") from error


def result_bytes(name: str, value: object) -> bytes:
    """Return what a function returned as bytes; raise `Unpicklable`."""
    try:
        return dump(value)
    except Exception as error:  # as above
        kind = type(value).__qualname__
        raise Unpicklable(f"{name} returned {kind}, which can't be pickled: {_text_of(error)}") from error


def _culprit(thing: Any, modules: tuple[str, ...], depth: int) -> str:
    """Say which part of a function or class can't be pickled."""
    for what, value in _parts(thing):
        if _refusal(value, modules):
            deeper = _culprit(value, modules, depth - 1) if depth else ""
            return f"in {what}, {deeper}" if deeper else f"{what} ({type(value).__qualname__})"
    return ""


def _parts(thing: Any) -> Iterator[tuple[str, object]]:
    """Return what a function or class consists of, apart from its code."""
    function = getattr(thing, "__func__", thing)
    if isinstance(thing, partial):
        yield f"function {name_of(thing)}", thing.func
        yield from ((f"argument {number} of its partial", value) for number, value in enumerate(thing.args, 1))
        yield from ((f"argument {key!r} of its partial", value) for key, value in thing.keywords.items())
    elif isinstance(thing, type):
        yield from ((f"its member {key!r}", value) for key, value in vars(thing).items() if not _is_slot(value))
    elif isinstance(function, FunctionType):
        if function is not thing:
            yield "the object that it is a method of", thing.__self__
        yield from _variables(function)
        used = dict.fromkeys(_names(function.__code__))
        yield from (
            (f"the global {key!r}", value) for key in used if (value := function.__globals__.get(key)) is not None
        )
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        yield from (("a default of its arguments", value) for value in defaults)


def _variables(function: FunctionType) -> Iterator[tuple[str, object]]:
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"the variable {key!r}", cell.cell_contents
        except ValueError:  # it has no value yet
            continue


def _is_slot(value: object) -> bool:
    return inspect.isgetsetdescriptor(value) or inspect.ismemberdescriptor(value)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _refusal(value: object, modules: tuple[str, ...]) -> str:
    """Return why a value can't be pickled; empty if it can."""
    if isinstance(value, ModuleType):
        return ""
    try:
        dump(value, modules)
    except Exception as error:  # noqa: BLE001  # as above
        return _text_of(error)
    return ""


def _text_of(error: Exception) -> str:
    return str(error) or type(error).__name__
