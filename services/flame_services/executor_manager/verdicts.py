"""Records that a manager writes for tasks whose executor can't: it was ended while it ran them, for their sake.

They are written once the executor's process is gone. So whatever that has stored comes before them in the stream, and
whoever counts its records finds these behind the last one that it has counted itself.
"""

from __future__ import annotations

import contextlib
import time
from typing import Final

from flame.broker.errors import Duplicate
from flame.broker.seam import Broker
from flame.ledger import Slot
from flame.protocol import defaults, subjects
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import Attempts, ResultRecord, TaskFault
from flame.protocol.records import BindingRecord
from flame.protocol.states import TaskState

TIMEOUT_TYPE: Final = "TaskTimeout"


def timed_out(limit_s: float) -> TaskFault:
    """Say that a run took longer than it may."""
    return TaskFault(ErrorCode.TASK_TIMEOUT, f"the run took longer than {limit_s:g} s", TIMEOUT_TYPE)


def out_of_memory(text: str) -> TaskFault:
    """Say that the executor used more memory than it may."""
    return TaskFault(ErrorCode.OUT_OF_MEMORY, f"its executor {text}")


async def fail_task(broker: Broker, binding: BindingRecord, slot: Slot, fault: TaskFault) -> None:
    """Store a failed record in the name of an executor that is gone, unless there is one, and acknowledge the task."""
    address = subjects.parse_task(f"flame.task.{slot.task}")
    now, began = time.time(), time.monotonic()
    record = ResultRecord(
        TaskState.FAILED,
        error=fault,
        executor=binding.executor,
        attempt=await _attempt(broker, slot.task),
        started=now - (began - slot.started_at),
        finished=now,
    )
    with contextlib.suppress(Duplicate):
        stored = await broker.begin_store(
            subjects.result(*address), record.encode(), defaults.STORE_TIMEOUT_S, then_acknowledge=slot.handle
        )
        await stored


async def has_record(broker: Broker, key: str) -> bool:
    """Whether a task has its record."""
    address = subjects.parse_task(f"flame.task.{key}")
    stream = subjects.result_stream(address.application)
    return await broker.last(stream, subjects.result(*address)) is not None


async def _attempt(broker: Broker, key: str) -> int:
    """Return which run of a task this was."""
    entry = await broker.bucket(subjects.ATTEMPTS).get(key)
    earlier = Attempts() if entry is None or entry.value is None else Attempts.decode(entry.value)
    return earlier.lost + earlier.raised + 1
