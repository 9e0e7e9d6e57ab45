"""A whole cluster in one process on the in-memory broker: scheduler, a small manager, executors and clients."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Self

import flame
from flame.broker.errors import ConsumerConflict
from flame.broker.memory import MemoryBroker, MemoryServer
from flame.broker.seam import Entry
from flame.errors import FlameError, Unavailable
from flame.protocol import defaults, subjects, topology
from flame.protocol.messages import LEAVE, SERVE, Assignment, Control, ExecutorReport, Orders
from flame.protocol.records import ApplicationSpec, BindingRecord, ExecutorRecord, NodeRecord
from flame.protocol.resources import Resources
from flame.protocol.states import ExecutorState
from flame.service.environment import ExecutorEnvironment
from flame.service.executor import Executor
from flame_services.executor_manager.assignment import Superseded, read_briefing
from flame_services.scheduler.cluster import found_cluster
from flame_services.scheduler.control_api import ControlApi
from flame_services.scheduler.planner import Planner
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View


async def insist(operation: Callable[[], Awaitable[object]]) -> None:
    """Do something that may be done twice until the broker says that it is done."""
    while True:
        try:
            await operation()
        except Unavailable:
            await asyncio.sleep(0.05)
        else:
            return


class MemoryManager:
    """Turns the bindings of one node into executors, as tasks of this loop, and answers their reports."""

    def __init__(self, server: MemoryServer, node: str, make_service: Callable[[], object]) -> None:
        self.server = server
        self.node = node
        self.make_service = make_service
        self.broker = server.connect(node)
        self.executors: dict[str, asyncio.Task[None]] = {}
        self.crashed: set[str] = set()
        self._assignments: dict[str, Assignment] = {}
        self._leaving: dict[str, bool] = {}
        """Executors that are to leave, and whether by force."""
        self._bindings: dict[str, BindingRecord] = {}
        self._records: dict[str, ExecutorRecord] = {}
        self._writing: dict[str, asyncio.Task[None]] = {}
        self._beating: asyncio.Task[None] | None = None
        self._beats = itertools.count()
        self._started = time.time()

    async def start(self) -> Self:
        await insist(self._beat)
        self._beating = asyncio.create_task(self._go_on_beating())
        await self.broker.answer(subjects.executor_reports(self.node), self._on_report)
        await self.broker.bucket(subjects.BINDINGS).watch(subjects.node_executors(self.node), self._on_binding)
        return self

    async def stop(self) -> None:
        tasks = [task for task in (self._beating, *self.executors.values(), *self._writing.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self.broker.close()

    async def _go_on_beating(self) -> None:
        while True:
            await asyncio.sleep(defaults.NODE_HEARTBEAT_S)
            try:
                await self._beat()
            except FlameError:
                continue

    async def _beat(self) -> None:
        capacity = Resources(cpu=4, memory=2**34, gpu=0)
        record = NodeRecord(
            name=self.node, hostname="here", arch="-", os="-", capacity=capacity, started=self._started,
            beat=next(self._beats),
        )  # fmt: skip
        await self.broker.bucket(subjects.NODES).put(self.node, record.encode())

    def crash(self, executor: str) -> None:
        """End an executor as if it were killed, with what it was doing."""
        self.crashed.add(executor)
        self.executors[executor].cancel()

    @property
    def living(self) -> list[str]:
        """The executors that have not ended."""
        return [name for name, task in self.executors.items() if not task.done()]

    # ---- bindings

    def _on_binding(self, entry: Entry) -> None:
        executor = entry.key.partition(".")[2]
        if entry.value is None:
            if executor in self.executors:
                self.executors[executor].cancel()
            self._records.pop(executor, None)
            self._write(executor)
            return
        binding = BindingRecord.decode(entry.value)
        self._bindings[executor] = binding
        if executor not in self.executors:
            self.executors[executor] = asyncio.create_task(self._live(binding))
        if binding.leave and self._leaving.get(executor) is not binding.force:
            self._leaving[executor] = binding.force
            self._nudge(binding)

    def _nudge(self, binding: BindingRecord) -> None:
        control = subjects.control(binding.application, binding.session)
        self._writing[f"nudge {binding.executor}"] = asyncio.create_task(
            self.broker.publish(control, Control(binding.executor).encode())
        )

    async def _live(self, binding: BindingRecord) -> None:
        executor = binding.executor
        now = time.time()
        self._records[executor] = ExecutorRecord(
            id=executor, node=self.node, application=binding.application, session=binding.session, epoch=binding.epoch,
            state=ExecutorState.STARTING, created=now, updated=now,
        )  # fmt: skip
        self._write(executor)
        status = 1
        try:

            async def brief() -> None:
                self._assignments[executor] = (await read_briefing(self.broker, binding)).assignment

            await insist(brief)
            broker = self.server.connect(executor)
            try:
                environment = ExecutorEnvironment(broker.endpoint, self.node, executor)
                status = await Executor(self.make_service(), environment, broker).serve()
            finally:
                await broker.close()
        except Superseded:
            status = 0  # it has nothing to do
        except asyncio.CancelledError:
            if executor not in self.crashed:
                raise
        record = self._records.get(executor)
        if record is not None:
            self._records[executor] = record.changed(state=ExecutorState.RELEASED, clean=status == 0, idle=False)
            self._write(executor)

    def _write(self, executor: str) -> None:
        """Bring the executor's record to the broker, whatever that takes."""
        if executor not in self._writing or self._writing[executor].done():
            self._writing[executor] = asyncio.create_task(self._write_until_same(executor))

    async def _write_until_same(self, executor: str) -> None:
        bucket = self.broker.bucket(subjects.EXECUTORS)
        key = subjects.executor_key(self.node, executor)
        written: ExecutorRecord | str | None = "nothing yet"
        while written != (record := self._records.get(executor)):
            if record is None:
                await insist(partial(bucket.delete, key))
            else:
                await insist(partial(bucket.put, key, record.encode()))
            written = record

    # ---- reports

    async def _on_report(self, subject: str, data: bytes) -> bytes:
        executor = subject.rpartition(".")[2]
        report = ExecutorReport.decode(data)
        record = self._records.get(executor)
        assignment = self._assignments.get(executor)
        if record is None or assignment is None or executor in self._leaving:
            self._note(executor, record, report)
            return Orders(LEAVE, force=self._leaving.get(executor, False)).encode()
        self._note(executor, record, report)
        if report.lost_consumer:
            assignment = await self._repair(executor, assignment)
        give = report.lost_consumer or report.state is ExecutorState.IDLE
        return Orders(SERVE, assignment if give else None).encode()

    def _note(self, executor: str, record: ExecutorRecord | None, report: ExecutorReport) -> None:
        if record is None or record.state is ExecutorState.RELEASED:
            return
        known = (*ExecutorState,)
        state = max(record.state, report.state, key=known.index)
        if state is ExecutorState.RELEASED:
            state = record.state  # that its connection is closed as well is said when it is
        self._records[executor] = record.changed(
            state=state, entered=record.entered or state is ExecutorState.BOUND, running=report.running,
            succeeded=max(record.succeeded, report.succeeded), failed=max(record.failed, report.failed),
            cancelled=max(record.cancelled, report.cancelled), counted_to=max(record.counted_to, report.counted_to),
            pending=report.pending, idle=report.idle_s > 0, reason=report.error.message if report.error else "",
            updated=time.time(),
        )  # fmt: skip
        self._write(executor)

    async def _repair(self, executor: str, assignment: Assignment) -> Assignment:
        spec = topology.session_consumer(
            assignment.application, assignment.session, assignment.epoch, assignment.max_executors
        )
        try:
            await insist(lambda: read_briefing(self.broker, self._bindings[executor]))
            await insist(lambda: self.broker.create_consumer(spec))
            fence = (await self.broker.stream_state(spec.stream)).last_sequence
        except (ConsumerConflict, FlameError):
            return assignment
        self._assignments[executor] = replace(assignment, fence=fence)
        return self._assignments[executor]


