"""Looking after tasks of sessions that get no executor: those that expire meanwhile fail.

Executors do this themselves with what they take. Sessions that wait are looked at in turns, a few at a time, so that
many of them cost no more than few; what is known to expire is looked at again when it does. A session whose tasks are
all gone, expired or cancelled, waits for no executor any more.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker
from flame.cancel import end_task
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import Attempts, ResultRecord, TaskFault
from flame.protocol.records import SessionRecord
from flame.protocol.states import TaskState
from flame_services.scheduler.due import attempts_at, times_of
from flame_services.scheduler.parts import Session
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

ROUND_S: Final = 1.0
IN_TURNS: Final = 16
"""Sessions that are looked at in one round although nothing is known to expire in them."""
MOST: Final = 500
"""Tasks that are looked at in one session in one round."""


@dataclass(slots=True)
class _Known:
    """What is known of a session's tasks."""

    seen: int = 0
    """Tasks up to this sequence were looked at."""
    next_at: float = math.inf
    """When the first of them expires, Unix seconds."""


class Expiry:
    """Writes the records of tasks that expire while nobody serves their sessions."""

    def __init__(
        self,
        broker: Broker,
        view: View,
        store: Store,
        recorder: Recorder,
        holding: Callable[[], Iterable[str]],
        withdraw: Callable[[str], None],
    ) -> None:
        """Look at the sessions that ``holding`` names; call ``withdraw`` for one of them that holds nothing."""
        self._broker = broker
        self._view = view
        self._store = store
        self._recorder = recorder
        self._holding = holding
        self._withdraw = withdraw
        self._known: dict[str, _Known] = {}
        """In the order in which the sessions were looked at."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._go_on(), name="expiry")

    async def stop(self) -> None:
        """Look no more."""
        await end_task(self._task)

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(ROUND_S)
            for session in self._chosen(time.time()):
                try:
                    await self._look_at(session)
                except StreamMissing:
                    continue  # its application was just unregistered
                except FlameError as error:
                    log.debug("could not look for expired tasks", session=session.id, error=str(error))
                except Exception:
                    log.exception("a look for expired tasks failed", session=session.id)

    def _chosen(self, now: float) -> list[Session]:
        """Return the sessions to look at in this round."""
        holding = {name: self._known.get(name) for name in self._holding()}
        self._known = {name: known for name, known in self._known.items() if name in holding}
        due = [name for name, known in self._known.items() if known.next_at <= now]
        new = [name for name, known in holding.items() if known is None]
        chosen = dict.fromkeys([*due, *[*new, *self._known][:IN_TURNS]])
        found = (self._view.sessions.get(name) for name in chosen)
        return [session for session in found if session is not None and self._is_left_to_us(session)]

    def _is_left_to_us(self, session: Session) -> bool:
        return not session.bindings and self._store.readable(session.record.application, session.id)

    async def _look_at(self, session: Session) -> None:
        known = self._known.pop(session.id, None) or _Known()
        self._known[session.id] = known  # the last in its turn
        now = time.time()
        if known.next_at <= now:
            known.seen, known.next_at = 0, math.inf
        expired = await self._read_on(session, known, now)
        if expired and self._is_left_to_us(session):
            await self._give_up(session, expired)
        if await self._broker.first_stored(*_tasks_of(session.record)) is None and self._is_left_to_us(session):
            self._withdraw(session.id)

    async def _read_on(self, session: Session, known: _Known, now: float) -> list[str]:
        """Return the subjects of tasks that have expired, of some that were not looked at."""
        record, spec = session.record, self._view.spec_of(session)
        stream, pattern = _tasks_of(record)
        expired: list[str] = []
        for _ in range(MOST):
            message = await self._broker.first_stored(stream, pattern, known.seen)
            if message is None:
                break
            known.seen = message.sequence
            expires_at = times_of(message.data, message.stored_at, spec).expires_at
            if expires_at > now:
                known.next_at = min(known.next_at, expires_at)
            elif await attempts_at(self._broker, record, message.subject) == Attempts():
                expired.append(message.subject)
        return expired

    async def _give_up(self, session: Session, expired: list[str]) -> None:
        """Give tasks their records, then remove them."""
        application = session.record.application
        fault = TaskFault(ErrorCode.TASK_EXPIRED, "it was not started in the time that it was worth starting in")
        record = ResultRecord(TaskState.FAILED, error=fault, attempt=0, finished=time.time())
        prefix = subjects.task(application, session.id, "")
        results = [subjects.result(application, session.id, subject.removeprefix(prefix)) for subject in expired]
        async with self._recorder.writing(application, session.id) as writing:
            await writing.store(results, record)
            for subject in expired:
                await self._broker.purge(subjects.task_stream(application), subject)
        log.info("gave up tasks that have expired", session=session.id, tasks=len(expired))


def _tasks_of(session: SessionRecord) -> tuple[str, str]:
    """Return where a session's tasks are stored, and under which subjects."""
    return subjects.task_stream(session.application), subjects.session_tasks(session.application, session.id)
