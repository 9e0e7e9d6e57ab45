"""What other tasks of a session have returned, as an executor reads it."""

from __future__ import annotations

import asyncio
from typing import Final

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker, StoredMessage
from flame.errors import TaskNotFound, Unavailable
from flame.protocol import defaults, subjects
from flame.protocol.messages import ResultRecord
from flame.protocol.supervision import Assignment

PATIENCE_S: Final = 30.0
"""How long a read is tried: the broker may be choosing a leader."""


async def output_of(broker: Broker, assignment: Assignment, task_id: str) -> bytes:
    """Return the output of a task of the assigned session; see `TaskContext.output_of`."""
    subjects.check_token("task", task_id)
    application, session = assignment.application, assignment.session
    found = await _last(broker, application, subjects.result(application, session, task_id))
    if found is None:
        raise TaskNotFound(
            f"session {session} has no result of a task {task_id!r}: it has not ended, or its result has aged out"
        )
    # Only those who ask for outputs need what a client has.
    from flame.client.listing import finished_task  # noqa: PLC0415
    from flame.values import load_value  # noqa: PLC0415

    record = ResultRecord.decode(found.data)
    finished_task(task_id, session, application, record).check()
    if record.output_ref is not None:
        return await load_value(broker, application, session, subjects.OUT, record.output_ref)
    return record.output


async def _last(broker: Broker, application: str, subject: str) -> StoredMessage | None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE_S
    while True:
        try:
            return await broker.last(subjects.result_stream(application), subject)
        except StreamMissing:
            return None
        except Unavailable:
            if loop.time() >= deadline:
                raise
        await asyncio.sleep(defaults.BACKOFF_FIRST_S)
