"""How many tasks a session has in which state, from what is stored, what executors report, and what was counted.

Counting asks the broker only about sessions that may hold a task: most of ten thousand are idle or over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from flame.broker.seam import Broker, ConsumerState
from flame.errors import FlameError
from flame.protocol import subjects
from flame.protocol.api import SessionInfo
from flame.protocol.records import SessionRecord
from flame_services.scheduler.tally import Tally
from flame_services.scheduler.view import Session, View

FEW: Final = 32
"""Up to so many consumers, or sessions, are asked for one by one. A list of an application's consumers costs what all
its sessions cost, and in a cluster of brokers 4 s whenever one is just being deleted."""
LISTED: Final = 256
"""Tasks that may be listed for each session whose tasks are counted; from there on asking for each is cheaper."""
AT_ONCE: Final = 64


async def count_tasks(broker: Broker, view: View, sessions: Iterable[Session]) -> list[SessionInfo]:
    """Return the sessions with their counts.

    Waiting and running tasks together are what a consumer or the stream holds; running ones are what executors say.
    """
    chosen = list(sessions)
    unfinished = await _count_in_consumers(broker, [session.record for session in chosen if session.bindings])
    few = len(chosen) <= FEW
    unknown = [s.record for s in chosen if s.id not in unfinished and not s.record.settled and (few or _may_hold(s))]
    by_application: dict[str, list[SessionRecord]] = {}
    for record in unknown:
        by_application.setdefault(record.application, []).append(record)
    for application, records in by_application.items():
        with contextlib.suppress(FlameError):  # gone, or not to be asked now
            unfinished.update(await _count_stored(broker, application, records))
    return [_info(view, session, unfinished.get(session.id, 0)) for session in chosen]


def _may_hold(session: Session) -> bool:
    """Whether a session may have a task although no consumer tells of it."""
    return bool(session.bindings) or session.demand or session.holds_tasks or session.unsettled


async def _count_in_consumers(broker: Broker, bound: Sequence[SessionRecord]) -> dict[str, int]:
    """Return how much sessions' consumers have to do, by session; those that can't be asked now are left out."""
    found: list[ConsumerState] = []
    if len(bound) <= FEW:
        states = await asyncio.gather(*(_consumer_of(broker, record) for record in bound))
        found.extend(state for state in states if state is not None)
    else:
        for application in {record.application for record in bound}:
            with contextlib.suppress(FlameError):
                found.extend(await broker.consumers(subjects.task_stream(application)))
    by_name = {state.name: state.pending + state.unacknowledged for state in found}
    names = {record.id: subjects.consumer(record.id, record.epoch) for record in bound}
    return {session: by_name[name] for session, name in names.items() if name in by_name}


async def _consumer_of(broker: Broker, record: SessionRecord) -> ConsumerState | None:
    try:
        return await broker.consumer_state(
            subjects.task_stream(record.application), subjects.consumer(record.id, record.epoch)
        )
    except FlameError:
        return None


async def _count_stored(broker: Broker, application: str, records: Sequence[SessionRecord]) -> dict[str, int]:
    """Return how many tasks of some sessions of one application are stored."""
    stream = subjects.task_stream(application)
    if len(records) > FEW and (await broker.stream_state(stream)).messages <= LISTED * len(records):
        stored = await broker.subjects(stream, subjects.task(application, "*", "*"))
        return Counter(subjects.stored_session(subject) for subject in stored)
    counts: dict[str, int] = {}
    for begin in range(0, len(records), AT_ONCE):
        some = records[begin : begin + AT_ONCE]
        patterns = [subjects.session_tasks(application, record.id) for record in some]
        found = await asyncio.gather(*(broker.subjects(stream, pattern) for pattern in patterns))
        counts |= {record.id: len(tasks) for record, tasks in zip(some, found, strict=True)}
    return counts


def _info(view: View, session: Session, unfinished: int) -> SessionInfo:
    record = session.record
    executors = [view.executors[key].record for key in session.bindings if key in view.executors]
    running = sum(executor.running for executor in executors)
    # Those that are let go of may be in the session's record already.
    reported = (Tally.reported(executor) for executor in executors if executor.id not in record.counted)
    ended = sum(reported, Tally(record.succeeded, record.failed, record.cancelled))
    return SessionInfo(
        session=record,
        pending=max(0, unfinished - running),
        running=min(running, unfinished),
        succeeded=ended.succeeded,
        failed=ended.failed,
        cancelled=ended.cancelled,
        waits_for=session.waits_for,
    )
