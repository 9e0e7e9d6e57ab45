"""Announcing every change of state, once, to whoever listens.

What the events mean is said in `flame.protocol.events`. They are made where the scheduler learns of a change, and sent
by a task of their own: whoever tells the herald something never waits for the broker and hears of no failure.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import Final, NamedTuple

from flame.broker.seam import Broker
from flame.cancel import end_task
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.events import ClusterEvent
from flame.protocol.records import ApplicationRecord, ExecutorRecord, SessionRecord
from flame.protocol.states import ExecutorState, NodeState
from flame_services.scheduler.changes import (
    Judgement,
    application_event,
    executor_event,
    node_event,
    of_session,
    session_event,
)
from flame_services.scheduler.parts import Executor, Session, goes_on
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

MOST_WAITING: Final = 20_000
"""Events that are kept while the broker takes none; then the oldest are dropped."""
AT_ONCE: Final = 64
"""Events that are sent before others get their turn."""
LAST_WORDS_S: Final = 1.0
"""How long a stop waits for what is not sent yet."""


class _Said(NamedTuple):
    """An event, and where it goes."""

    subject: str
    event: ClusterEvent
    record: SessionRecord | None
    """Goes with the event; encoded only when that is sent."""


class Herald:
    """Announces what the planning scheduler learns. It takes changes in the order in which they became known."""

    def __init__(self, broker: Broker, view: View) -> None:
        """Tell of what is in ``view``; nothing is sent before something changes."""
        self._broker = broker
        self._view = view
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Said] = deque()
        self._dropped = 0
        self._task: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """Send what is left, within a limit."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=LAST_WORDS_S)
            await end_task(self._task)

    # ---- what is told

    def application(self, before: ApplicationRecord | None, after: ApplicationRecord | None) -> None:
        """Tell of an application that changed, is new, or gone."""
        event = application_event(before, after)
        if event is not None:
            self._say(subjects.application_events(event.id), event)

    def session(self, before: SessionRecord | None, after: SessionRecord | None) -> None:
        """Tell of a session that changed, is new, or gone. The view must hold what is after."""
        event = session_event(before, after)
        if event is not None:
            self._say(_subject(event), event, after)
        session = None if after is None else self._view.sessions.get(after.id)
        if before is not None and session is not None and session.record.bind_failures > before.bind_failures:
            self._retrying(session)

    def executor(self, before: ExecutorRecord | None, after: ExecutorRecord | None) -> None:
        """Tell of an executor that changed, is new, or gone."""
        known = after or before
        if known is None:
            return
        node = self._view.nodes.get(known.node)
        lost = node is None or node.state is NodeState.NOT_READY
        event = executor_event(before, after, node_lost=lost)
        if event is not None:
            self._say(_subject(event), event)

    def node(self, name: str, before: Judgement | None, after: Judgement | None) -> None:
        """Tell of a node that is believed to be in another state, is new, or gone."""
        event = node_event(name, before, after)
        if event is not None:
            self._say(subjects.node_events(name), event)

    def waits(self, session: Session) -> None:
        """Tell what a session waits for now."""
        record = session.record
        event = of_session(record, "waiting", reason=session.waits_for)
        self._say(_subject(event), event, record)

    def _retrying(self, session: Session) -> None:
        """Tell that an executor could not enter, unless the session has failed of it."""
        record = session.record
        if not goes_on(record):
            return
        ended = self._failed_to_enter(session)
        limit = self._view.spec_of(session).session_retry_limit
        wait_s = max(0.0, session.retry_at - self._loop.time())
        reason = f"attempt {record.bind_failures} of {limit} failed, next in {wait_s:.1f} s"
        event = of_session(record, "retrying", reason=reason)
        if ended is not None:
            failed = ended.record
            why = f"{reason}: {failed.reason}" if failed.reason else reason
            event = replace(event, reason=why, code=failed.code, node=failed.node, executor=failed.id)
        self._say(_subject(event), event, record)

    def _failed_to_enter(self, session: Session) -> Executor | None:
        """Return the latest executor of a session that has ended without having entered it."""
        found = (self._view.executors.get(key) for key in session.bindings)
        ended = [
            e
            for e in found
            if e and e.record.state is ExecutorState.RELEASED and not (e.record.clean or e.record.entered)
        ]
        return max(ended, key=lambda e: e.record.updated, default=None)

    # ---- sending

    def _say(self, subject: str, event: ClusterEvent, record: SessionRecord | None = None) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft()
            self._dropped += 1
        self._waiting.append(_Said(subject, event, record))
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._send_all(), name="herald")

    async def _send_all(self) -> None:
        sent = 0
        while self._waiting:
            said = self._waiting.popleft()
            try:
                event = said.event if said.record is None else replace(said.event, record=said.record.encode())
                await self._broker.publish(said.subject, event.encode())
            except FlameError as error:
                log.debug("an event was not sent", subject=said.subject, event=said.event.event, error=str(error))
            except Exception:
                log.exception("an event could not be made", subject=said.subject, event=said.event.event)
            sent += 1
            if sent % AT_ONCE == 0:
                await asyncio.sleep(0)
        if self._dropped:
            log.warning("the broker took no events for a while, and some were dropped", events=self._dropped)
            self._dropped = 0


def _subject(event: ClusterEvent) -> str:
    return subjects.session_events(event.application, event.session)
