"""The verb that gives tasks up.

A task that waits, or runs, gets its record here; if its executor is quicker, that record stays. Then it is removed from
where it waits, and whoever runs it or holds it is told.
"""

from __future__ import annotations

import time

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.api import CancelTasks, TaskCancels
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord, TaskFault
from flame.protocol.states import TaskState
from flame.protocol.subjects import check_token
from flame.protocol.supervision import Control
from flame_services.scheduler.control_api.applications import no_application
from flame_services.scheduler.control_api.sessions import Sessions
from flame_services.scheduler.control_api.stored import AT_ONCE, StoredTasks
from flame_services.scheduler.control_api.tasks import state_in
from flame_services.scheduler.recorder import Recorder

log = get_logger("flame.scheduler")


class Cancel:
    """Cancels tasks. Asking again is no error, and repeats what may not have been heard."""

    def __init__(self, broker: Broker, sessions: Sessions, recorder: Recorder) -> None:
        """Write through ``recorder``."""
        self._broker = broker
        self._sessions = sessions
        self._recorder = recorder

    async def cancel_tasks(self, request: CancelTasks) -> TaskCancels:
        """Give some tasks of a session up; tell in which state each has ended, leaving out those that are not known."""
        session = (await self._sessions.known(request.session)).record
        tasks = [check_token("task", task) for task in dict.fromkeys(request.tasks)]
        stored = StoredTasks(self._broker, session.application, session.id)
        try:
            waiting = await stored.waiting(tasks)
            given_up = [task for task in tasks if task in waiting]
            ended = [task for task in tasks if task not in waiting]
            states: dict[str, TaskState] = {}
            if given_up:
                async with self._recorder.writing(session.application, session.id) as writing:
                    new = await writing.store([stored.result(task) for task in given_up], _record(request.reason))
                states = {task: TaskState.CANCELLED for task, stays in zip(given_up, new, strict=True) if stays}
                ended.extend(task for task in given_up if task not in states)
            for begin in range(0, len(ended), AT_ONCE):
                some = ended[begin : begin + AT_ONCE]
                records = zip(some, await stored.records(some), strict=True)
                states |= {task: state_in(record) for task, record in records if record is not None}
            stopped = [task for task in given_up if states.get(task) is TaskState.CANCELLED]
            await stored.remove(stopped)
        except StreamMissing:
            raise no_application(session.application) from None
        if stopped:
            control = subjects.control(session.application, session.id)
            await self._broker.publish(control, Control(cancel=tuple(stopped)).encode())
            log.info("tasks cancelled", session=session.id, tasks=len(stopped))
        return TaskCancels(states=states)


def _record(reason: str) -> ResultRecord:
    """Return the record of a task that a client gave up; the same for all that it gave up at once."""
    fault = TaskFault(ErrorCode.TASK_CANCELLED, reason or "cancelled on request")
    return ResultRecord(TaskState.CANCELLED, error=fault, attempt=0, finished=time.time())
