"""What becomes of a session when one of its executors has ended, or was lost with its node."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Final

from flame.broker.seam import Broker
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.codes import ReasonCode
from flame.protocol.records import ExecutorRecord, SessionRecord
from flame.protocol.states import SESSION, ExecutorState, SessionEvent
from flame_services.scheduler.parts import goes_on
from flame_services.scheduler.store import Store
from flame_services.scheduler.tally import Tally, read_tallies, tally_lost
from flame_services.scheduler.view import Session, View

log = get_logger("flame.scheduler")

BLAMELESS: Final = frozenset({ReasonCode.MANAGER_RESTARTED, ReasonCode.MANAGER_STOPPED, ReasonCode.UNBOUND})
"""Ends that say nothing about whether the session can be entered."""


def backoff_s(failures: int, random_unit: float) -> float:
    """Return how long to wait after so many failures in a row, with jitter from ``random_unit`` in [0, 1)."""
    if failures <= 0:
        return 0.0
    longest = min(defaults.BACKOFF_MAX_S, defaults.BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 16))
    return longest * (0.5 + random_unit / 2)


class Reaper:
    """Takes over what executors leave behind. Everything can be done again: nobody is counted twice."""

    def __init__(self, broker: Broker, view: View, store: Store) -> None:
        """Write through ``store``."""
        self._broker = broker
        self._view = view
        self._store = store
        self._loop = asyncio.get_running_loop()

    async def reap(self, session: Session, key: str) -> None:
        """Count an executor that has ended, draw the conclusions, and let go of it."""
        binding = self._view.bindings.get(key)
        executor = self._view.executors.get(key)
        if binding is None or executor is None:
            return
        ended = executor.record
        tallies = {ended.id: Tally.reported(ended)}
        if not (ended.clean and ended.entered):  # otherwise it said at the end what it had done
            tallies = (await tally_lost(self._broker, [binding], {ended.id: ended})).by_writer
        self._judge(session, ended)
        refused = _could_not_enter(ended) and not self._entered(session)
        limit = self._view.spec_of(session).session_retry_limit

        def conclude(record: SessionRecord) -> SessionRecord:
            failures = record.bind_failures + 1 if refused else 0 if ended.entered else record.bind_failures
            record = record.changed(bind_failures=failures)
            if failures < limit or not goes_on(record):
                return record
            code = ended.code or ReasonCode.RETRY_LIMIT.value
            return record.changed(state=SESSION.next(record.state, SessionEvent.FAIL), reason=ended.reason, code=code)

        before = session.record.state
        await self._count(session, tallies, conclude)
        if session.record.state is not before:
            log.error("session failed", session=session.id, code=session.record.code, reason=session.record.reason)
        await self._store.bindings.delete(key)
        if not session.bindings:
            await self._broker.delete_consumer(subjects.task_stream(ended.application), binding.consumer)
            session.without_consumer = binding.epoch
            await self.count_strays(session)

    async def give_up(self, session: Session, keys: Sequence[str]) -> None:
        """Count executors that were lost with their nodes, and let go of them; their epoch must be over.

        They may live on, and store what they were running when they are heard of again: see `count_strays`.
        """
        lost = {key: binding for key in keys if (binding := session.bindings.get(key)) is not None}
        if not lost:
            return
        known = self._view.executors
        records = {binding.executor: known[key].record for key, binding in lost.items() if key in known}
        reading = await tally_lost(self._broker, list(lost.values()), records)

        def remember(record: SessionRecord) -> SessionRecord:
            return record.changed(strays={**record.strays, **dict.fromkeys(reading.by_writer, reading.last)})

        await self._count(session, reading.by_writer, remember)
        for key, binding in lost.items():
            await self._store.bindings.delete(key)
            await self._store.executors.delete(key)
            log.warning(
                "gave an executor up with its node", session=session.id, executor=binding.executor, node=binding.node
            )

    async def count_strays(self, session: Session) -> None:
        """Count what executors have stored after they were given up."""
        record = session.record
        if not record.strays:
            return
        reading = await read_tallies(self._broker, record.application, record.id, record.strays)
        found = sum(reading.by_writer.values(), Tally())
        if not found:
            return

        def count(current: SessionRecord) -> SessionRecord | None:
            if current.strays != record.strays:
                return None  # another one was given up meanwhile: next time
            return found.added_to(current).changed(strays=dict.fromkeys(current.strays, reading.last))

        await self._store.sessions.change(session.id, count)

    async def _count(
        self, session: Session, tallies: dict[str, Tally], conclude: Callable[[SessionRecord], SessionRecord]
    ) -> None:
        """Add what executors did to their session's record, once, with what follows from their end."""

        def count(record: SessionRecord) -> SessionRecord | None:
            fresh = {name: tally for name, tally in tallies.items() if name not in record.counted}
            if not fresh:
                return None  # a scheduler ended before it had let go of them
            bound = {binding.executor for binding in session.bindings.values()}
            counted = (*(name for name in record.counted if name in bound), *fresh)
            record = sum(fresh.values(), Tally()).added_to(record).changed(counted=counted)
            return conclude(record if bound - set(tallies) else record.changed(idle_since=time.time()))

        await self._store.sessions.change(session.id, count)

    def _judge(self, session: Session, ended: ExecutorRecord) -> None:
        """Back off after an executor that did not end in order."""
        if ended.clean:
            session.crashes = 0
            session.avoid = ""
            return
        session.crashes += 1
        session.avoid = ended.node
        wait_s = backoff_s(session.crashes if not ended.entered else session.crashes - 1, random.random())
        session.retry_at = self._loop.time() + wait_s
        log.warning(
            "an executor ended out of order",
            session=session.id,
            executor=ended.id,
            node=ended.node,
            code=ended.code,
            reason=ended.reason.partition("\n")[0],
            retry_in_s=round(wait_s, 3),
        )

    def _entered(self, session: Session) -> bool:
        """Whether some executor of the session has entered it: then it is not the session that is at fault."""
        records = (self._view.executors.get(key) for key in session.bindings)
        return any(e is not None and e.record.state is ExecutorState.BOUND for e in records)


def _could_not_enter(ended: ExecutorRecord) -> bool:
    """Whether an executor failed to enter its session, and not because of what happened to its node."""
    return (
        not ended.clean and not ended.entered and ended.state is ExecutorState.RELEASED and ended.code not in BLAMELESS
    )
