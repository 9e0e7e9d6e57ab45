"""Finding what was stored without anybody noticing, also in sessions that have ended, and what was left over.

Every ten seconds what each application's stream holds is compared with what its consumers account for. What this
program can't read is none of its business: tasks and consumers of such sessions are left alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker
from flame.cancel import end_task
from flame.errors import FlameError, MalformedMessage
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.states import SessionState
from flame_services.scheduler.left_values import LeftValues
from flame_services.scheduler.parts import Session
from flame_services.scheduler.session_data import forget_common_data, forget_session_data
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

SWEEP_S: Final = 10.0


class Sweep:
    """Looks at every application now and then."""

    def __init__(
        self,
        broker: Broker,
        view: View,
        store: Store,
        recheck: Callable[[str], None],
        settle_orphans: Callable[[str, str], None],
    ) -> None:
        """Call ``recheck`` with sessions that hold tasks which nobody may have noticed.

        Call ``settle_orphans`` with an application, and a session of it that has ended, or never was, and holds tasks.
        """
        self._broker = broker
        self._view = view
        self._store = store
        self._recheck = recheck
        self._settle_orphans = settle_orphans
        self._suspects: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._values = LeftValues(broker, self._is_over)

    def start(self) -> None:
        """Begin to sweep."""
        self._task = asyncio.create_task(self._go_on(), name="sweep")

    async def stop(self) -> None:
        """Sweep no more."""
        await end_task(self._task)

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for application in tuple(self._view.applications):
                try:
                    await self._sweep(application)
                except StreamMissing:
                    continue  # just unregistered
                except FlameError as error:
                    log.debug("sweep interrupted", application=application, error=str(error))
                except Exception:
                    log.exception("sweep failed", application=application)
            await self._values.look(tuple(self._view.applications), self._loop.time())
            try:
                await self._forget_old_sessions()
            except FlameError as error:
                log.debug("sweep interrupted", error=str(error))

    async def _sweep(self, application: str) -> None:
        """Find stored tasks that no consumer of the application accounts for."""
        stream = subjects.task_stream(application)
        consumers = await self._broker.consumers(stream)
        accounted = sum(consumer.pending + consumer.unacknowledged for consumer in consumers)
        for consumer in consumers:
            await self._drop_if_left_over(application, consumer.name)
        state = await self._broker.stream_state(stream)
        if state.messages <= accounted:
            self._suspects.discard(application)
            return
        if application not in self._suspects:
            self._suspects.add(application)  # the two counts were not taken at once: be sure before looking closer
            return
        self._suspects.discard(application)
        stored = await self._broker.subjects(stream, subjects.task(application, "*", "*"))
        for session_id in {subjects.stored_session(subject) for subject in stored}:
            await self._look_at(application, session_id)

    async def _look_at(self, application: str, session_id: str) -> None:
        if not await self._store.is_known(session_id):
            self._settle_orphans(application, session_id)
        elif (session := self._readable(application, session_id)) is None:
            return
        elif session.record.state is not SessionState.OPEN and session.record.settled:
            self._settle_orphans(application, session_id)
        elif not session.busy:
            self._recheck(session_id)

    async def _drop_if_left_over(self, application: str, consumer: str) -> None:
        """Delete a consumer that no session's epoch belongs to: a scheduler ended between two steps."""
        try:
            session_id, epoch = subjects.consumer_session(consumer)
        except MalformedMessage:
            return
        if await self._store.is_known(session_id):
            session = self._readable(application, session_id)
            if session is None or session.busy or (session.record.epoch == epoch and session.bindings):
                return
            if session.record.epoch < epoch:
                return  # this view is behind
        log.info("deleting a consumer that was left over", consumer=consumer)
        await self._broker.delete_consumer(subjects.task_stream(application), consumer)

    async def _is_over(self, session_id: str) -> bool:
        """Whether a session has settled, or doesn't exist."""
        session = self._view.sessions.get(session_id)
        return session.record.settled if session is not None else not await self._store.is_known(session_id)

    def _readable(self, application: str, session_id: str) -> Session | None:
        """Return a session unless something about it can't be read."""
        return self._view.sessions.get(session_id) if self._store.readable(application, session_id) else None

    async def _forget_old_sessions(self) -> None:
        """Delete the records of sessions whose results have aged out: their ids may be used again."""
        oldest = time.time() - defaults.RESULT_AGE_S
        for session_id, session in list(self._view.sessions.items()):
            record = session.record
            if record.settled and record.ended < oldest and not session.bindings:
                await forget_common_data(self._broker, self._store, record)
                await forget_session_data(
                    self._broker, self._store, record
                )  # an executor that was given up may have lived on
                await self._store.sessions.delete(session_id)
