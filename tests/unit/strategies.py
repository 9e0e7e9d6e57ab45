"""What property tests make their examples of."""

from __future__ import annotations

import re
import string
import types
import typing
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Final, Literal, TypeVar

import annotated_types
from hypothesis import strategies as st
from pydantic import BaseModel

from flame.protocol import defaults
from flame.protocol.messages import TaskFault, TaskOptions
from flame.protocol.resources import Resources
from flame.protocol.values import ValueRef

LETTERS: Final = string.ascii_letters + string.digits + "_-"
LEGAL: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)

tokens: Final = st.text(LETTERS, min_size=1, max_size=64)
application_names: Final = st.text(LETTERS, min_size=1, max_size=48)

ILLEGAL: Final = (
    "",
    ".",
    "a.b",
    "*",
    ">",
    "a*",
    "a>",
    " ",
    "a b",
    "a\tb",
    "a\n",
    "\na",
    "a\r\nb",
    "a\0b",
    "a\x7f",
    "é",
    "名前",
    "٣",  # a digit, but not of ASCII
    "\udce9",  # what an undecodable byte of a file name becomes
    "a/b",
    "$JS",
    "a" * 65,
)
"""Names that must be refused wherever one is taken."""

illegal_names: Final = st.one_of(st.sampled_from(ILLEGAL), st.text().filter(lambda text: LEGAL.fullmatch(text) is None))

plain_text: Final = st.text(st.characters(codec="utf-8"), max_size=40)
"""Text that has a UTF-8 form."""
safe_text: Final = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
"""Text that a system call takes."""
times: Final = st.floats(min_value=0, max_value=4e9, allow_nan=False)
counts: Final = st.integers(min_value=0, max_value=2**40)
amounts: Final = st.builds(
    Resources,
    cpu=st.floats(min_value=0, max_value=1e6, allow_nan=False),
    memory=st.integers(min_value=0, max_value=2**52),
    gpu=st.integers(min_value=0, max_value=1000),
)
faults: Final = st.builds(
    TaskFault,
    code=plain_text,
    message=plain_text,
    type=plain_text,
    traceback=plain_text,
    details=st.binary(max_size=100),
)


_day: Final = st.none() | st.floats(min_value=0, max_value=24 * 3600) | st.integers(min_value=0, max_value=24 * 3600)
task_options: Final = st.builds(
    TaskOptions,
    timeout_s=st.none() | st.floats(min_value=0.001, max_value=24 * 3600),
    expires_s=_day,
    delay_s=_day,
    max_attempts=st.none() | st.integers(min_value=1, max_value=1000),
)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(plain_text, inner, max_size=3)


scalars: Final = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | plain_text | st.binary()
anything: Final = st.recursive(scalars, _nested, max_leaves=6)
"""Whatever MessagePack can carry."""
newer_keys: Final = st.dictionaries(plain_text.map(lambda name: f"newer {name}"), anything, max_size=3)

json_objects: Final = st.dictionaries(
    plain_text,
    st.recursive(st.none() | st.booleans() | st.integers(-(2**53), 2**53) | plain_text, _nested, max_leaves=4),
    max_size=3,
)

T = TypeVar("T")


value_refs = st.builds(
    ValueRef,
    id=tokens,
    size=st.integers(1000, defaults.VALUE_LIMIT_BYTES),
    parts=st.integers(1, 1000),
    digest=st.binary(max_size=32),
)


def made_of_fields(kind: type[T], **known: st.SearchStrategy[Any]) -> st.SearchStrategy[T]:
    """Make examples of a dataclass or model with anything in each field that its type allows.

    So a field that is added is tested from the start. ``known`` says more about some fields than their type does.
    """
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        made = {f.name: _of_type(hints[f.name]) for f in fields(kind) if f.name not in known}
    else:
        assert issubclass(kind, BaseModel)
        declared = kind.model_fields.items()
        made = {name: _of_type(info.annotation, info.metadata) for name, info in declared if name not in known}
    return st.builds(kind, **made, **known)


def _of_type(kind: Any, limits: typing.Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(_of_type(argument, limits) for argument in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(_of_type(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        if arguments[1] is Any:
            return json_objects
        values = tokens | st.just("") if arguments[1] is str else _of_type(arguments[1])
        return st.dictionaries(tokens, values, max_size=3)
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    if kind in (int, float):
        least: Any = next((limit.ge for limit in limits if isinstance(limit, annotated_types.Ge)), 0)
        most: Any = next((limit.le for limit in limits if isinstance(limit, annotated_types.Le)), 4_000_000_000)
        return st.integers(least, most) if kind is int else st.floats(least, most, allow_nan=False)
    return st.sampled_from(kind) if issubclass(kind, Enum) else made_of_fields(kind)


_SIMPLE: Final[dict[Any, st.SearchStrategy[Any]]] = {
    bytes: st.binary(max_size=100),
    str: plain_text,
    bool: st.booleans(),
    type(None): st.none(),
    Resources: amounts,
    TaskOptions: task_options,
    ValueRef: value_refs,
}
