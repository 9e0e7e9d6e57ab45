"""When a stored task may be started, and until when that is worth it: its creator says so, or else its application."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

from flame.broker.seam import Broker
from flame.errors import MalformedMessage
from flame.protocol import subjects
from flame.protocol.messages import Attempts, TaskMessage, TaskOptions
from flame.protocol.records import ApplicationSpec, SessionRecord

_NO_OPTIONS = TaskOptions()
_FIRST = Attempts()


class Times(NamedTuple):
    """Unix seconds."""

    due_at: float
    """It isn't started before."""
    expires_at: float
    """It isn't started after this; infinite: it stays worth starting."""


def times_of(data: bytes, stored_at: float, spec: ApplicationSpec) -> Times:
    """Return a task's times by what is stored of it. What is no task is due: whoever takes it gives it its record."""
    try:
        options = TaskMessage.decode(data).options or _NO_OPTIONS
    except MalformedMessage:
        return Times(0.0, math.inf)
    delay_s = spec.delay_s if options.delay_s is None else options.delay_s
    expires_s = spec.expires_s if options.expires_s is None else options.expires_s
    return Times(stored_at + delay_s if delay_s else 0.0, stored_at + expires_s if expires_s else math.inf)


async def attempts_at(broker: Broker, session: SessionRecord, task_subject: str) -> Attempts:
    """Return what became of a task's earlier runs; of one whose session never was served, nothing is asked."""
    if not session.epoch:
        return _FIRST
    entry = await broker.bucket(subjects.ATTEMPTS).get(subjects.task_key(task_subject))
    if entry is None or entry.value is None:
        return _FIRST
    try:
        return Attempts.decode(entry.value)
    except MalformedMessage:
        return _FIRST


@dataclass(slots=True)
class Outlook:
    """What a look at a session's stored tasks has brought."""

    seen: int
    """Tasks up to this sequence were looked at."""
    found: bool = False
    """One may be started now; what is behind it was not looked at."""
    due_at: float = math.inf
    """When the first of the others may be started, Unix seconds."""


async def look_for_due(broker: Broker, session: SessionRecord, spec: ApplicationSpec, after: int) -> Outlook:
    """Look through the stored tasks behind a sequence, oldest first, until one may be started now."""
    outlook = Outlook(after)
    stream = subjects.task_stream(session.application)
    pattern = subjects.session_tasks(session.application, session.id)
    while (message := await broker.first_stored(stream, pattern, outlook.seen)) is not None:
        now = time.time()
        due_at = times_of(message.data, message.stored_at, spec).due_at
        if due_at <= now:
            due_at = (await attempts_at(broker, session, message.subject)).not_before
        outlook.seen = message.sequence
        if due_at <= now:
            outlook.found = True
            break
        outlook.due_at = min(outlook.due_at, due_at)
    return outlook
