"""Running the service that breaks rules on one node, where a test writes what a scheduler would."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from flame.protocol import subjects, topology
from flame.protocol.messages import Attempts, ResultRecord, TaskMessage
from flame.protocol.resources import Resources
from flame.protocol.states import TaskState
from tests.support.cluster import SERVICES
from tests.support.node import APP, Control, until

SMALL: Final = Resources(cpu=0.1, memory=128 * 1024**2, gpu=0)


async def serve(
    control: Control,
    mode: str = "",
    *,
    enter: Iterable[object] = (),
    resources: Resources = SMALL,
    executor: str = "e1",
    **spec: Any,
) -> None:
    """Bind an executor of a session that has a consumer to this node."""
    await control.application(mode, arguments=(str(SERVICES / "rogue.py"),), **spec)
    if enter:
        await control.session(common_data_key="s1.1")
        await control.broker.bucket(subjects.COMMON_DATA).put("s1.1", json.dumps(list(enter)).encode())
    else:
        await control.session()
    await control.broker.create_consumer(topology.session_consumer(APP, "s1", 1, 8))
    await control.bind(executor, resources=resources)


async def store(control: Control, task: str, *call: object) -> None:
    message = TaskMessage(json.dumps(call).encode())
    await control.broker.store(subjects.task(APP, "s1", task), message.encode(), 5)


async def result(control: Control, task: str) -> ResultRecord:
    """Wait for a task's record."""

    async def there() -> ResultRecord | None:
        found = await control.broker.last(subjects.result_stream(APP), subjects.result(APP, "s1", task))
        return None if found is None else ResultRecord.decode(found.data)

    record: ResultRecord = await until(there, f"{task} has its record")
    return record


async def ask(control: Control, task: str, *call: object) -> Any:
    await store(control, task, *call)
    record = await result(control, task)
    assert record.state is TaskState.SUCCEED, record
    return json.loads(record.output) if record.output else None


async def lost(control: Control, task: str) -> int:
    """Return how many executors are counted as lost while they ran a task."""
    entry = await control.broker.bucket(subjects.ATTEMPTS).get(f"{APP}.s1.{task}")
    return 0 if entry is None or entry.value is None else Attempts.decode(entry.value).lost


async def waiting(control: Control) -> set[str]:
    """Return the tasks that are stored."""
    found = await control.broker.subjects(subjects.task_stream(APP), subjects.session_tasks(APP, "s1"))
    return {subject.rpartition(".")[2] for subject in found}


def notes(control: Control) -> list[str]:
    file = control.folder / "notes"
    return file.read_text().splitlines() if file.exists() else []
