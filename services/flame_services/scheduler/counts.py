"""How many tasks a session has in which state, from what is stored and what executors report."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Final

from flame.broker.seam import Broker, ConsumerState
from flame.errors import FlameError
from flame.protocol import subjects
from flame.protocol.api import SessionInfo
from flame.protocol.records import SessionRecord
from flame_services.scheduler.view import Session, View

FEW: Final = 32
"""Up to so many consumers are asked one by one. A list of an application's costs what all its sessions cost, and in a
cluster of brokers 4 s whenever one is just being deleted."""


async def count_tasks(broker: Broker, view: View, sessions: Iterable[Session]) -> list[SessionInfo]:
    """Return the sessions with their counts.

    Waiting and running tasks together are what a consumer or the stream holds; running ones are what executors say.
    """
    chosen = list(sessions)
    stored = await _count_in_consumers(broker, [session.record for session in chosen if session.bindings])
    waiting = [session for session in chosen if not session.bindings and session.demand]
    found = await asyncio.gather(*(_count_stored(broker, session) for session in waiting))
    by_session = {session.id: count for session, count in zip(waiting, found, strict=True)}
    return [_info(view, session, stored, by_session) for session in chosen]


async def _count_in_consumers(broker: Broker, bound: list[SessionRecord]) -> dict[str, int]:
    """Return how much consumers have to do, by name; those that can't be asked now are left out."""
    found: list[ConsumerState] = []
    if len(bound) <= FEW:
        states = await asyncio.gather(*(_consumer_of(broker, record) for record in bound))
        found.extend(state for state in states if state is not None)
    else:
        for application in {record.application for record in bound}:
            with contextlib.suppress(FlameError):
                found.extend(await broker.consumers(subjects.task_stream(application)))
    return {state.name: state.pending + state.unacknowledged for state in found}


async def _consumer_of(broker: Broker, record: SessionRecord) -> ConsumerState | None:
    try:
        return await broker.consumer_state(
            subjects.task_stream(record.application), subjects.consumer(record.id, record.epoch)
        )
    except FlameError:
        return None


async def _count_stored(broker: Broker, session: Session) -> int:
    record = session.record
    try:
        pattern = subjects.session_tasks(record.application, record.id)
        return len(await broker.subjects(subjects.task_stream(record.application), pattern))
    except FlameError:
        return 0


def _info(view: View, session: Session, stored: dict[str, int], waiting: dict[str, int]) -> SessionInfo:
    record = session.record
    executors = [view.executors[key].record for key in session.bindings if key in view.executors]
    running = sum(executor.running for executor in executors)
    unfinished = (
        stored.get(subjects.consumer(record.id, record.epoch), 0) if session.bindings else waiting.get(record.id, 0)
    )
    return SessionInfo(
        session=record,
        pending=max(0, unfinished - running),
        running=min(running, unfinished),
        succeeded=record.succeeded + sum(executor.succeeded for executor in executors),
        failed=record.failed + sum(executor.failed for executor in executors),
        cancelled=record.cancelled,
    )
