"""All executors of this node: what the scheduler wants here, and what is here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from flame.broker.seam import Entry
from flame.cancel import end_tasks
from flame.errors import ExecutorNotFound, InvalidName, MalformedMessage
from flame.logs import get_logger
from flame.protocol.codes import ReasonCode
from flame.protocol.records import BindingRecord, decode_record
from flame.protocol.session_state import is_state_request
from flame.protocol.states import ExecutorState
from flame.protocol.subjects import check_token, executor_key
from flame.protocol.supervision import LEAVE, WAIT, ExecutorReport, Orders
from flame_services.executor_manager.attached import AttachedExecutor, AttachedPlace
from flame_services.executor_manager.executor import KILL_AFTER_S, Executor
from flame_services.executor_manager.place import Place
from flame_services.executor_manager.reasons import Reason
from flame_services.executor_manager.record import RecordWriter
from flame_services.executor_manager.session_state import SessionStates, refusal

log = get_logger("flame.manager")

TICK_S: Final = 1.0
_BROKER_GONE_S: Final = 2.0
"""Between SIGTERM and SIGKILL when there is no broker to tell anything to."""
_DISCONNECTED_S: Final = 0.5
"""A connection that is away for longer is taken for gone while stopping."""
_LAST_RECORDS_S: Final = 1.0
_LOOK_S: Final = 0.02
_ENDED_S: Final = 2.0
"""How long a killed process may take to be gone."""
STOPPED: Final = Reason(ReasonCode.MANAGER_STOPPED, "the executor manager was stopped")
_NOT_ENTERED: Final = (ExecutorState.STARTING, ExecutorState.IDLE, ExecutorState.BINDING)


AnExecutor = Executor | AttachedExecutor


class Executors:
    """The executors of one node, by name."""

    def __init__(
        self,
        place: Place | AttachedPlace,
        make: Callable[[BindingRecord], AnExecutor],
        ended_before: Iterable[str] = (),
    ) -> None:
        """Begin with none, and ``make`` one of each binding.

        Those that ``ended_before`` an earlier manager did are not started again.
        """
        self._place = place
        self._make = make
        self._states = SessionStates(place.broker)
        self._executors: dict[str, AnExecutor] = {}
        self._ended_before = set(ended_before)
        self._unconfirmed = set(ended_before)
        self._stopping = False
        self._errands: set[asyncio.Task[Any]] = set()

    # ---- what the scheduler wants

    def on_binding(self, entry: Entry) -> None:
        """Take note of a binding, or of its end."""
        executor = entry.key.rpartition(".")[2]
        self._unconfirmed.discard(executor)
        if entry.value is None:
            self._end_binding(executor)
            return
        binding = decode_record(BindingRecord, entry.value)
        if binding is None or not _is_for(binding, entry.key):
            log.warning("not a binding; ignored", key=entry.key)
        elif executor in self._ended_before:
            log.debug("ended before", executor=executor)
        elif (known := self._executors.get(executor)) is None:
            self._begin(binding)
        elif binding.leave:
            self._let_leave(known, binding)

    def on_first_reading(self) -> None:
        """Take note that all bindings there are have been heard: those of an earlier time may have gone since."""
        for executor in tuple(self._unconfirmed):
            self._end_binding(executor)
        self._unconfirmed.clear()

    def on_reconnect(self) -> None:
        """Take note that the broker was away: nobody could report in time."""
        for executor in self._alive():
            executor.allow_more_time()

    def _begin(self, binding: BindingRecord) -> None:
        executor = self._executors[binding.executor] = self._make(binding)
        if self._stopping:
            executor.leave()
        executor.start()

    def _let_leave(self, executor: AnExecutor, binding: BindingRecord) -> None:
        life = executor.life
        news = not life.leaving or binding.force > life.forced
        if binding.force:
            executor.force()
        else:
            executor.leave()
        if news:
            self._spawn(executor.nudge())

    def end_stuck(self, name: str, cause: Reason) -> None:
        """End an executor in which something does not stop."""
        executor = self._executors.get(name)
        if executor is not None:
            executor.end_stuck(cause)

    def _end_binding(self, name: str) -> None:
        executor = self._executors.get(name)
        if executor is not None:
            executor.drop()
            self._spawn(self._forget(executor))
        elif name in self._ended_before:
            self._ended_before.discard(name)
            writer = RecordWriter(self._place.broker, self._place.node, name)
            writer.delete()
            self._spawn(writer.settled())

    async def _forget(self, executor: AnExecutor) -> None:
        """Drop an executor without a binding once it and its record are gone."""
        await executor.released.wait()
        await executor.writer.settled()
        self._executors.pop(executor.binding.executor, None)
        if not any(each.consumer == executor.consumer for each in self._executors.values()):
            self._place.consumers.forget(executor.binding.consumer)

    # ---- what executors report

    async def on_report(self, subject: str, data: bytes) -> bytes:
        """Answer a report. Whoever is unknown here is to leave."""
        name = subject.rpartition(".")[2]
        if is_state_request(data):
            return await self._on_state(name, data)
        try:
            report = ExecutorReport.decode(data)
        except MalformedMessage as error:
            log.warning("report refused", executor=name, reason=str(error))
            return Orders(LEAVE).encode()
        if not await self._place.stocks.wait_in(name, report):
            return Orders(WAIT).encode()
        executor = self._executors.get(self._place.stocks.given.get(name, name))
        if executor is None:
            log.warning("report of an unknown executor: told to leave", executor=name, pid=report.pid)
            return Orders(LEAVE).encode()
        return (await executor.report(report)).encode()

    async def _on_state(self, name: str, data: bytes) -> bytes:
        """Answer an executor that asks for something of its session's state."""
        executor = self._executors.get(self._place.stocks.given.get(name, name))
        if executor is None or executor.released.is_set():
            return refusal(ExecutorNotFound(f"executor {name} is not on this node any more")).encode()
        return await self._states.answer(executor.binding.session, data)

    # ---- from time to time

    async def remind(self) -> None:
        """Have those report who don't know yet what they should, until cancelled: a blocked one hears nothing.

        Those that are blocked for no reason are ended.
        """
        while True:
            await asyncio.sleep(TICK_S)
            for executor in self._alive():
                if executor.must_be_reminded:
                    await executor.nudge()
                elif self._place.broker.connected:
                    executor.end_if_mute()

    async def follow_backlogs(self) -> None:
        """Learn what waits in sessions whose executors are busy, or blocked, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            busy = [executor for executor in self._alive() if executor.is_busy()]
            if busy and self._place.broker.connected:
                pending = await self._place.consumers.pending({executor.consumer for executor in busy})
                for executor in busy:
                    if (count := pending.get(executor.consumer[1])) is not None:
                        executor.note_backlog(count)

    # ---- the end

    async def stop(self, limit_s: float) -> None:
        """End all: running tasks may take ``limit_s``. None is left when this returns, and none if it is cancelled."""
        self._stopping = True
        try:
            for executor in self._alive():
                executor.leave()
                if executor.life.state in _NOT_ENTERED:
                    executor.terminate(STOPPED)
                else:
                    await executor.nudge()
            await self._all_released(limit_s, only_connected=True)
            grace_s = KILL_AFTER_S if self._place.broker.connected else _BROKER_GONE_S
            for executor in self._alive():
                executor.terminate(STOPPED, grace_s)
            await self._all_released(grace_s + _ENDED_S)
        finally:
            for executor in self._alive():
                executor.kill()
        await self._last_records()
        await end_tasks(self._errands)

    async def _all_released(self, limit_s: float, only_connected: bool = False) -> None:
        """Wait until all are, for as long as the limit; or as long as there is a broker to be told by."""
        deadline = time.monotonic() + limit_s
        seen_connected = time.monotonic()
        while self._alive() and (now := time.monotonic()) < deadline:
            if self._place.broker.connected:
                seen_connected = now
            elif only_connected and now - seen_connected > _DISCONNECTED_S:
                return
            await asyncio.sleep(_LOOK_S)

    async def _last_records(self) -> None:
        """Give the records of all that has ended a moment to be written."""
        writers = [executor.writer for executor in self._executors.values()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_RECORDS_S):
                for writer in writers if self._place.broker.connected else ():
                    await writer.settled()
        for writer in writers:
            await writer.close()

    def _alive(self) -> list[AnExecutor]:
        return [executor for executor in self._executors.values() if not executor.released.is_set()]

    def _spawn(self, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)


def _is_for(binding: BindingRecord, key: str) -> bool:
    """Whether a binding is under the key that it belongs to, and its name can name files."""
    try:
        return executor_key(binding.node, check_token("executor", binding.executor)) == key
    except InvalidName:
        return False
