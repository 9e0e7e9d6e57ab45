"""The verbs about tasks, but for cancelling them."""

from __future__ import annotations

from typing import Final

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker
from flame.errors import ApplicationNotFound, MalformedMessage
from flame.protocol import defaults
from flame.protocol.api import ListTasks, LookUpTasks, TaskInfo, TaskLooks, TaskPage
from flame.protocol.messages import ResultRecord
from flame.protocol.states import TaskState
from flame.protocol.subjects import check_application, check_token
from flame_services.scheduler.control_api.applications import no_application
from flame_services.scheduler.control_api.paging import page
from flame_services.scheduler.control_api.stored import AT_ONCE, FEW, StoredTasks
from flame_services.scheduler.view import View

_ANSWER_BYTES: Final = defaults.MAX_PAYLOAD_BYTES - 2 * defaults.INLINE_LIMIT_BYTES
"""Of results in one answer, at most; the rest is for what says whose they are."""


class Tasks:
    """Answers from the streams, by leader reads."""

    def __init__(self, broker: Broker, view: View) -> None:
        """Ask ``broker``."""
        self._broker = broker
        self._view = view

    async def look_up_tasks(self, request: LookUpTasks) -> TaskLooks:
        """Tell what became of tasks."""
        application, session = check_application(request.application), check_token("session", request.session)
        for task in request.tasks:
            check_token("task", task)
        stored = StoredTasks(self._broker, application, session)
        try:
            waiting = await stored.waiting(request.tasks)
            # A finished task waits for its acknowledgement for a moment: of few tasks, tell even then.
            few = len(request.tasks) <= FEW
            missing = [task for task in request.tasks if few or task not in waiting]
            results, unread = await _read(stored, missing)
            digests = await stored.digests(sorted(waiting - set(results))) if few else {}
        except StreamMissing:
            raise ApplicationNotFound(f"application {application} is not registered any more") from None
        return TaskLooks(waiting=tuple(waiting - set(results)), results=results, unread=tuple(unread), digests=digests)

    async def list_tasks(self, request: ListTasks) -> TaskPage:
        """List the tasks of a session that are stored, and those whose records are.

        Every call counts the subjects of all of them; what waits is asked first, as for a look-up.
        """
        application, session = check_application(request.application), check_token("session", request.session)
        stored = StoredTasks(self._broker, application, session)
        try:
            waiting = await stored.all_waiting()
            finished = await stored.all_recorded()
        except StreamMissing:
            raise no_application(application) from None
        unfinished = waiting - finished
        running = set(sorted(unfinished)[: self._running(session)])
        names, more = page(finished | unfinished, request)
        items: list[TaskInfo] = []
        size = 0
        while names:
            batch = _room(size)
            if not batch:
                return TaskPage(items=tuple(items), more=True)
            some, names = names[:batch], names[batch:]
            ended = [name for name in some if name in finished]
            found = dict(zip(ended, await stored.records(ended), strict=True))
            for name in some:
                if name not in finished:
                    items.append(TaskInfo(id=name, state=TaskState.RUNNING if name in running else TaskState.PENDING))
                elif (record := found[name]) is not None:  # otherwise it has just aged out
                    items.append(TaskInfo(id=name, state=state_in(record), record=record))
                    size += len(record)
        return TaskPage(items=tuple(items), more=more)

    def _running(self, session_id: str) -> int:
        """Return how many tasks of a session run, as its executors say."""
        session = self._view.sessions.get(session_id)
        if session is None:
            return 0
        executors = self._view.executors
        return sum(executors[key].record.running for key in session.bindings if key in executors)


async def _read(stored: StoredTasks, tasks: list[str]) -> tuple[dict[str, bytes], list[str]]:
    """Return the records of tasks, as many as one answer holds, and the tasks that were left for another one."""
    results: dict[str, bytes] = {}
    unread: list[str] = []
    size = 0
    for begin in range(0, len(tasks), AT_ONCE):
        some = tasks[begin : begin + AT_ONCE]
        if unread:
            unread.extend(some)
            continue
        for task, data in zip(some, await stored.records(some), strict=True):
            if data is None:
                continue
            if results and size + len(data) > _ANSWER_BYTES:
                unread.append(task)
            else:
                results[task] = data
                size += len(data)
    return results, unread


def _room(size: int) -> int:
    """Return how many results are certain to fit into an answer that holds ``size`` bytes of them."""
    return max(0, (_ANSWER_BYTES - size) // defaults.INLINE_LIMIT_BYTES)


def state_in(record: bytes) -> TaskState:
    """Return the state that a record tells of, as a client will see it."""
    try:
        return ResultRecord.decode(record).state
    except MalformedMessage:
        return TaskState.FAILED
