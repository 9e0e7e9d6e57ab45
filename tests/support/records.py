"""What the result stream says of a session's tasks, and whether its counts say the same."""

from __future__ import annotations

from collections import Counter
from contextlib import aclosing

import flame
from flame.protocol import subjects
from flame.protocol.api import SessionInfo
from flame.protocol.messages import ResultRecord
from flame.protocol.states import TaskState
from tests.support.cluster import eventually


async def records_of(connection: flame.Connection, session: flame.Session) -> dict[str, ResultRecord]:
    """Return the terminal record of every task that has one."""
    stream = subjects.result_stream(session.application)
    pattern = subjects.session_results(session.application, session.id)
    found: dict[str, ResultRecord] = {}
    async with aclosing(connection.broker.read(stream, pattern)) as messages:
        async for message in messages:
            task = subjects.parse_result(message.subject).task
            assert task not in found, f"{task} has two records"
            found[task] = ResultRecord.decode(message.data)
    return found


async def waiting_in(connection: flame.Connection, session: flame.Session) -> int:
    """Return how many tasks of a session are stored."""
    stream = subjects.task_stream(session.application)
    return len(await connection.broker.subjects(stream, subjects.session_tasks(session.application, session.id)))


async def at_rest(connection: flame.Connection, session: flame.Session, tasks: int, timeout_s: float = 60.0) -> None:
    """Return when every one of so many tasks has its record and the counts are what the records are."""
    said = ""

    async def same() -> bool:
        nonlocal said
        info = await connection.get_session(session.id)
        records = await records_of(connection, session)
        stored = Counter(record.state for record in records.values())
        said = f"{counts(info)} for {dict(stored)}"
        return len(records) == tasks and counts(info) == (
            0,
            0,
            stored[TaskState.SUCCEED],
            stored[TaskState.FAILED],
            stored[TaskState.CANCELLED],
        )

    try:
        await eventually(same, "the counts are those of the records", timeout_s)
    except AssertionError as error:
        raise AssertionError(f"{error}: {said}") from None


def counts(info: SessionInfo) -> tuple[int, int, int, int, int]:
    """Return what waits, runs, has succeeded, failed, and was cancelled."""
    return info.pending, info.running, info.succeeded, info.failed, info.cancelled
