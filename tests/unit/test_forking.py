"""What managers and templates say to one another."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import MalformedMessage
from flame.protocol.codec import pack
from flame.protocol.forking import (
    Adopt,
    Ended,
    Finish,
    Forked,
    ForkOrder,
    NotForked,
    decode_for_manager,
    decode_for_template,
    difference,
)
from flame.protocol.supervision import Assignment
from tests.unit.strategies import counts, plain_text, times

limits = st.tuples(counts, counts)
pids = st.integers(2, 2**31)
assignments = st.builds(
    Assignment, application=plain_text, session=plain_text, epoch=counts, stream=plain_text, consumer=plain_text
)
environments = st.dictionaries(plain_text, plain_text, max_size=4)
TO_TEMPLATE = st.one_of(
    st.builds(Adopt, folder=plain_text, ahead=counts, ahead_s=times),
    st.builds(
        ForkOrder,
        executor=plain_text,
        folder=plain_text,
        environment=st.dictionaries(plain_text, st.none() | plain_text, max_size=4),
        limits=st.dictionaries(counts, limits, max_size=2),
        assignment=st.none() | assignments,
    ),
    st.builds(Finish),
)
TO_MANAGER = st.one_of(
    st.builds(Forked, executor=plain_text, pid=pids),
    st.builds(NotForked, executor=plain_text, reason=plain_text),
    st.builds(Ended, executor=plain_text, pid=pids, status=st.integers(-64, 255)),
)


@given(TO_TEMPLATE)
def test_what_a_manager_says_comes_back_as_it_was(message: Any) -> None:
    assert decode_for_template(message.encode()) == message


@given(TO_MANAGER)
def test_what_a_template_says_comes_back_as_it_was(message: Any) -> None:
    assert decode_for_manager(message.encode()) == message


@pytest.mark.parametrize("decode", [decode_for_manager, decode_for_template])
def test_what_is_of_a_kind_that_came_later_is_nothing(decode: Any) -> None:
    assert decode(pack({"v": 1, "kind": "dance"})) is None


@pytest.mark.parametrize(
    ("decode", "fields"),
    [
        (decode_for_template, {"kind": "fork", "executor": 7, "folder": "/"}),
        (decode_for_template, {"kind": "fork", "executor": "e", "folder": "/", "environment": {"A": 1}}),
        (decode_for_template, {"kind": "fork", "executor": "e", "folder": "/", "environment": []}),
        (decode_for_template, {"kind": "fork", "executor": "e", "folder": "/", "limits": [[1, 2]]}),
        (decode_for_template, {"kind": "fork", "executor": "e", "folder": "/", "limits": [[1, 2, "x"]]}),
        (decode_for_template, {"kind": "fork", "executor": "e", "folder": "/", "limits": 7}),
        (decode_for_template, {"kind": "fork", "executor": "e", "folder": "/", "assignment": 7}),
        (decode_for_template, {"kind": "adopt"}),
        (decode_for_template, {"kind": "adopt", "folder": "/", "ahead": "many"}),
        (decode_for_manager, {"kind": "forked", "executor": "e"}),
        *((decode_for_manager, {"kind": "forked", "executor": "e", "pid": pid}) for pid in (1, 0, -1, -7)),
        (decode_for_manager, {"kind": "ended", "executor": "e", "pid": 0, "status": 0}),
        (decode_for_manager, {"kind": "ended", "executor": "e", "pid": 7, "status": None}),
    ],
)
def test_what_is_malformed_is_refused(decode: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        decode(pack({"v": 1, **fields}))


@pytest.mark.parametrize("decode", [decode_for_manager, decode_for_template])
@given(data=st.binary(max_size=60))
def test_rubbish_is_refused(decode: Any, data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data)


@given(environments, environments)
def test_a_difference_makes_the_one_of_the_other(wanted: dict[str, str], present: dict[str, str]) -> None:
    made: dict[str, str | None] = {**present, **difference(wanted, present)}
    assert {name: value for name, value in made.items() if value is not None} == wanted
