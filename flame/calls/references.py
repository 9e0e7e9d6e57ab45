"""Results that stand for themselves among the arguments of a call, wherever they are in them.

What is pickled of one is its number among the call's references. Where the call is made, a result is put in its place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flame.errors import Unpicklable


class _Here(threading.local):
    """What this thread pickles or unpickles."""

    collected: list[Any] | None = None
    values: Sequence[Any] | None = None


_here = _Here()


@contextmanager
def collecting() -> Iterator[list[Any]]:
    """Allow references in what this thread pickles, and collect what they refer to."""
    before, _here.collected = _here.collected, []
    try:
        yield _here.collected
    finally:
        _here.collected = before


def refer(call: Any) -> tuple[Any, ...]:
    """Return what is pickled of a call's result. Raises `Unpicklable` outside of arguments."""
    collected = _here.collected
    if collected is None:
        raise Unpicklable(
            f"{call!r} stands for a result and can only be an argument, or in one: pass it to the function as an"
            " argument, or await it first"
        )
    number = next((number for number, other in enumerate(collected) if other is call), len(collected))
    if number == len(collected):
        collected.append(call)
    return _resolve, (number,)


@contextmanager
def resolving(values: Sequence[Any]) -> Iterator[None]:
    """Put values in the places of references in what this thread unpickles."""
    before, _here.values = _here.values, values
    try:
        yield
    finally:
        _here.values = before


def _resolve(number: int) -> Any:
    values = _here.values
    if values is None:
        raise ValueError("a reference to a result is of no use outside of a call's arguments")
    return values[number]
