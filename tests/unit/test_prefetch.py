"""How many tasks an executor takes at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flame.service.prefetch import MOST, SLOW_S, TARGET_S, ServiceTime, burst_size

durations = st.floats(min_value=0, max_value=1e5, allow_nan=False)
concurrencies = st.integers(1, 1000)


@given(st.none() | durations, durations, concurrencies)
def test_there_is_a_task_for_every_place_and_never_very_many(mean: float | None, last: float, places: int) -> None:
    assert places <= burst_size(mean, last, places) <= max(MOST, places)


@given(concurrencies)
def test_an_executor_that_knows_nothing_yet_takes_one_for_each_place(places: int) -> None:
    assert ServiceTime().burst(places) == places


@given(durations, st.floats(min_value=SLOW_S, max_value=1e5), concurrencies)
def test_nothing_is_taken_ahead_after_a_slow_task(mean: float, last: float, places: int) -> None:
    assert burst_size(mean, last, places) == places


@given(st.floats(min_value=0, max_value=SLOW_S, exclude_max=True), st.floats(0, SLOW_S, exclude_max=True))
def test_what_is_held_back_from_others_is_little_work(mean: float, last: float) -> None:
    size = burst_size(mean, last, 1)
    assert size == 1 or size * mean <= TARGET_S * 1.001


@given(st.floats(1e-6, SLOW_S, exclude_max=True), st.floats(1e-6, SLOW_S, exclude_max=True), concurrencies)
def test_shorter_tasks_are_never_taken_in_smaller_numbers(one: float, other: float, places: int) -> None:
    shorter, longer = sorted((one, other))
    assert burst_size(shorter, 0.0, places) >= burst_size(longer, 0.0, places)


def test_microsecond_tasks_are_taken_by_the_hundreds() -> None:
    time = ServiceTime()
    time.note(0.00001)
    assert time.burst(1) == MOST


def test_one_slow_task_ends_taking_ahead_at_once() -> None:
    time = ServiceTime()
    for _ in range(1000):
        time.note(0.00001)
    assert time.burst(1) == MOST
    time.note(0.2)
    assert time.burst(1) == 1


def test_taking_ahead_comes_back_only_step_by_step() -> None:
    time = ServiceTime()
    time.note(0.2)
    sizes = []
    for _ in range(60):
        time.note(0.00001)
        sizes.append(time.burst(1))
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] == MOST


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50))
def test_the_mean_lies_between_the_shortest_and_the_longest(elapsed: list[float]) -> None:
    time = ServiceTime()
    for each in elapsed:
        time.note(each)
    assert time.mean_s is not None
    assert min(elapsed) - 1e-9 <= time.mean_s <= max(elapsed) + 1e-9
    assert time.last_s == elapsed[-1]


def test_tasks_that_were_measured_together_count_each() -> None:
    time = ServiceTime()
    time.note(1.0, tasks=100)
    assert time.mean_s == 0.01
