"""In which order chunks are handed on, whatever was stored twice, out of turn, or by a run that doesn't count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.protocol import defaults
from flame.protocol.chunks import ChunkMessage, ChunkOrder, MissingChunk, RunKey

FIRST, SECOND, OTHER = RunKey(1, 1.0), RunKey(2, 2.0), RunKey(1, 9.0)


def chunk(index: int, run: RunKey = FIRST) -> ChunkMessage:
    return ChunkMessage(index, run.attempt, run.started, str(index).encode())


def heard(order: ChunkOrder, *chunks: ChunkMessage) -> list[tuple[int, int]]:
    """What is handed on, as attempts and indexes."""
    return [(ready.attempt, ready.index) for taken in chunks for ready in order.take(taken)]


@given(st.permutations(range(20)), st.lists(st.integers(0, 19), max_size=20))
def test_chunks_of_a_run_come_in_order_and_once(stored: list[int], again: list[int]) -> None:
    order = ChunkOrder()
    found = [ready for index in [*stored, *again] for ready in order.take(chunk(index))]
    assert [(ready.index, ready.data) for ready in found] == [(index, str(index).encode()) for index in range(20)]
    assert not order.end(FIRST, 20)
    assert order.complete


def test_a_later_run_begins_anew_and_what_an_earlier_one_says_then_counts_for_nothing() -> None:
    order = ChunkOrder()
    assert heard(order, chunk(0), chunk(1), chunk(0, SECOND), chunk(2), chunk(1, SECOND), chunk(3)) == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert not order.end(SECOND, 3)
    assert not order.complete
    assert heard(order, chunk(2, SECOND)) == [(2, 2)]
    assert order.complete


def test_two_runs_of_the_same_number_are_told_apart() -> None:
    order = ChunkOrder()
    assert heard(order, chunk(0), chunk(0, OTHER), chunk(1), chunk(1, OTHER)) == [(1, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize("winner", [FIRST, OTHER])
def test_the_run_that_the_record_is_of_counts_even_if_it_was_left(winner: RunKey) -> None:
    stored = [chunk(0), chunk(0, OTHER), chunk(0, SECOND), chunk(1, winner), chunk(1, SECOND)]
    order = ChunkOrder()
    heard(order, *stored)
    assert order.end(winner, 2), "everything is to be read again"
    assert not order.complete
    assert heard(order, *stored) == [(1, 0), (1, 1)]
    assert order.complete


def test_a_run_that_was_never_begun_since_a_later_one_was_there_first_counts_too() -> None:
    order = ChunkOrder()
    assert heard(order, chunk(0, SECOND), chunk(0)) == [(2, 0)]
    assert order.end(FIRST, 1)
    assert heard(order, chunk(0, SECOND), chunk(0)) == [(1, 0)]
    assert order.complete


def test_nothing_replaces_the_run_that_counts() -> None:
    order = ChunkOrder()
    assert not order.end(FIRST, 2)
    assert heard(order, chunk(0), chunk(0, SECOND), chunk(1)) == [(1, 0), (1, 1)]


def test_who_comes_late_hears_the_runs_before_the_one_that_counts() -> None:
    order = ChunkOrder()
    assert not order.end(SECOND, 1)
    assert heard(order, chunk(0), chunk(1), chunk(0, SECOND)) == [(1, 0), (1, 1), (2, 0)]
    assert order.complete


@pytest.mark.parametrize(("before", "restarted"), [([], False), ([chunk(0)], True)])
def test_a_run_that_emits_nothing_makes_void_what_came_before(before: list[ChunkMessage], restarted: bool) -> None:
    order = ChunkOrder()
    heard(order, *before)
    assert not order.end(SECOND, 0)
    assert order.complete
    assert order.restarted == restarted


def test_what_is_further_out_of_order_than_can_be_is_missing() -> None:
    order = ChunkOrder()
    assert heard(order, chunk(defaults.CHUNK_WINDOW - 1)) == []
    with pytest.raises(MissingChunk, match="chunk 0 of attempt 1"):
        order.take(chunk(defaults.CHUNK_WINDOW))


def test_what_is_missing_of_a_run_that_does_not_count_is_not_missed() -> None:
    order = ChunkOrder()
    order.end(SECOND, 1)
    assert heard(order, chunk(1000), chunk(1001), chunk(0, SECOND)) == [(2, 0)]
    assert order.complete
