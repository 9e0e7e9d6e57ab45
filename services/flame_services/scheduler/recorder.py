"""Terminal records that the control side writes, and their exact counts.

Who is about to write says so in the session's record, with where the result stream ends; whoever has finished adds what
was new and takes that back, in one compare-and-set. So writing that was interrupted can be seen, and is made up for by
counting what lies behind that place and no executor has written.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from flame.broker.errors import Duplicate
from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.messages import ResultRecord
from flame.protocol.records import SessionRecord
from flame_services.scheduler.store import Store
from flame_services.scheduler.tally import CONTROL, Tally, read_tallies

log = get_logger("flame.scheduler")

BATCH: Final = 1000
"""Records under way at once."""
STORE_TIMEOUT_S: Final = 10.0
PATIENCE_S: Final = 2.0
"""How long another scheduler that is writing is waited for before it is taken to be gone."""
_LOOK_S: Final = 0.1

Finish = Callable[[SessionRecord], SessionRecord]


class Writing:
    """Records that are being written for one session."""

    def __init__(self, broker: Broker) -> None:
        """Nothing is written yet."""
        self._broker = broker
        self.new = Tally()
        """What was written and had not been there."""
        self.finish: Finish = lambda record: record
        """What else becomes of the session's record when they are counted."""

    async def store(self, results: Sequence[str], record: ResultRecord) -> list[bool]:
        """Store one record under many subjects; tell for each whether it is the one that is there now.

        Raises what kept one from being stored; then others may have been.
        """
        data = record.encode()
        stored: list[bool] = []
        for begin in range(0, len(results), BATCH):
            some = results[begin : begin + BATCH]
            stores = [await self._broker.begin_store(result, data, STORE_TIMEOUT_S) for result in some]
            outcomes = await asyncio.gather(*stores, return_exceptions=True)
            fault = next((o for o in outcomes if not isinstance(o, int | Duplicate)), None)
            if fault is not None:
                raise fault if isinstance(fault, FlameError) else FlameError(repr(fault))
            stored.extend(isinstance(outcome, int) for outcome in outcomes)
            self.new += Tally.of(record.state, sum(isinstance(outcome, int) for outcome in outcomes))
        return stored


@dataclass(frozen=True, slots=True)
class _Announced:
    """That this scheduler is writing."""

    behind: int
    """Where the result stream ended before."""
    resumed: bool
    """Somebody was writing from there on already, and has not counted it."""


class Recorder:
    """Writes for sessions, one at a time for each."""

    def __init__(self, broker: Broker, store: Store, name: str) -> None:
        """Write as the scheduler ``name``, which no other one that lives has."""
        self._broker = broker
        self._store = store
        self._name = name
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def writing(self, application: str, session: str) -> AsyncIterator[Writing]:
        """Write records of a session. They are counted when the block ends; if it raises, by whoever writes next.

        Nothing is counted for a session that has no record.
        """
        lock = self._locks.setdefault(session, asyncio.Lock())
        async with lock:
            writing = Writing(self._broker)
            announced = await self._announce(application, session)
            yield writing
            if announced is not None:
                await self._count(application, session, announced, writing)

    def is_writing(self, session: str) -> bool:
        """Whether this scheduler is writing for a session."""
        lock = self._locks.get(session)
        return lock is not None and lock.locked()

    async def _announce(self, application: str, session: str) -> _Announced | None:
        """Say that this scheduler is writing; ``None`` if there is nothing to say it in.

        If another one is, that is waited for a little: one that is gone never finishes.
        """
        loop = asyncio.get_running_loop()
        give_up = loop.time() + PATIENCE_S
        last = (await self._broker.stream_state(subjects.result_stream(application))).last_sequence
        announced: _Announced | None = None

        def announce(record: SessionRecord) -> SessionRecord | None:
            nonlocal announced
            announced = None
            if record.writer not in ("", self._name) and loop.time() < give_up:
                return None
            announced = _Announced(record.written_from if record.writer else last, resumed=bool(record.writer))
            return record.changed(writer=self._name, written_from=announced.behind)

        while True:
            found = await self._store.sessions.change(session, announce)
            if found is None or announced is not None:
                break
            await asyncio.sleep(_LOOK_S)
        if announced is not None and announced.resumed:
            log.warning("records were written and not counted; they are now", session=session)
        return announced

    async def _count(self, application: str, session: str, announced: _Announced, writing: Writing) -> None:
        new = writing.new
        if announced.resumed:
            reading = await read_tallies(self._broker, application, session, {CONTROL: announced.behind})
            new = reading.by_writer[CONTROL]

        def count(record: SessionRecord) -> SessionRecord:
            # Whoever has taken this over meanwhile counts by reading, and so all that was written here.
            if record.writer == self._name and record.written_from == announced.behind:
                record = new.added_to(record).changed(writer="", written_from=0)
            return writing.finish(record)

        await self._store.sessions.change(session, count)
