"""Learning that a session which nobody serves has a task that may be started.

A subscription for one message tells at once. It can miss a publish that races with it, so the stream is looked at
right after, twice more within a second, and after every reconnect; `flame_services.scheduler.sweep` finds what was
stored without anybody noticing all the same. A task that may not be started yet, since it was to be delayed or failed
a moment ago, is looked at again when it may; until then the subscription goes on for those that are stored meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from flame.broker.seam import Broker, Subscription
from flame.cancel import end_tasks
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.states import SessionState
from flame_services.scheduler.due import look_for_due, times_of
from flame_services.scheduler.parts import Session
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

LOOKS_S: Final = (0.02, 1.0)
"""When the stream is looked at again after the first look. What that misses was stored in the same millisecond, in 3 of
2,000 trials; on a busy machine, or in a cluster of brokers, it may take longer to be seen."""
_STOP_S: Final = 1.0


@dataclass(slots=True)
class _Listening:
    """What is held for a session that nobody serves."""

    application: str
    subscription: Subscription | None = None
    later_look: asyncio.TimerHandle | None = None
    due: asyncio.TimerHandle | None = None
    due_at: float = math.inf
    """When the first task that is known, and may not be started yet, may be started, Unix seconds."""
    seen: int = 0
    """Tasks up to this sequence of their stream were looked at, and none may be started before `due_at`."""
    looking: bool = False
    look_again: bool = False


class Demand:
    """Marks sessions in the view that have a task to start and nobody who serves them."""

    def __init__(self, broker: Broker, view: View, on_demand: Callable[[], None]) -> None:
        """Call ``on_demand`` whenever a mark was set."""
        self._broker = broker
        self._view = view
        self._on_demand = on_demand
        self._loop = asyncio.get_running_loop()
        self._listening: dict[str, _Listening] = {}
        self._unserved: set[str] = set()
        """Sessions with a mark."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._forget: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Listen for every session that needs it."""
        self._forget = self._broker.on_reconnect(self._look_at_all)
        for session_id in self._view.sessions:
            self.review(session_id)

    async def stop(self) -> None:
        """Listen no more."""
        self._forget()
        await end_tasks(self._tasks)
        for session_id in tuple(self._listening):
            self._stop_listening(session_id)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_S)

    def review(self, session_id: str) -> None:
        """Listen for a session that has tasks started and no executor that stays; stop listening for any other."""
        session = self._view.sessions.get(session_id)
        if session is not None and self._starts_tasks(session) and all(b.leave for b in session.bindings.values()):
            if session_id not in self._listening and not session.demand:
                self._listening[session_id] = _Listening(session.record.application)
                self._note_tasks(session, held=True)
                self._spawn(self._listen(session_id))
            return
        self._stop_listening(session_id)
        self._unserved.discard(session_id)
        if session is not None and session.demand:
            session.demand = False
            self._view.touch(session)

    def recheck(self, session_id: str) -> None:
        """Look whether a session has a task to start, if nobody serves it: there is one that may not be known."""
        if session_id in self._listening:
            self._spawn(self._look(session_id))
        else:
            self.review(session_id)  # should its last executor have gone unseen, this listens, and looks at once

    def withdraw(self, session_id: str) -> None:
        """Take back that a session has a task to start: none is stored any more. It is listened for again."""
        session = self._view.sessions.get(session_id)
        if session is not None and session.demand and not session.busy:
            session.demand = False
            self._unserved.discard(session_id)
            self._view.touch(session)
            self.review(session_id)
            self._on_demand()

    def holding(self) -> Iterator[str]:
        """Return the sessions that have tasks, as far as is known, and nobody who serves them."""
        yield from self._unserved
        yield from (name for name, listening in self._listening.items() if listening.due is not None)

    @staticmethod
    def _starts_tasks(session: Session) -> bool:
        return session.record.state is SessionState.OPEN or session.drains

    def _stop_listening(self, session_id: str) -> None:
        listening = self._listening.pop(session_id, None)
        if listening is None:
            return
        for timer in (listening.later_look, listening.due):
            if timer is not None:
                timer.cancel()
        if listening.subscription is not None:
            self._spawn(listening.subscription.stop())

    def _note_tasks(self, session: Session, *, held: bool) -> None:
        """Say whether tasks are stored that may not be started yet, or may be: then the session isn't idle."""
        if session.holds_tasks is not held:
            session.holds_tasks = held
            self._view.touch(session)

    # ---- listening

    async def _listen(self, session_id: str) -> None:
        """Listen for one message, then look at what was stored before."""
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
        heard.add_done_callback(lambda future: None if future.cancelled() else self._heard(session_id, future.result()))
        if listening.later_look is not None:
            listening.later_look.cancel()
        listening.later_look = self._loop.call_later(LOOKS_S[0], self._look_later, session_id, 1)
        await self._look(session_id)

    def _heard(self, session_id: str, task: bytes) -> None:
        listening = self._listening.get(session_id)
        session = self._view.sessions.get(session_id)
        if listening is None or session is None:
            return
        now = time.time()
        due_at = times_of(task, now, self._view.spec_of(session)).due_at
        if due_at <= now:
            self._found(session_id)
            return
        listening.subscription = None  # it was for one message
        self._note_tasks(session, held=True)
        self._wait_until(session_id, listening, due_at)
        self._spawn(self._listen(session_id))

    def _wait_until(self, session_id: str, listening: _Listening, due_at: float) -> None:
        if due_at < listening.due_at:
            if listening.due is not None:
                listening.due.cancel()
            listening.due_at = due_at
            listening.due = self._loop.call_later(max(0.0, due_at - time.time()), self._is_due, session_id)

    def _is_due(self, session_id: str) -> None:
        listening = self._listening.get(session_id)
        if listening is not None:
            listening.due, listening.due_at, listening.seen = None, math.inf, 0
            self._spawn(self._look(session_id))

    # ---- looking

    def _look_later(self, session_id: str, place: int) -> None:
        """Look again, and once more later, while there are times in `LOOKS_S`."""
        listening = self._listening.get(session_id)
        if listening is None:
            return
        self._spawn(self._look(session_id))
        listening.later_look = None
        if place < len(LOOKS_S):
            listening.later_look = self._loop.call_later(LOOKS_S[place], self._look_later, session_id, place + 1)

    def _look_at_all(self) -> None:
        for session_id in tuple(self._listening):
            self._spawn(self._look(session_id))

    async def _look(self, session_id: str) -> None:
        """Look at what is stored and was not looked at; one look at a time."""
        listening = self._listening.get(session_id)
        if listening is None:
            return
        listening.look_again = listening.looking
        if listening.looking:
            return
        listening.looking = True
        try:
            await self._look_at(session_id, listening)
        except FlameError as error:
            log.debug("could not look for a session's tasks; the sweep will", session=session_id, error=str(error))
        finally:
            listening.looking = False
        if listening.look_again:
            await self._look(session_id)

    async def _look_at(self, session_id: str, listening: _Listening) -> None:
        session = self._view.sessions.get(session_id)
        if session is None:
            return
        outlook = await look_for_due(self._broker, session.record, self._view.spec_of(session), listening.seen)
        if self._listening.get(session_id) is not listening:
            return
        if outlook.found:
            self._found(session_id)
            return
        listening.seen = max(listening.seen, outlook.seen)
        self._wait_until(session_id, listening, outlook.due_at)
        self._note_tasks(session, held=listening.due is not None)

    def _found(self, session_id: str) -> None:
        if session_id not in self._listening:
            return
        self._stop_listening(session_id)
        session = self._view.sessions.get(session_id)
        if session is not None and self._starts_tasks(session):
            session.demand = True
            self._unserved.add(session_id)
            self._view.touch(session)
            self._on_demand()

    def _spawn(self, coroutine: object) -> None:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a look for waiting tasks failed", exc_info=error)
