"""A session's tasks as the cluster knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flame.client.task import Task
from flame.errors import InvalidArgument, MalformedMessage
from flame.protocol.api import PAGE, ListTasks, TaskInfo, TaskPage, Verb
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord, TaskFault
from flame.protocol.states import TaskState
from flame.protocol.subjects import check_token

if TYPE_CHECKING:
    from flame.client.connection import Connection

MOST: Final = 10_000
"""Tasks that can be asked for at once."""


async def list_tasks(connection: Connection, application: str, session: str, *, after: str, limit: int) -> list[Task]:
    """Return up to ``limit`` tasks of a session whose ids are above ``after``, ordered by id."""
    if not 1 <= limit <= MOST:
        raise InvalidArgument(f"limit {limit!r}: expected a number from 1 to {MOST}")
    if after:
        check_token("after", after)
    tasks: list[Task] = []
    while len(tasks) < limit:
        few = min(PAGE, limit - len(tasks))
        request = ListTasks(application=application, session=session, after=after, limit=few)
        page = await connection.call(Verb.LIST_TASKS, request, TaskPage)
        tasks.extend(_task(application, session, info) for info in page.items)
        if not page.more or not page.items:
            break
        after = page.items[-1].id
    return tasks


def _task(application: str, session: str, info: TaskInfo) -> Task:
    if not info.state.terminal:
        return Task(info.id, session, application, info.state)
    try:
        record = ResultRecord.decode(info.record)
    except MalformedMessage as error:
        fault = TaskFault(ErrorCode.INTERNAL, f"the task's record can't be read: {error}")
        record = ResultRecord(TaskState.FAILED, error=fault)
    return finished_task(info.id, session, application, record)


def finished_task(task_id: str, session: str, application: str, record: ResultRecord) -> Task:
    """Return a task with its terminal record."""
    return Task(
        task_id,
        session,
        application,
        record.state,
        record.output,
        record.error,
        record.executor,
        record.attempt,
        record.started,
        record.finished,
        record.chunks,
        0 if record.output_ref is None else record.output_ref.size,
    )
