"""Terminal records by outcome, counted where they are stored: for what nobody is left to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker
from flame.errors import MalformedMessage
from flame.protocol import subjects
from flame.protocol.messages import ResultRecord
from flame.protocol.records import BindingRecord, ExecutorRecord, SessionRecord
from flame.protocol.states import TaskState

CONTROL: Final = ""
"""What stands for the control side where a record says who made it."""


@dataclass(frozen=True, slots=True)
class Tally:
    """How many records there are of each outcome."""

    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Return both together."""
        return Tally(self.succeeded + other.succeeded, self.failed + other.failed, self.cancelled + other.cancelled)

    def at_least(self, other: Tally) -> Tally:
        """Return the larger one of each."""
        return Tally(
            max(self.succeeded, other.succeeded),
            max(self.failed, other.failed),
            max(self.cancelled, other.cancelled),
        )

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.succeeded or self.failed or self.cancelled)

    @classmethod
    def of(cls, state: TaskState, count: int = 1) -> Tally:
        """Return so many records of one outcome."""
        if state is TaskState.SUCCEED:
            return cls(succeeded=count)
        return cls(cancelled=count) if state is TaskState.CANCELLED else cls(failed=count)

    @classmethod
    def reported(cls, executor: ExecutorRecord) -> Tally:
        """Return what an executor has reported."""
        return cls(executor.succeeded, executor.failed, executor.cancelled)

    def added_to(self, session: SessionRecord) -> SessionRecord:
        """Return a session's record with these counted."""
        return session.changed(
            succeeded=session.succeeded + self.succeeded,
            failed=session.failed + self.failed,
            cancelled=session.cancelled + self.cancelled,
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """How many records some writers have stored."""

    by_writer: dict[str, Tally]
    last: int
    """What is told is all of theirs up to this sequence of the result stream."""


async def read_tallies(broker: Broker, application: str, session: str, behind: Mapping[str, int]) -> Reading:
    """Count a session's records by writer: of each one named, those behind the sequence that goes with it."""
    found = dict.fromkeys(behind, Tally())
    last = min(behind.values())
    pattern = subjects.session_results(application, session)
    try:
        async with aclosing(broker.read(subjects.result_stream(application), pattern, after=last)) as messages:
            async for message in messages:
                last = message.sequence
                try:
                    record = ResultRecord.decode(message.data)
                except MalformedMessage:
                    continue  # none of ours
                if last > behind.get(record.executor, last):
                    found[record.executor] += Tally.of(record.state)
    except StreamMissing:
        pass  # its application is gone, and its records with it
    return Reading(found, max(last, *behind.values()))


async def tally_lost(
    broker: Broker, bindings: Sequence[BindingRecord], records: Mapping[str, ExecutorRecord]
) -> Reading:
    """Count what executors of one session have stored that did not live to report the last of it.

    ``records`` has those that were heard of, by id.
    """
    behind = {binding.executor: binding.results_from for binding in bindings}
    behind |= {name: max(behind[name], record.counted_to) for name, record in records.items()}
    reading = await read_tallies(broker, bindings[0].application, bindings[0].session, behind)
    totals = dict(reading.by_writer)
    for name, record in records.items():
        reported, found = Tally.reported(record), reading.by_writer[name]
        # Who doesn't say up to where it has counted: all that is still stored was read, or it has reported more.
        totals[name] = reported + found if record.counted_to else reported.at_least(found)
    return Reading(totals, reading.last)
