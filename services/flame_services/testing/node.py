"""A node of a cluster in memory: what an executor manager is, without processes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, Self

from flame.broker.memory import MemoryServer
from flame.broker.seam import Entry
from flame.cancel import end_tasks
from flame.errors import ExecutorNotFound, FlameError, MalformedMessage
from flame.protocol import subjects
from flame.protocol.records import BindingRecord, NodeRecord, decode_record
from flame.protocol.resources import Resources
from flame.protocol.session_state import is_state_request
from flame.protocol.supervision import LEAVE, ExecutorReport, Orders
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.keeper import LeaseKeeper
from flame_services.executor_manager.node import NodeHeartbeat
from flame_services.executor_manager.reasons import Reason
from flame_services.executor_manager.session_state import SessionStates, refusal
from flame_services.testing.executor import MakeService, MemoryExecutor, Place, end_soon

TICK_S: Final = 1.0
KEEP_S: Final = 0.5
"""Between two looks at what executors hold: there are no blocked loops to be found out about here."""
LEAVE_S: Final = 5.0
"""How long executors that run nothing may take to leave when the node stops."""


class MemoryNode:
    """Turns bindings into executors, as tasks of the running loop, and looks after them."""

    def __init__(
        self,
        server: MemoryServer,
        name: str,
        services: dict[str, MakeService],
        made: dict[str, list[object]],
        folder: Path,
        capacity: Resources,
    ) -> None:
        """Run ``services``, by application; their ledgers are in ``folder``."""
        broker = server.connect(name)
        leases = LeaseKeeper(broker, folder)
        leases.on_stuck = self._end_stuck
        self.name = name
        self.broker = broker
        self.executors: dict[str, MemoryExecutor] = {}
        self._place = Place(server, broker, name, services, made, leases, Consumers(broker), self._follow_changes)
        self._states = SessionStates(broker)
        self._heartbeat = NodeHeartbeat(broker, _record(name, capacity))
        self._beating: asyncio.Task[None] | None = None
        self._keeping: list[asyncio.Task[None]] = []
        """What looks after executors, while there are any."""
        self._errands: set[asyncio.Task[Any]] = set()
        self._stopping = False

    async def start(self) -> Self:
        """Register the node and begin to carry bindings out."""
        await self._heartbeat.claim(None)
        self._beating = asyncio.create_task(self._heartbeat.run(), name=f"heartbeat {self.name}")
        self.broker.on_reconnect(self._place.leases.on_reconnect)
        await self.broker.answer(subjects.executor_reports(self.name), self._on_report)
        await self.broker.bucket(subjects.BINDINGS).watch(subjects.node_executors(self.name), self._on_binding)
        return self

    async def stop(self) -> None:
        """End every executor, those that run nothing in order, and sign off. Safe to call again."""
        self._stopping = True
        leaving = []
        for executor in self.living:
            executor.leave()
            if self._place.leases.runs_nothing(executor.binding.executor) and self.broker.connected:
                self._spawn(executor.nudge())
                leaving.append(asyncio.ensure_future(executor.released.wait()))
            else:
                executor.kill()
        if leaving:
            await asyncio.wait(leaving, timeout=LEAVE_S)
        await end_tasks(leaving)
        await self.lose()
        if self.broker.connected:
            await self._heartbeat.sign_off()
        await self.broker.close()

    async def lose(self) -> None:
        """End every executor and fall silent, as when the machine is gone."""
        self._stopping = True
        await end_tasks([task for task in (self._beating,) if task is not None])
        for executor in self.living:
            executor.kill()
        await end_tasks((*self._keeping, *self._errands))
        for executor in self.executors.values():
            await executor.close()
        await end_soon(self._place.remains)

    @property
    def living(self) -> list[MemoryExecutor]:
        """The executors that have not ended."""
        return [executor for executor in self.executors.values() if not executor.released.is_set()]

    # ---- bindings

    def _on_binding(self, entry: Entry) -> None:
        name = entry.key.rpartition(".")[2]
        known = self.executors.get(name)
        if entry.value is None:
            if known is not None:
                known.drop()
                self._spawn(self._forget(known))
            return
        binding = decode_record(BindingRecord, entry.value)
        if binding is None:
            return
        if known is None:
            if not self._stopping:
                known = self.executors[name] = MemoryExecutor(self._place, binding)
                known.start()
                self._follow_changes()
        elif binding.leave:
            news = not known.life.leaving or binding.force > known.life.forced
            if binding.force:
                known.force()
            else:
                known.leave()
            if news:
                self._spawn(known.nudge())

    async def _forget(self, executor: MemoryExecutor) -> None:
        await executor.released.wait()
        await executor.writer.settled()
        self.executors.pop(executor.binding.executor, None)
        if not any(each.consumer == executor.consumer for each in self.executors.values()):
            self._place.consumers.forget(executor.binding.consumer)

    # ---- what executors report

    async def _on_report(self, subject: str, data: bytes) -> bytes:
        executor = self.executors.get(subject.rpartition(".")[2])
        if is_state_request(data):
            if executor is None or executor.released.is_set():
                return refusal(ExecutorNotFound("the executor is not on this node any more")).encode()
            return await self._states.answer(executor.binding.session, data)
        try:
            report = ExecutorReport.decode(data)
        except MalformedMessage:
            return Orders(LEAVE).encode()
        orders = Orders(LEAVE) if executor is None else await executor.report(report)
        return orders.encode()

    # ---- while there are executors

    def _end_stuck(self, name: str, cause: Reason) -> None:
        executor = self.executors.get(name)
        if executor is not None and not executor.released.is_set():
            executor.end(cause)

    def _follow_changes(self) -> None:
        """Keep leases only while somebody can have some: in virtual time an idle cluster should do nothing."""
        if self.living and not self._keeping and not self._stopping:
            works = {"leases": self._place.leases.run(KEEP_S), "executors": self._look_after()}
            self._keeping = [asyncio.create_task(work, name=f"{name} {self.name}") for name, work in works.items()]
        elif not self.living:
            for task in self._keeping:
                task.cancel()
            self._errands.update(self._keeping)
            for task in self._keeping:
                task.add_done_callback(self._errands.discard)
            self._keeping = []

    async def _look_after(self) -> None:
        """Have those report who should, and learn what waits in sessions whose executors are busy."""
        while True:
            await asyncio.sleep(TICK_S)
            with contextlib.suppress(FlameError):
                for executor in self.living:
                    if executor.must_be_reminded:
                        await executor.nudge()
                busy = [executor for executor in self.living if executor.is_busy()]
                if busy and self.broker.connected:
                    pending = await self._place.consumers.pending({executor.consumer for executor in busy})
                    for executor in busy:
                        if (count := pending.get(executor.consumer[1])) is not None:
                            executor.note_backlog(count)

    def _spawn(self, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)


def _record(name: str, capacity: Resources) -> NodeRecord:
    return NodeRecord(name=name, hostname="memory", arch="-", os="-", capacity=capacity, started=time.time())
