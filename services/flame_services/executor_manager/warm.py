"""Processes that are started before there is a session for them.

Each comes as far as its first report, which asks for its session. The answer is held back until there is one. An
executor that says it is patient is told to ask again before it would give up waiting; for any other the answer is
ready when it asks again by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from flame.protocol.supervision import ExecutorReport
from flame_services.executor_manager.berth import Berth
from flame_services.executor_manager.process import ExecutorProcess
from flame_services.executor_manager.trial import Trial

HOLD_S: Final = 1.5
"""How long a patient executor is kept waiting for an answer: it waits for 2 s."""
_HOLD_OTHERS_S: Final = 60.0


class Warm:
    """One of them, from its start until it is given to an executor."""

    def __init__(self, berth: Berth, process: ExecutorProcess, trial: Trial | None = None) -> None:
        """Look after a process with a berth of its own; with ``trial`` it may still become a template."""
        self.name: Final = berth.name
        """What it was started as, and what it reports as until it is told of its executor."""
        self.berth: Final = berth
        self.process: Final = process
        self.trial: Final = trial
        self.started = ""
        """How that was, as it says itself."""
        self.ready = False
        """It has asked for its session."""
        self._given = asyncio.Event()

    @property
    def takeable(self) -> bool:
        """Whether it is sure to be an executor."""
        return self.trial is None or (self.trial.over.is_set() and self.trial.template is None)

    async def hold(self, report: ExecutorReport) -> bool:
        """Hold the answer to a report back; tell whether it can be answered now, since there is an executor."""
        self.ready = True
        self.started = self.started or report.started
        if self.trial is not None:
            self.trial.heard(report.started)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HOLD_S if report.patient else _HOLD_OTHERS_S):
                await self._given.wait()
        return self._given.is_set()

    def give(self) -> None:
        """Let its questions be answered: from now on it is an executor's."""
        self._given.set()
