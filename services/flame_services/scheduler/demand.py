"""Learning that a session which nobody serves has a task.

A subscription for one message tells at once. It can miss a publish that races with it, so the stream is looked at
right after, a second later, and after every reconnect; and a sweep over each application finds whatever was stored
without anybody noticing, also in sessions that have ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker, Subscription
from flame.cancel import end_tasks
from flame.errors import FlameError, MalformedMessage
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.states import SessionState
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

SECOND_LOOK_S: Final = 1.0
SWEEP_S: Final = 10.0


@dataclass(slots=True)
class _Listening:
    """What is held for a session that nobody serves."""

    application: str
    subscription: Subscription | None = None
    second_look: asyncio.TimerHandle | None = None


class Demand:
    """Marks sessions in the view that have a task and nobody who serves them."""

    def __init__(self, broker: Broker, view: View, store: Store, on_demand: Callable[[], None]) -> None:
        """Call ``on_demand`` whenever a mark was set."""
        self._broker = broker
        self._view = view
        self._store = store
        self._on_demand = on_demand
        self._loop = asyncio.get_running_loop()
        self._listening: dict[str, _Listening] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._suspects: set[str] = set()
        self.settle_orphans: Callable[[str, str], None] = lambda _application, _session: None
        """Called with sessions that have ended, or never were, and hold tasks."""

    async def start(self) -> None:
        """Listen for every session that needs it, and begin to sweep."""
        self._forget = self._broker.on_reconnect(self._look_at_all)
        for session_id in self._view.sessions:
            self.review(session_id)
        self._spawn(self._sweep_forever())

    async def stop(self) -> None:
        """Listen no more."""
        if hasattr(self, "_forget"):
            self._forget()
        await end_tasks(self._tasks)
        for session_id in tuple(self._listening):
            self._stop_listening(session_id)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=SECOND_LOOK_S)

    def review(self, session_id: str) -> None:
        """Listen for a session that is open and has no executor that stays; stop listening for any other."""
        session = self._view.sessions.get(session_id)
        unserved = (
            session is not None
            and session.record.state is SessionState.OPEN
            and all(binding.leave for binding in session.bindings.values())
        )
        if session is not None and unserved:
            if session_id not in self._listening and not session.demand:
                self._listening[session_id] = _Listening(session.record.application)
                self._spawn(self._listen(session_id))
        else:
            self._stop_listening(session_id)
            if session is not None and session.demand:
                session.demand = False
                self._view.touch(session)

    def _stop_listening(self, session_id: str) -> None:
        listening = self._listening.pop(session_id, None)
        if listening is None:
            return
        if listening.second_look is not None:
            listening.second_look.cancel()
        if listening.subscription is not None:
            self._spawn(listening.subscription.stop())

    async def _listen(self, session_id: str) -> None:
        listening = self._listening.get(session_id)
        if listening is None:
            return
        try:
            heard, subscription = await self._broker.first(subjects.session_tasks(listening.application, session_id))
        except FlameError as error:
            log.warning("could not listen for a session's tasks; the sweep will find them", error=str(error))
            return
        if self._listening.get(session_id) is not listening:
            await subscription.stop()
            return
        listening.subscription = subscription
        heard.add_done_callback(lambda future: None if future.cancelled() else self._found(session_id))
        listening.second_look = self._loop.call_later(SECOND_LOOK_S, self._look_later, session_id)
        await self._look(session_id)

    def _look_later(self, session_id: str) -> None:
        if session_id in self._listening:
            self._spawn(self._look(session_id))

    def _look_at_all(self) -> None:
        for session_id in tuple(self._listening):
            self._spawn(self._look(session_id))

    async def _look(self, session_id: str) -> None:
        listening = self._listening.get(session_id)
        if listening is None:
            return
        stream = subjects.task_stream(listening.application)
        try:
            found = await self._broker.first_stored(stream, subjects.session_tasks(listening.application, session_id))
        except FlameError as error:
            log.debug("could not look for a session's tasks; the sweep will", session=session_id, error=str(error))
            return
        if found is not None:
            self._found(session_id)

    def _found(self, session_id: str) -> None:
        if session_id not in self._listening:
            return
        self._stop_listening(session_id)
        session = self._view.sessions.get(session_id)
        if session is not None and session.record.state is SessionState.OPEN:
            session.demand = True
            self._view.touch(session)
            self._on_demand()

    # ---- the sweep

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for application in tuple(self._view.applications):
                try:
                    await self._sweep(application)
                except StreamMissing:
                    continue  # just unregistered
                except FlameError as error:
                    log.debug("sweep interrupted", application=application, error=str(error))
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
            await self._drop_if_left_over(stream, consumer.name)
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
            session = self._view.sessions.get(session_id)
            if session is None or (session.record.state is not SessionState.OPEN and session.record.settled):
                self.settle_orphans(application, session_id)
            elif session_id in self._listening:
                log.warning("the sweep found a task that nobody had noticed", session=session_id)
                self._found(session_id)
            elif not session.busy:
                self.review(session_id)  # should its last executor have gone unseen, this listens, and looks at once

    async def _drop_if_left_over(self, stream: str, consumer: str) -> None:
        """Delete a consumer that no session's epoch belongs to: a scheduler ended between two steps."""
        try:
            session_id, epoch = subjects.consumer_session(consumer)
        except MalformedMessage:
            return
        session = self._view.sessions.get(session_id)
        if session is not None and (session.busy or (session.record.epoch == epoch and session.bindings)):
            return
        if session is not None and session.record.epoch < epoch:
            return  # this view is behind
        log.info("deleting a consumer that was left over", consumer=consumer)
        await self._broker.delete_consumer(stream, consumer)

    async def _forget_old_sessions(self) -> None:
        """Delete the records of sessions whose results have aged out: their ids may be used again."""
        oldest = time.time() - defaults.RESULT_AGE_S
        for session_id, session in list(self._view.sessions.items()):
            record = session.record
            if record.settled and record.ended < oldest and not session.bindings:
                if record.common_data_key:
                    await self._store.common_data.delete(record.common_data_key)
                await self._store.sessions.delete(session_id)

    def _spawn(self, coroutine: object) -> None:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a look for waiting tasks failed", exc_info=error)
