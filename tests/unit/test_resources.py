"""Amounts of cpu, memory and gpu."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import InvalidArgument
from flame.protocol.resources import Resources, format_bytes
from tests.unit.strategies import amounts


@given(amounts)
def test_what_is_written_is_read_as_the_same(resources: Resources) -> None:
    assert Resources.parse(str(resources)) == resources


@given(st.integers(0, 2**63 - 1))
def test_bytes_that_are_written_are_read_as_the_same(amount: int) -> None:
    assert Resources.parse(f"mem={format_bytes(amount)}").memory == amount


READ: dict[str, Resources] = {
    "cpu=0.5,mem=512m,gpu=1": Resources(0.5, 512 * 2**20, 1),
    "gpu=1, cpu=2": Resources(2.0, 7, 1),
    " cpu = 1 , mem = 2g ": Resources(1.0, 2 * 2**30, 3),
    "mem=1k": Resources(9.0, 1024, 3),
    "mem=1K": Resources(9.0, 1024, 3),
    "mem=1KiB": Resources(9.0, 1024, 3),
    "mem=1kb": Resources(9.0, 1024, 3),
    "mem=1.5k": Resources(9.0, 1536, 3),
    "mem=100": Resources(9.0, 100, 3),
    "memory=1t": Resources(9.0, 2**40, 3),
    "mem=9007199254740993": Resources(9.0, 9007199254740993, 3),
    "mem=0,cpu=0,gpu=0": Resources(0.0, 0, 0),
    "": Resources(9.0, 7, 3),
    ",": Resources(9.0, 7, 3),
}


@pytest.mark.parametrize("text", READ)
def test_what_is_left_out_is_taken_from_the_default(text: str) -> None:
    assert Resources.parse(text, Resources(9.0, 7, 3)) == READ[text]


def test_without_a_default_what_is_left_out_is_nothing() -> None:
    assert Resources.parse("cpu=1") == Resources(1.0, 0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "cpu",
        "cpu=",
        "=1",
        "cpu=lots",
        "cpu=-1",
        "cpu=nan",
        "cpu=inf",
        "cpu=1e400",
        "cpu=1e30",
        "cpus=1",
        "CPU=1",
        "mem=1x",
        "mem=1ki",
        "mem=-1",
        "mem=m",
        "mem=1 m",
        "mem=1e9",
        "mem=9223372036854775808",
        "mem=99999999t",
        "mem=" + "9" * 400,
        "mem=" + "9" * 400 + ".5",
        "mem=" + "9" * 5000,
        "gpu=0.5",
        "gpu=-1",
        "gpu=9223372036854775808",
        "cpu=1;mem=2",
        "cpu=1 mem=2",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_understood_is_refused_with_the_form_expected(text: str) -> None:
    with pytest.raises(InvalidArgument, match="expected cpu=NUMBER,mem="):
        Resources.parse(text)


@given(st.text())
def test_any_other_text_is_refused_and_nothing_else(text: str) -> None:
    with contextlib.suppress(InvalidArgument):
        Resources.parse(text)


@given(amounts, amounts)
def test_what_was_taken_can_be_given_back(one: Resources, other: Resources) -> None:
    back = one.plus(other).minus(other)
    assert back.cpu == pytest.approx(one.cpu, abs=1e-6)
    assert back[1:] == one[1:]


@given(amounts, amounts)
def test_it_fits_only_where_there_is_enough_of_each(request: Resources, free: Resources) -> None:
    assert request.fits_in(request)
    assert request.fits_in(free.plus(request))
    assert not request.plus(Resources(cpu=1e-6)).fits_in(request)
    assert not request.plus(Resources(memory=1)).fits_in(request)
    assert not request.plus(Resources(gpu=1)).fits_in(request)


def test_ten_tenths_of_a_processor_fit_in_one() -> None:
    free = Resources(cpu=1.0)
    for _ in range(10):
        assert Resources(cpu=0.1).fits_in(free)
        free = free.minus(Resources(cpu=0.1))
    assert not Resources(cpu=0.1).fits_in(free)
