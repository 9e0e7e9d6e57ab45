"""Following what happens to a session and its tasks."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

from flame.client.feed import Feed
from flame.client.task import Task
from flame.protocol.events import ClusterEvent, Noun
from flame.protocol.progress import Progress
from flame.protocol.records import SessionRecord
from flame.protocol.states import ExecutorState, SessionState, TaskState

LOOK_S: Final = 5.0
"""After so long without an event the session is looked up: events are live and may be missed."""
QUIET_S: Final = 0.25
"""For how long the last events of others' tasks are waited for when the session has ended."""
REMEMBERED: Final = 100_000
"""Tasks of which is known what was told."""

SESSION: Final = "session"
TASK: Final = "task"
EXECUTOR: Final = "executor"
WAITING: Final = "waiting"
RETRYING: Final = "retrying"
PROGRESS: Final = "progress"

_RANK: Final = {TaskState.PENDING: 0, TaskState.RUNNING: 1}
_ENDED: Final = 2
_EXECUTOR_STATES: Final = frozenset(ExecutorState)
_LAST: Final = (SessionState.CLOSED, SessionState.FAILED)


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """Something that happened in a session."""

    kind: str
    """What it is about.

    ``session``: the session has another state. ``task``: one of its tasks has. ``executor``: one of its executors has.
    ``waiting``: why it has fewer executors than it could use is another, see ``reason``; with none it waits no more.
    ``retrying``: an executor failed to enter it, and another will try.
    ``progress``: how far one of its tasks is, see ``progress``.
    """
    time: float
    """When it happened, Unix seconds; where that isn't recorded, when the client heard of it."""
    session_id: str
    session_state: SessionState
    """The session's state as it is known then."""
    task_id: str = ""
    """Of which task, if it is about one."""
    task_state: TaskState | None = None
    executor: str = ""
    """Who runs or ran the task; which executor it is about, or which failed to enter the session."""
    reason: str = ""
    """Why the session or task failed, the task was cancelled or the executor ended; or what the session waits for."""
    code: str = ""
    """With a reason: which kind it is. Of a task an `flame.protocol.codes.ErrorCode`, otherwise a `ReasonCode`."""
    executor_state: ExecutorState | None = None
    """The executor's state, if it is about one."""
    node: str = ""
    """Where that executor is."""
    progress: Progress | None = None
    """How far the task is, if its service has told."""


class SessionWatch(Feed[SessionEvent]):
    """The events of one session from the moment it was made. Made by `Session.watch`."""

    def __init__(
        self, record: SessionRecord, look: Callable[[], Awaitable[bool]], home: asyncio.AbstractEventLoop
    ) -> None:
        """Begin with the session's present state; ``look`` learns what was missed and tells whether all has ended.

        ``home`` is the session's event loop.
        """
        super().__init__(f"the watch of session {record.id}", home)
        self._state = record.state
        self._id = record.id
        self._look = look
        self._over = False
        """All has ended; only what is on its way is waited for."""
        self._told: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._put_session(record)

    async def __anext__(self) -> SessionEvent:
        """Return the next event; ends when the session has ended and everything was told."""
        return await super().__anext__()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(QUIET_S if self._over or self._state in _LAST else LOOK_S):
                await self._news.wait()
        except TimeoutError:
            self._ended = self._over
            self._over = self._over or await self._look()
        else:
            self._over = False

    # ---- for the session

    def on_session(self, record: SessionRecord) -> None:
        """Take a state of the session over."""
        if record.state is not self._state:
            self._state = record.state
            self._put_session(record)
        self._news.set()

    def on_cluster(self, event: ClusterEvent) -> None:
        """Take over what is told of the session besides its states, and of its executors."""
        at = event.at or time.time()
        if event.noun is Noun.SESSION and event.event in (WAITING, RETRYING):
            self._put_told(event.event, at, event, event.executor, None)
        elif event.noun is Noun.EXECUTOR and event.state in _EXECUTOR_STATES:
            self._put_told(EXECUTOR, at, event, event.id, ExecutorState(event.state))

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
        code, reason = ("", "") if task.error is None else (str(task.error.code), task.error.message)
        now = at or time.time()
        self._put(SessionEvent(TASK, now, self._id, self._state, task.id, task.state, task.executor, reason, code))

    def on_progress(self, task_id: str, progress: Progress) -> None:
        """Take over how far a task is, unless it has ended."""
        told = self._told.get(task_id)
        if told is None or told[1] != _ENDED:
            at, running = progress.at or time.time(), TaskState.RUNNING
            event = SessionEvent(PROGRESS, at, self._id, self._state, task_id, running, progress.executor)
            self._put(replace(event, progress=progress))

    def _put_session(self, record: SessionRecord) -> None:
        at = record.created if record.state is SessionState.OPEN else record.ended
        self._put(SessionEvent(SESSION, at or time.time(), record.id, record.state, reason=record.reason))

    def _put_told(self, kind: str, at: float, event: ClusterEvent, executor: str, state: ExecutorState | None) -> None:
        told = SessionEvent(
            kind,
            at,
            self._id,
            self._state,
            executor=executor,
            reason=event.reason,
            code=event.code,
            executor_state=state,
            node=event.node,
        )
        self._put(told)
