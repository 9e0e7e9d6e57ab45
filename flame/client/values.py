"""The large inputs and outputs of one session's tasks: what doesn't fit into a message travels in parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flame.broker.seam import Broker
from flame.client.listing import finished_task
from flame.client.task import Task
from flame.errors import FlameError, Unavailable
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.codes import ErrorCode
from flame.protocol.ids import digest_of
from flame.protocol.messages import ResultRecord, TaskFault, TaskMessage
from flame.protocol.records import SessionRecord
from flame.protocol.values import check_size
from flame.values import load_value, store_value

log = get_logger("flame.client")


class TaskValues:
    """Stores inputs and loads outputs."""

    def __init__(self, broker: Broker, record: SessionRecord) -> None:
        """Bind to a session; costs nothing before it is used."""
        self._broker = broker
        self._record = record
        self._loads: dict[str, asyncio.Task[None]] = {}

    async def store_input(self, task_id: str, message: TaskMessage) -> bytes:
        """Store a task's input in parts and return the task that refers to it. Raises as `store_value` does."""
        data = message.input
        check_size("input", len(data))
        application, session = self._record.application, self._record.id
        message.input_ref = await store_value(self._broker, application, session, subjects.IN, data, task_id=task_id)
        message.input = b""
        return message.encode()

    async def load(self, task_id: str, record: ResultRecord) -> Task:
        """Return a finished task with its output, or one that says why that can't be got. Raises `Unavailable`."""
        ref = record.output_ref
        assert ref is not None
        application, session = self._record.application, self._record.id
        task = finished_task(task_id, session, application, record)
        try:
            task.output = await load_value(self._broker, application, session, subjects.OUT, ref)
        except Unavailable:
            raise
        except (FlameError, MemoryError) as error:
            task.error = TaskFault(ErrorCode.VALUE_GONE, str(error), type(error).__name__)
        return task

    def begin_to_load(
        self, task_id: str, record: ResultRecord, on_loaded: Callable[[str, Task], None]
    ) -> asyncio.Task[None] | None:
        """Load a task's output for as long as it takes, then call ``on_loaded``; ``None`` if that is under way."""
        if task_id in self._loads:
            return None
        loading = asyncio.create_task(self._load_surely(task_id, record, on_loaded), name=f"output of {task_id}")
        self._loads[task_id] = loading
        loading.add_done_callback(lambda _: self._loads.pop(task_id, None))
        return loading

    async def _load_surely(self, task_id: str, record: ResultRecord, on_loaded: Callable[[str, Task], None]) -> None:
        """Whoever waits for the task waits for this: it ends with the connection, or when the output is gone."""
        while True:
            try:
                task = await self.load(task_id, record)
            except Unavailable as error:
                log.warning("an output could not be read; trying again", task=task_id, error=str(error))
                await asyncio.sleep(defaults.BACKOFF_MAX_S)
            else:
                on_loaded(task_id, task)
                return


async def digest_of_much(data: bytes) -> bytes:
    """Return `digest_of` data that is so much that the event loop should turn meanwhile."""
    return await asyncio.to_thread(digest_of, data)
