"""Following what happens to a session and its tasks."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Self

from flame.client.task import Task
from flame.errors import FlameError
from flame.protocol.records import SessionRecord
from flame.protocol.states import SessionState, TaskState

LOOK_S: Final = 5.0
"""After so long without an event the session is looked up: events are live and may be missed."""
QUIET_S: Final = 0.25
"""For how long the last events of others' tasks are waited for when the session has ended."""
REMEMBERED: Final = 100_000
"""Tasks of which is known what was told."""

SESSION: Final = "session"
TASK: Final = "task"

_RANK: Final = {TaskState.PENDING: 0, TaskState.RUNNING: 1}
_ENDED: Final = 2
_LAST: Final = (SessionState.CLOSED, SessionState.FAILED)


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """Something that happened in a session."""

    kind: str
    """``session``: the session has another state. ``task``: one of its tasks has."""
    time: float
    """When it happened, Unix seconds; where that isn't recorded, when the client heard of it."""
    session_id: str
    session_state: SessionState
    """The session's state as it is known then."""
    task_id: str = ""
    """Of which task, if it is about one."""
    task_state: TaskState | None = None
    executor: str = ""
    """Who runs or ran the task."""
    reason: str = ""
    """Why the session or the task failed, or the task was cancelled."""


class SessionWatch(AsyncIterator[SessionEvent]):
    """The events of one session from the moment it was made. Made by `Session.watch`."""

    def __init__(self, record: SessionRecord, look: Callable[[], Awaitable[bool]]) -> None:
        """Begin with the session's present state; ``look`` learns what was missed and tells whether all has ended."""
        self._state = record.state
        self._id = record.id
        self._look = look
        self._events: deque[SessionEvent] = deque()
        self._told: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._news = asyncio.Event()
        self._error: FlameError | None = None
        self._ended = False
        self._put_session(record)

    def __aiter__(self) -> Self:
        """Return the watch."""
        return self

    async def __anext__(self) -> SessionEvent:
        """Return the next event; ends when the session has ended and everything was told."""
        over = False
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            try:
                async with asyncio.timeout(QUIET_S if over or self._state in _LAST else LOOK_S):
                    await self._news.wait()
            except TimeoutError:
                self._ended = over
                if not over:
                    over = await self._look()
        return self._events.popleft()

    # ---- for the session

    def on_session(self, record: SessionRecord) -> None:
        """Take a state of the session over."""
        if record.state is not self._state:
            self._state = record.state
            self._put_session(record)
        self._news.set()

    def on_task(self, task: Task) -> None:
        """Take a state of a task over, unless a later one was told."""
        rank = _RANK.get(task.state, _ENDED)
        place = (0, _ENDED) if rank == _ENDED else (task.attempt, rank)
        told = self._told.get(task.id)
        if told is not None and (told[1] == _ENDED or (rank != _ENDED and place <= told)):
            return
        self._told[task.id] = place
        self._told.move_to_end(task.id)
        if len(self._told) > REMEMBERED:
            self._told.popitem(last=False)
        at = task.finished if rank == _ENDED else task.started
        reason = task.error.message if task.error is not None else ""
        self._put(
            SessionEvent(TASK, at or time.time(), self._id, self._state, task.id, task.state, task.executor, reason)
        )

    def fail(self, error: FlameError) -> None:
        """Say that nothing more can be heard."""
        self._error = error
        self._news.set()

    def _put_session(self, record: SessionRecord) -> None:
        at = record.created if record.state is SessionState.OPEN else record.ended
        self._put(SessionEvent(SESSION, at or time.time(), record.id, record.state, reason=record.reason))

    def _put(self, event: SessionEvent) -> None:
        self._events.append(event)
        self._news.set()