class MemoryCluster:
    """A scheduler and nodes on one server. What they do takes place on the running loop."""

    def __init__(self, server: MemoryServer, make_service: Callable[[], object], nodes: int = 1) -> None:
        self.server = server
        self.view = View()
        self.scheduler = server.connect("scheduler")
        self._store = Store(self.scheduler, self.view)
        recorder = Recorder(self.scheduler, self._store, "memory")
        self._planner = Planner(self.scheduler, self.view, self._store, recorder)
        self._api = ControlApi(self.scheduler, self.view, self._store, recorder, "memory", 1)
        self.managers = [MemoryManager(server, f"node{number}", make_service) for number in range(1, nodes + 1)]
        self._clients: list[flame.Connection] = []

    async def __aenter__(self) -> Self:
        await found_cluster(self.scheduler, 1)
        await self._store.start()
        await self._api.start()
        await self._planner.start()
        for manager in self.managers:
            await manager.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.close()
        for manager in self.managers:
            await manager.stop()
        for part in (self._api, self._planner, self._store):
            await part.stop()
        await self.scheduler.close()

    def client(self, name: str = "client") -> flame.Connection:
        """A client of the cluster."""
        client = flame.Connection(self.server.connect(name))
        self._clients.append(client)
        return client

    async def application(self, name: str = "app", **fields: object) -> str:
        """Register an application of the cluster's one service."""
        client = self.client("register")
        await client.register_application(name, ApplicationSpec(command="-", **fields))  # type: ignore[arg-type]
        return name

    def broker_of(self, client: flame.Connection) -> MemoryBroker:
        """The connection under a client."""
        assert isinstance(client.broker, MemoryBroker)
        return client.broker
