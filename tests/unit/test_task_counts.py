"""What an executor says that it has stored: always exactly its records up to one sequence, whatever gets lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flame.protocol.states import ExecutorState, TaskState
from flame.protocol.supervision import ExecutorReport
from flame.service.counts import Counts


def total(counts: Counts) -> int:
    return counts.succeeded + counts.failed + counts.cancelled


def test_records_are_counted_by_outcome() -> None:
    counts = Counts()
    for sequence, state in enumerate((TaskState.SUCCEED, TaskState.FAILED, TaskState.CANCELLED, TaskState.SUCCEED), 5):
        counts.done(counts.begin(), state, sequence)
    report = ExecutorReport(ExecutorState.BOUND, 1)
    counts.fill(report)
    assert (report.succeeded, report.failed, report.cancelled, report.counted_to) == (2, 1, 1, 8)


def test_a_record_that_is_anothers_is_not_counted() -> None:
    counts = Counts()
    counts.done(counts.begin(), None, 0)
    counts.done(counts.begin(), TaskState.SUCCEED, 3)
    assert (total(counts), counts.counted_to) == (1, 3)


def test_the_numbers_stand_still_while_a_record_is_stored_again() -> None:
    counts = Counts()
    first, second, third = counts.begin(), counts.begin(), counts.begin()
    counts.done(first, TaskState.SUCCEED, 1)
    counts.failed_once(second)
    counts.done(third, TaskState.SUCCEED, 3)
    assert (total(counts), counts.counted_to) == (1, 1)
    counts.done_again(second, TaskState.SUCCEED, 2)
    assert (total(counts), counts.counted_to) == (3, 3)


def test_an_acknowledgement_that_was_overtaken_is_missed_at_once() -> None:
    counts = Counts()
    first, second = counts.begin(), counts.begin()
    counts.done(second, TaskState.SUCCEED, 2)
    assert (total(counts), counts.counted_to) == (0, 0)
    counts.done(first, TaskState.SUCCEED, 1)
    assert (total(counts), counts.counted_to) == (2, 2)


def test_what_was_stored_again_does_not_overtake_what_is_under_way() -> None:
    counts = Counts()
    first, second = counts.begin(), counts.begin()
    counts.failed_once(first)
    counts.done_again(first, TaskState.SUCCEED, 9)  # the second is stored before it, and that is not known yet
    assert (total(counts), counts.counted_to) == (0, 0)
    counts.done(second, TaskState.SUCCEED, 5)
    assert (total(counts), counts.counted_to) == (2, 9)


def test_they_go_on_with_the_first_record_behind_all_others_although_more_are_under_way() -> None:
    counts = Counts()
    first, second, third, _ = (counts.begin() for _ in range(4))
    counts.failed_once(first)
    counts.done_again(first, TaskState.SUCCEED, 9)
    counts.done(second, TaskState.SUCCEED, 5)
    assert total(counts) == 0
    counts.done(third, TaskState.SUCCEED, 10)
    assert (total(counts), counts.counted_to) == (3, 10)


class _Stream:
    """Where records are stored in the order in which they are begun, or again later; some acknowledgements get lost."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.stored: dict[int, int] = {}
        """Sequences by number."""
        self.sequence = 0
        self.under_way: list[int] = []
        self.arrived: list[int] = []
        """Stored, and the acknowledgement is on its way."""
        self.lost: list[int] = []
        """Under way still, as far as the executor knows."""
        self.again: list[int] = []

    def store(self, number: int) -> int:
        self.sequence += 1
        return self.stored.setdefault(number, self.sequence)

    def step(self, what: str, which: int) -> None:
        if what == "begin":
            self.under_way.append(self.counts.begin())
        elif what == "arrive" and self.under_way:
            self.arrived.append(number := self.under_way.pop(0))
            self.store(number)
        elif what == "lose request" and self.under_way:
            self.lost.append(self.under_way.pop(0))
        elif what == "lose answer" and self.arrived:
            self.lost.append(self.arrived.pop(0))
        elif what == "answer" and self.arrived:
            number = self.arrived.pop(0)
            self.counts.done(number, TaskState.SUCCEED, self.stored[number])
        elif what == "late" and self.lost:
            self.again.append(number := self.lost.pop(which % len(self.lost)))
            self.counts.failed_once(number)
        elif what == "repeat" and self.again:
            number = self.again.pop(which % len(self.again))
            self.counts.done_again(number, TaskState.SUCCEED, self.store(number))

    def check(self) -> None:
        behind = [sequence for sequence in self.stored.values() if sequence <= self.counts.counted_to]
        assert total(self.counts) == len(behind)


STEPS = ("begin", "begin", "arrive", "arrive", "answer", "answer", "lose request", "lose answer", "late", "repeat")


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 5)), max_size=200))
def test_reported_and_found_behind_are_together_all(steps: list[tuple[str, int]]) -> None:
    stream = _Stream()
    for what, which in steps:
        stream.step(what, which)
        stream.check()
    for what in ("arrive", "answer", "late", "repeat"):
        for _ in range(len(steps) + 1):
            stream.step(what, 0)
            stream.check()
    assert total(stream.counts) == len(stream.stored)
