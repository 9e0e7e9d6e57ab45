"""What a manager that was killed has left on this node: processes without a master, and their records."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import Final

import psutil

from flame.broker.seam import Broker
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.attaching import ATTACHED
from flame.protocol.codes import ReasonCode
from flame.protocol.records import BindingRecord, ExecutorRecord, decode_record
from flame.protocol.states import ExecutorState
from flame_services.executor_manager.process import (
    group_is_alive,
    group_of,
    identity,
    is_alive,
    started_at,
)
from flame_services.executor_manager.reasons import Reason
from flame_services.executor_manager.work_folder import WorkFolder

log = get_logger("flame.manager.leftovers")

REASON: Final = Reason(ReasonCode.MANAGER_RESTARTED, "the executor manager was restarted")
_SAME_START_S: Final = 1.5
"""Start times of one process differ by as much when the clock is set."""
_END_S: Final = 5.0
_LOOK_S: Final = 0.01


async def clear_leftovers(broker: Broker, node: str, folder: WorkFolder, *, followed: bool) -> set[str]:
    """End the executors of an earlier manager of this node, in the system and in the cluster.

    Returns those that still have a binding: they are released, and must not be started again. If an earlier manager of
    this folder is ``followed``, these are all that have one: it may have ordered a template to fork an executor and
    ended before it could note that, and what that one has stored must be counted.
    """
    bindings = await _bindings(broker, node)
    records = await _records(broker, node)
    noted = folder.process_notes()
    living = [note for note in noted if is_alive(note.pid) and identity(note.pid) == note.identity]
    groups = {note.pid for note in living}
    groups |= {group for note in living if note.is_template for group in groups_below(note.pid)}
    groups |= {group for record in records.values() if (group := _group_of(record))}
    await _end(groups)
    folder.clear()

    bucket = broker.bucket(subjects.EXECUTORS)
    for executor, record in records.items():
        if executor not in bindings:
            await bucket.delete(subjects.executor_key(node, executor))
        elif record.state is not ExecutorState.RELEASED:
            await bucket.put(subjects.executor_key(node, executor), _released(record).encode())
    begun = bindings.keys() if followed else bindings.keys() & {note.executor for note in noted}
    for executor in begun - records.keys():
        record = _released(_record_of(bindings[executor]))
        await bucket.put(subjects.executor_key(node, executor), record.encode())
    for note in noted:
        folder.forget_process(note.executor)
    return (bindings.keys() & records.keys()) | begun


async def _bindings(broker: Broker, node: str) -> dict[str, BindingRecord]:
    found: dict[str, BindingRecord] = {}
    for entry in await broker.bucket(subjects.BINDINGS).entries(subjects.node_executors(node)):
        binding = decode_record(BindingRecord, entry.value or b"")
        if binding is not None:
            found[binding.executor] = binding
    return found


async def _records(broker: Broker, node: str) -> dict[str, ExecutorRecord]:
    found: dict[str, ExecutorRecord] = {}
    for entry in await broker.bucket(subjects.EXECUTORS).entries(subjects.node_executors(node)):
        record = decode_record(ExecutorRecord, entry.value or b"")
        if record is not None:
            found[record.id] = record
    return found


def _group_of(record: ExecutorRecord) -> int | None:
    """Return the process group of an executor that still lives; its number alone could be another's by now."""
    pid = record.pid
    if record.state is ExecutorState.RELEASED or record.started == ATTACHED or pid <= 1 or not is_alive(pid):
        return None
    if abs(started_at(pid) - record.process_started) > _SAME_START_S:
        return None
    try:
        group, session = os.getpgid(pid), os.getsid(pid)
    except ProcessLookupError:
        return None
    # A manager gives each executor a session of its own: a group within another one is somebody else's.
    return group if group == session and group not in (1, os.getpgrp()) else None


def groups_below(pid: int) -> set[int]:
    """Return the groups of a template's executors: each is led by a child of it, or of a child."""
    try:
        below = [process.pid for process in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return set()
    return {child for child in below if group_of(child) == child}


async def _end(groups: set[int]) -> None:
    for group in groups:
        log.warning("ending an executor of an earlier manager", pid=group, reason=REASON.text)
        if group > 1 and group != os.getpgrp():  # its leader may have died before the service that it had started
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_END_S):
            for group in groups:
                while group_is_alive(group):  # noqa: ASYNC110 (the system tells only parents)
                    await asyncio.sleep(_LOOK_S)


def _released(record: ExecutorRecord) -> ExecutorRecord:
    return record.changed(
        state=ExecutorState.RELEASED,
        clean=False,
        reason=REASON.text,
        code=str(REASON.code),
        running=0,
        pending=0,
        idle=False,
        updated=time.time(),
    )


def _record_of(binding: BindingRecord) -> ExecutorRecord:
    now = time.time()
    return ExecutorRecord(
        id=binding.executor,
        node=binding.node,
        application=binding.application,
        session=binding.session,
        epoch=binding.epoch,
        state=ExecutorState.STARTING,
        created=now,
        updated=now,
    )
