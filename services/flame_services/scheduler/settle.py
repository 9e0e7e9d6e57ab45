"""Giving every waiting task of an ended session its one terminal record."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from flame.broker.errors import Duplicate
from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.protocol import subjects
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord, TaskFault
from flame.protocol.records import SessionRecord
from flame.protocol.states import SessionState, TaskState

BATCH: Final = 1000
STORE_TIMEOUT_S: Final = 10.0


def record_for(session_id: str, session: SessionRecord | None) -> ResultRecord:
    """Return the record of a task that waited when its session ended."""
    if session is not None and session.state is SessionState.FAILED:
        fault = TaskFault(ErrorCode.SESSION_FAILED, f"session {session_id} failed: {session.reason}")
        return ResultRecord(TaskState.FAILED, error=fault, attempt=0, finished=time.time())
    why = "is not known" if session is None else "was closed before the task ran"
    fault = TaskFault(ErrorCode.TASK_CANCELLED, f"session {session_id} {why}")
    return ResultRecord(TaskState.CANCELLED, error=fault, attempt=0, finished=time.time())


async def settle_tasks(broker: Broker, application: str, session_id: str, session: SessionRecord | None) -> int:
    """Record every stored task of a session, remove them, and return how many records were new.

    Can be begun again after any interruption: a task that has a record keeps it. The session must have no consumer.
    """
    stream = subjects.task_stream(application)
    pattern = subjects.session_tasks(application, session_id)
    task_prefix = subjects.task(application, session_id, "")
    result_prefix = subjects.result(application, session_id, "")
    record = record_for(session_id, session).encode()
    written = 0
    while True:
        # What is stored after this point is left for the next round, so nothing is removed without its record.
        last = (await broker.stream_state(stream)).last_sequence
        waiting = list(await broker.subjects(stream, pattern))
        if not waiting:
            return written
        # Whatever a client made of a task's name: it is part of a subject, so it can be part of another one.
        results = [result_prefix + subject.removeprefix(task_prefix) for subject in waiting]
        for begin in range(0, len(results), BATCH):
            written += await _record(broker, results[begin : begin + BATCH], record)
        if last:  # with 0 everything would go, what was stored after the look included
            await broker.purge(stream, pattern, last)


async def _record(broker: Broker, results: list[str], record: bytes) -> int:
    stores = [await broker.begin_store(result, record, STORE_TIMEOUT_S) for result in results]
    new = 0
    fault: BaseException | None = None
    for outcome in await asyncio.gather(*stores, return_exceptions=True):
        if isinstance(outcome, int):
            new += 1
        elif not isinstance(outcome, Duplicate):
            fault = outcome
    if fault is not None:
        raise fault if isinstance(fault, FlameError) else FlameError(str(fault))
    return new
