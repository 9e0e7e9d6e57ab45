"""What runs in an executor, and how it is stopped: at its limit, when it is cancelled, or by force."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection
from enum import Enum
from typing import Any, Final

from flame.broker.seam import Broker
from flame.errors import BrokerUnavailable
from flame.protocol import defaults, subjects
from flame.protocol.messages import RunningEvent
from flame.protocol.supervision import Assignment
from flame.service.contexts import TaskContext
from flame.service.history import History
from flame.service.holdings import Holdings

REMEMBERED_S: Final = 10.0
"""For how long a cancelled task is remembered that is not here: it may be on its way."""


class Stop(Enum):
    """Why a run is not to go on. The first reason counts."""

    CANCELLED = "cancelled"
    """The task has its record."""
    TIMEOUT = "timeout"
    FORCED = "forced"
    """The session is ended by force."""


class Run:
    """One task that it is the turn of."""

    __slots__ = ("announced", "attempt", "context", "deadline", "raised", "started", "stop", "task", "worker")

    def __init__(self, task: str, announced: bool) -> None:
        self.task = task
        self.announced = announced
        """Somebody was told that it runs."""
        self.attempt = 1
        self.raised = 0
        """How often the service has raised before."""
        self.started = 0.0
        """Unix seconds; 0 before."""
        self.deadline = 0.0
        """Monotonic; 0: none."""
        self.stop: Stop | None = None
        self.context: TaskContext | None = None
        self.worker: asyncio.Task[Any] | None = None
        """Who runs user code for it, and as long as it does: what is cancelled then is that code, and nothing else."""

    def end(self, why: Stop) -> None:
        """Have it stopped: user code sees a cancellation, and ``context.cancelled`` where that can't reach it."""
        if self.stop is not None:
            return
        self.stop = why
        if self.worker is not None and self.context is not None:
            self.context.cancelled = True
            self.worker.cancel()


class Running:
    """The runs of one executor."""

    def __init__(
        self, broker: Broker, assignment: Assignment, executor: str, holdings: Holdings, history: History
    ) -> None:
        """Begin with none; ``holdings`` are what waits to run."""
        self._broker = broker
        self._assignment = assignment
        self._executor = executor
        self._holdings = holdings
        self._history = history
        self._tasks = len(subjects.task(assignment.application, assignment.session, ""))
        self.runs: dict[str, Run] = {}
        """By the handles of their deliveries."""
        self.cancelled: set[str] = set()
        """Tasks that have their records, and may be among what waits or is on its way."""

    # ---- stopping

    def cancel(self, tasks: Collection[str]) -> None:
        """Stop runs of tasks that have their records, and begin none of them."""
        others = set(tasks)
        for run in self.runs.values():
            if run.task in others:
                others.discard(run.task)
                run.end(Stop.CANCELLED)
        self._remember(others)

    def force(self) -> None:
        """Stop everything that runs, and have it recorded as cancelled."""
        for run in self.runs.values():
            run.end(Stop.FORCED)

    def stop_late(self, now: float) -> None:
        """Stop what is over its time."""
        for run in self.runs.values():
            if 0 < run.deadline <= now and run.worker is not None:
                run.end(Stop.TIMEOUT)

    async def stop_recorded(self) -> None:
        """Stop what has its record: whoever cancelled it may have said so while this executor could not hear it."""
        for run in list(self.runs.values()):
            if run.worker is not None and await self._history.has_record(run.task):
                run.end(Stop.CANCELLED)

    def _remember(self, tasks: set[str]) -> None:
        if tasks:
            self.cancelled |= tasks
            asyncio.get_running_loop().call_later(REMEMBERED_S, self._forget, tasks)

    def _forget(self, tasks: set[str]) -> None:
        """Forget cancelled tasks that are not here."""
        here = {delivery.subject[self._tasks :] for delivery in self._holdings.waiting} & self.cancelled
        self.cancelled -= tasks - here
        self._remember(tasks & here)

    # ---- telling

    async def announce_long(self) -> None:
        """Say which tasks run that nobody listens for, if they have done so for long."""
        now = time.time()
        for run in list(self.runs.values()):
            if not run.announced and run.worker is not None and now - run.started >= defaults.RUNNING_NOTICE_S:
                run.announced = True
                await self.announce(run)

    async def announce(self, run: Run) -> None:
        """Say that a task runs."""
        subject = subjects.event(self._assignment.application, self._assignment.session, run.task, "running")
        with contextlib.suppress(BrokerUnavailable):  # live only: who misses it learns of the end
            await self._broker.publish(subject, RunningEvent(self._executor, run.attempt, run.started).encode())
