"""Ids that clients mint."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.client import ids
from flame.client.ids import TaskIds
from flame.protocol.ids import base62
from flame.protocol.subjects import check_token


@given(st.integers(0, 62**8 - 1), st.integers(0, 62**8 - 1))
def test_numbers_are_ordered_alike_as_text(one: int, other: int) -> None:
    assert (base62(one, 8) < base62(other, 8)) == (one < other)
    assert len(base62(one, 8)) == 8


def test_ids_are_legal_names_and_no_two_alike() -> None:
    minter = TaskIds()
    minted = [minter.mint() for _ in range(20_000)]
    assert len(set(minted)) == len(minted)
    assert check_token("task", minted[0])
    assert {len(task_id) for task_id in minted} == {18}


def test_ids_are_sorted_by_their_creation() -> None:
    minter = TaskIds()
    minted = [minter.mint() for _ in range(20_000)]
    assert minted == sorted(minted)


def test_ids_of_two_clients_differ_even_if_minted_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000)
    one, other = TaskIds(), TaskIds()
    assert not {one.mint() for _ in range(100)} & {other.mint() for _ in range(100)}


@given(st.lists(st.integers(1_600_000_000_000, 1_900_000_000_000), min_size=2, max_size=30))
def test_ids_stay_sorted_when_the_clock_jumps(clock: list[int]) -> None:
    times = iter(clock)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: next(times) * 1_000_000)
        minter = TaskIds()
        minted = [minter.mint() for _ in clock]
    assert minted == sorted(set(minted))


def test_ids_stay_sorted_when_the_counter_has_been_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1_700_000_000_000] * 50 + [1_700_000_000_001] * 50)
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 1_000_000)
    monkeypatch.setattr(ids, "_COUNTER_WIDTH", 1)  # good for 62 ids in a millisecond
    minter = TaskIds()
    minted = [minter.mint() for _ in range(100)]
    assert minted == sorted(set(minted))
