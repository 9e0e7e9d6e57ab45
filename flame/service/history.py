"""What became of a task before: whether it has its record, and how its earlier runs ended."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import NamedTuple

from flame.broker.errors import RevisionConflict, StreamMissing
from flame.broker.seam import Broker, Delivery, Entry
from flame.errors import FlameError, MalformedMessage
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.messages import Attempts
from flame.protocol.supervision import Assignment
from flame.service.holdings import Holdings

log = get_logger("flame.executor")


class Past(NamedTuple):
    """What is known of a task."""

    recorded: bool
    """It has its record and must not run."""
    attempts: Attempts


class History:
    """Looks up what became of a session's tasks, by leader reads."""

    def __init__(self, broker: Broker, assignment: Assignment, holdings: Holdings) -> None:
        """Look up tasks that are among ``holdings``."""
        self._broker = broker
        self._holdings = holdings
        self._tasks = len(subjects.task(assignment.application, assignment.session, ""))
        self._results = subjects.result(assignment.application, assignment.session, "")
        self._stream = subjects.result_stream(assignment.application)

    async def look(self, delivery: Delivery) -> Past | None:
        """Look up a task, however long that takes; ``None`` if it is not this executor's any more."""
        result = self._results + delivery.subject[self._tasks :]
        attempts = self._broker.bucket(subjects.ATTEMPTS)
        while self._holdings.certain(delivery.handle, time.monotonic()):
            try:
                found, entry = await asyncio.gather(
                    self._broker.last(self._stream, result), attempts.get(subjects.task_key(delivery.subject))
                )
            except StreamMissing:
                return None  # its application is gone
            except FlameError:
                await asyncio.sleep(defaults.BACKOFF_FIRST_S)
            else:
                return Past(found is not None, _attempts(entry))
        return None

    async def has_record(self, task: str) -> bool:
        """Whether a task has its record; ``False`` also if that can't be found out now."""
        try:
            return await self._broker.last(self._stream, self._results + task) is not None
        except FlameError as error:
            log.debug("it is not known whether a task has its record", task=task, error=str(error))
            return False

    async def note_raised(self, delivery: Delivery, raised: int, not_before: float) -> None:
        """Note that the service has raised ``raised`` times, unless the task is not this executor's any more."""
        bucket = self._broker.bucket(subjects.ATTEMPTS)
        key = subjects.task_key(delivery.subject)
        while self._holdings.certain(delivery.handle, time.monotonic()):
            try:
                entry = await bucket.get(key)
                value = replace(_attempts(entry), raised=raised, not_before=not_before).encode()
                if entry is None or entry.value is None:
                    await bucket.create(key, value)
                else:
                    await bucket.update(key, value, entry.revision)
            except RevisionConflict:
                continue
            except FlameError as error:
                log.debug("an attempt could not be noted; trying again", task=key, error=str(error))
                await asyncio.sleep(defaults.BACKOFF_FIRST_S)
            else:
                return


def _attempts(entry: Entry | None) -> Attempts:
    """Read what is noted of a task's runs. What can't be read must not stop the task."""
    if entry is None or entry.value is None:
        return Attempts()
    try:
        return Attempts.decode(entry.value)
    except MalformedMessage as error:
        log.warning("a count of attempts can't be read", task=entry.key, error=str(error))
        return Attempts()
