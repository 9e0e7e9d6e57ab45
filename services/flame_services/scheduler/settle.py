"""Giving every waiting task of an ended session its one terminal record."""

from __future__ import annotations

import time

from flame.broker.seam import Broker
from flame.protocol import subjects
from flame.protocol.codes import ErrorCode, ReasonCode
from flame.protocol.messages import ResultRecord, TaskFault
from flame.protocol.records import SessionRecord
from flame.protocol.states import SessionState, TaskState
from flame_services.scheduler.recorder import Writing


def record_for(session_id: str, session: SessionRecord | None) -> ResultRecord:
    """Return the record of a task that waited when its session ended."""
    if session is not None and session.state is SessionState.FAILED:
        reason, _, traceback = session.reason.partition("\n")
        if session.code != ReasonCode.ENTER_FAILED:
            reason, traceback = session.reason, ""  # what follows is what the process said
        fault = TaskFault(ErrorCode.SESSION_FAILED, f"session {session_id} failed: {reason}", traceback=traceback)
        return ResultRecord(TaskState.FAILED, error=fault, attempt=0, finished=time.time())
    why = "is not known" if session is None else "was closed before the task ran"
    if session is not None and session.reason:
        why = f"{why}: {session.reason}"
    fault = TaskFault(ErrorCode.TASK_CANCELLED, f"session {session_id} {why}")
    return ResultRecord(TaskState.CANCELLED, error=fault, attempt=0, finished=time.time())


async def settle_tasks(
    broker: Broker, writing: Writing, application: str, session_id: str, session: SessionRecord | None
) -> None:
    """Record every stored task of a session, and remove them.

    Can be begun again after any interruption: a task that has a record keeps it. The session must have no consumer.
    """
    stream = subjects.task_stream(application)
    pattern = subjects.session_tasks(application, session_id)
    task_prefix = subjects.task(application, session_id, "")
    result_prefix = subjects.result(application, session_id, "")
    record = record_for(session_id, session)
    while True:
        # What is stored after this point is left for the next round, so nothing is removed without its record.
        last = (await broker.stream_state(stream)).last_sequence
        waiting = list(await broker.subjects(stream, pattern))
        if not waiting:
            return
        # Whatever a client made of a task's name: it is part of a subject, so it can be part of another one.
        await writing.store([result_prefix + subject.removeprefix(task_prefix) for subject in waiting], record)
        if last:  # with 0 everything would go, what was stored after the look included
            await broker.purge(stream, pattern, last)
