"""Taking functions, arguments and results from one process to another.

A function or class travels by value: with its code, and what that uses of the module where it was defined. Other
modules are imported where it runs.
"""

from __future__ import annotations

import inspect
import pickle
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Any, Final

from flame.errors import ConfigurationError

PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
"""Compiled code is of one minor version of Python, and means nothing to others."""
_PROTOCOL: Final = 5
_PLAIN: Final = frozenset({NoneType, bool, int, float, complex, str, bytes})
"""What needs no more than `pickle`, which takes a fraction of the time."""

_registering = threading.RLock()
"""What is pickled by value is a setting of the process."""


@cache
def cloudpickle() -> Any:
    """Return the package; it is loaded by those who use it. Raises `ConfigurationError`."""
    try:
        import cloudpickle as package  # noqa: PLC0415  # an extra
    except ImportError:
        raise ConfigurationError(
            "functions need the package cloudpickle, which is not installed here: pip install 'flame-engine[functions]'"
        ) from None
    return package


def dump(value: object, modules: Iterable[str] = ()) -> bytes:
    """Return a value as bytes, with what belongs to ``modules`` by value; raises whatever can go wrong."""
    if type(value) in _PLAIN:
        return pickle.dumps(value, _PROTOCOL)
    package = cloudpickle()
    with _by_value(package, modules):
        dumped: bytes = package.dumps(value, protocol=_PROTOCOL)
    return dumped


def dump_arguments(arguments: Sequence[object], named: dict[str, object], modules: Iterable[str]) -> bytes:
    """Return a call's arguments as bytes; raises whatever can go wrong."""
    if not named and all(type(argument) in _PLAIN for argument in arguments):
        return pickle.dumps((arguments, named), _PROTOCOL)
    return dump((arguments, named), modules)


def load(data: bytes) -> Any:
    """Return what was made bytes of; raises whatever can go wrong."""
    return pickle.loads(data)


@contextmanager
def _by_value(package: Any, names: Iterable[str]) -> Iterator[None]:
    wanted = [module for name in names if (module := sys.modules.get(name)) is not None]
    if not wanted:
        yield
        return
    with _registering:
        there = package.list_registry_pickle_by_value()
        new = [module for module in wanted if module.__name__ not in there]
        for module in new:
            package.register_pickle_by_value(module)
        try:
            yield
        finally:
            for module in new:
                package.unregister_pickle_by_value(module)


# ---- what is a program's own


def module_of(thing: object) -> str:
    """Return the module in which a function or class was defined if executors can't be expected to have that."""
    while isinstance(thing, partial):
        thing = thing.func
    thing = inspect.unwrap(thing) if callable(thing) else thing
    name = getattr(thing, "__module__", None) or type(thing).__module__
    return name if _is_own(name) else ""


@cache
def _is_own(name: str) -> bool:
    """Whether a module is part of a program, and was not installed."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if module is None or file is None or name.partition(".")[0] in ("flame", "flame_services", "flame_cli"):
        return False
    return not any(Path(file).is_relative_to(folder) for folder in _installed())


@cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def name_of(thing: object) -> str:
    """Return how a function or class is called in messages."""
    while isinstance(thing, partial):
        thing = thing.func
    return str(getattr(thing, "__qualname__", None) or type(thing).__qualname__)
