"""How many records an executor has stored, and up to where in their stream that is known."""

from __future__ import annotations

from flame.protocol.states import TaskState
from flame.protocol.supervision import ExecutorReport


class Counts:
    """A count that whoever reads the stream behind `counted_to` can complete, even if its executor is killed.

    Every record of this executor with a sequence up to `counted_to` is in the numbers, and none with a higher one. So
    while the fate of a record is not known although later ones are stored, the numbers stand still; they go on once
    it is known and a record is stored that is later than all others.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.succeeded = 0
        self.failed = 0
        self.cancelled = 0
        self.counted_to = 0
        self._begun = 0
        self._upcoming = 1
        """The number of the store that is to be done next, if they are done in the order in which they were begun."""
        self._missing: set[int] = set()
        """Earlier ones that are not done."""
        self._apart: list[TaskState] = []
        """Outcomes of records that are stored and can't be counted yet."""
        self._highest = 0

    def begin(self) -> int:
        """Number a record that is about to be stored."""
        self._begun = number = self._begun + 1
        return number

    def done(self, number: int, state: TaskState | None, sequence: int) -> None:
        """Note what became of a store at its first attempt: ``None`` for one that is not to be counted."""
        if number != self._upcoming or self._missing or self._apart:
            self._out_of_turn(number, state, sequence)
            return
        self._upcoming = number + 1
        if state is None:
            return
        self.counted_to = self._highest = sequence
        if state is TaskState.SUCCEED:
            self.succeeded += 1
        else:
            self._count(state)

    def failed_once(self, number: int) -> None:
        """Note that a store has to be repeated, and may have been carried out."""
        self._reach(number)
        self._missing.add(number)

    def done_again(self, number: int, state: TaskState | None, sequence: int) -> None:
        """Note what became of a store that was repeated."""
        self._missing.discard(number)
        self._set_apart(state, sequence)
        if not self._missing and self._upcoming > self._begun:
            self._go_on()

    def fill(self, report: ExecutorReport) -> None:
        """Add the numbers to a report."""
        report.succeeded, report.failed, report.cancelled = self.succeeded, self.failed, self.cancelled
        report.counted_to = self.counted_to

    def _out_of_turn(self, number: int, state: TaskState | None, sequence: int) -> None:
        in_turn = number >= self._upcoming
        self._reach(number)
        self._missing.discard(number)
        self._set_apart(state, sequence)
        # Whatever is not done was begun later than this one and is stored behind it; what was stored again may not be.
        behind_all = in_turn and sequence == self._highest
        if not self._missing and (behind_all or self._upcoming > self._begun):
            self._go_on()

    def _reach(self, number: int) -> None:
        self._missing.update(range(self._upcoming, number))
        self._upcoming = max(self._upcoming, number + 1)

    def _set_apart(self, state: TaskState | None, sequence: int) -> None:
        if state is not None:
            self._apart.append(state)
            self._highest = max(self._highest, sequence)

    def _go_on(self) -> None:
        self.counted_to = self._highest
        for state in self._apart:
            self._count(state)
        self._apart.clear()

    def _count(self, state: TaskState) -> None:
        if state is TaskState.SUCCEED:
            self.succeeded += 1
        elif state is TaskState.CANCELLED:
            self.cancelled += 1
        else:
            self.failed += 1
