"""Ending sessions: finding that one is drained or idle, and giving the tasks that are left their records."""

from __future__ import annotations

import time

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.codes import ReasonCode
from flame.protocol.records import SessionRecord
from flame.protocol.states import SESSION, CloseMode, SessionEvent, SessionState
from flame_services.scheduler.closing import close_session
from flame_services.scheduler.recorder import Recorder, Writing
from flame_services.scheduler.session_data import forget_session_data
from flame_services.scheduler.settle import settle_tasks
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import Session, View

log = get_logger("flame.scheduler")


class Ending:
    """Ends sessions that nobody serves. Everything can be begun again after any interruption."""

    def __init__(self, broker: Broker, view: View, store: Store, recorder: Recorder) -> None:
        """Write records through ``recorder``."""
        self._broker = broker
        self._view = view
        self._store = store
        self._recorder = recorder

    async def look(self, session: Session) -> None:
        """See whether a session that drains has a task left."""
        record = session.record
        pattern = subjects.session_tasks(record.application, record.id)
        try:
            found = await self._broker.first_stored(subjects.task_stream(record.application), pattern)
        except StreamMissing:
            found = None  # its tasks went with its application
        session.drained = found is None  # otherwise whoever listens for its tasks tells when one may be started
        self._view.touch(session)

    async def close_idle(self, session: Session) -> None:
        """Close a session that has had no task for as long as it may; should one come just now, it still runs."""
        if session.record.state is not SessionState.OPEN or session.bindings or session.demand or session.holds_tasks:
            return  # there is a task after all
        own = session.record.options.idle_timeout_s
        limit_s = self._view.spec_of(session).idle_timeout_s if own is None else own
        reason = f"it had no task for {limit_s:g} s"
        await close_session(self._store, session.id, CloseMode.DRAIN, reason, ReasonCode.IDLE_TIMEOUT)

    async def settle(self, session: Session) -> None:
        """Give every task of an ended session its record, then say that the session is over."""
        record = session.record
        await forget_session_data(self._broker, self._store, record)
        if record.application not in self._view.applications:  # its streams, and what was not counted, went with it
            await self._store.sessions.change(
                session.id, lambda current: _settled(current).changed(writer="", written_from=0)
            )
        elif not await self._holds_anything(session):
            await self._store.sessions.change(session.id, _settled)
        else:
            async with self._recorder.writing(record.application, record.id) as writing:
                writing.finish = _settled
                await settle_tasks(self._broker, writing, record.application, record.id, record)
        log.info("session ended", session=session.id, state=session.record.state.value)

    async def _holds_anything(self, session: Session) -> bool:
        """Whether an ended session may have a task without a record, or records that are not counted."""
        record = session.record
        stream = subjects.task_stream(record.application)
        if record.epoch and record.epoch != session.without_consumer:
            await self._broker.delete_consumer(stream, subjects.consumer(record.id, record.epoch))
        pattern = subjects.session_tasks(record.application, record.id)
        return bool(record.writer) or await self._broker.first_stored(stream, pattern) is not None

    async def settle_late(self, application: str, session_id: str) -> None:
        """Give tasks their records that were stored although their session is over, or never was."""
        session = self._view.sessions.get(session_id)
        if session is None:
            await settle_tasks(self._broker, Writing(self._broker), application, session_id, None)
        else:
            async with self._recorder.writing(application, session_id) as writing:
                await settle_tasks(self._broker, writing, application, session_id, session.record)
        log.info("gave up tasks of a session that is over", session=session_id)


def _settled(record: SessionRecord) -> SessionRecord:
    """Return the record of a session that has ended once all its tasks have theirs."""
    if record.settled or record.state is SessionState.OPEN:
        return record
    failed = record.state is SessionState.FAILED
    return record.changed(
        state=record.state if failed else SESSION.next(record.state, SessionEvent.SETTLED),
        settled=True,
        ended=time.time(),
        counted=(),
        strays={},
    )
