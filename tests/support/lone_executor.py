"""One executor on the in-memory broker, without a cluster: the test is its scheduler, its manager and its client."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Self

from flame.broker.memory import MemoryServer
from flame.broker.seam import StoredMessage
from flame.protocol import subjects, topology
from flame.protocol.messages import Attempts, ResultRecord, TaskMessage, TaskOptions
from flame.protocol.states import TaskState
from flame.protocol.supervision import LEAVE, SERVE, Assignment, Control, ExecutorReport, Orders
from flame.service.environment import ExecutorEnvironment
from flame.service.executor import Executor

APPLICATION = "app"
SESSION = "s"
NODE = "node1"
TASKS = subjects.task_stream(APPLICATION)
RESULTS = subjects.result_stream(APPLICATION)


class LoneExecutor:
    """Serves one session with a service, until it is told to leave or the context ends."""

    def __init__(
        self, service: object, server: MemoryServer | None = None, name: str = "e1", **assignment: Any
    ) -> None:
        self.server = MemoryServer() if server is None else server
        self.name = name
        self.broker = self.server.connect(f"manager of {name}")
        self.connection = self.server.connect(name)
        consumer = topology.session_consumer(APPLICATION, SESSION, 1, 8)
        self.consumer = replace(consumer, ack_wait_s=assignment.get("ack_wait_s", consumer.ack_wait_s))
        self.assignment = Assignment(APPLICATION, SESSION, 1, TASKS, consumer.name, **assignment)
        self.orders = Orders(SERVE)
        self.report: ExecutorReport | None = None
        """The last one."""
        self._executor = Executor(service, ExecutorEnvironment("memory://", NODE, name), self.connection)
        self._serving: asyncio.Task[int] | None = None

    async def __aenter__(self) -> Self:
        await self.broker.ensure_stream(topology.task_stream(APPLICATION))
        await self.broker.ensure_stream(topology.result_stream(APPLICATION))
        for bucket in topology.buckets():
            await self.broker.ensure_bucket(bucket)
        await self.broker.create_consumer(self.consumer)
        await self.broker.answer(subjects.executor_report(NODE, self.name), self._on_report)
        self._serving = asyncio.create_task(self._executor.serve(self.assignment))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._serving is not None
        self._serving.cancel()
        await asyncio.wait((self._serving,))
        await self.connection.close()
        await self.broker.close()

    async def _on_report(self, _subject: str, data: bytes) -> bytes:
        self.report = ExecutorReport.decode(data)
        return self.orders.encode()

    # ---- as a client

    async def ask(self, task: str, data: bytes = b"", **options: Any) -> None:
        """Store a task."""
        message = TaskMessage(data, options=TaskOptions(**options) if options else None)
        await self.broker.store(subjects.task(APPLICATION, SESSION, task), message.encode(), 5.0)

    async def record(self, task: str) -> ResultRecord:
        """Wait for a task's record."""
        async with aclosing(
            self.broker.read(RESULTS, subjects.result(APPLICATION, SESSION, task), follow=True)
        ) as all_:
            async for stored in all_:
                return ResultRecord.decode(stored.data)
        raise AssertionError(f"task {task} has no record")

    async def stored_record(self, task: str) -> StoredMessage | None:
        """Return a task's record as it is stored, if it is."""
        return await self.broker.last(RESULTS, subjects.result(APPLICATION, SESSION, task))

    async def waiting(self) -> int:
        """How many tasks are stored."""
        return (await self.broker.stream_state(TASKS)).messages

    # ---- as the control side

    async def cancel(self, *tasks: str, purge: bool = True) -> None:
        """Give tasks their records and tell the executors, as the control API does."""
        for task in tasks:
            await self.keep_cancelled(task)
            if purge:
                await self.broker.purge(TASKS, subjects.task(APPLICATION, SESSION, task))
        await self._tell(Control(cancel=tasks))

    async def keep_cancelled(self, task: str) -> None:
        """Store the record of a cancelled task, and tell nobody."""

        record = ResultRecord(TaskState.CANCELLED)
        await self.broker.store(subjects.result(APPLICATION, SESSION, task), record.encode(), 5.0)

    async def attempts(self, task: str) -> Attempts:
        """What is noted of a task's runs."""
        key = subjects.task_key(subjects.task(APPLICATION, SESSION, task))
        entry = await self.broker.bucket(subjects.ATTEMPTS).get(key)
        return Attempts() if entry is None or entry.value is None else Attempts.decode(entry.value)

    async def note_attempts(self, task: str, attempts: Attempts) -> None:
        """Write what is noted of a task's runs."""
        key = subjects.task_key(subjects.task(APPLICATION, SESSION, task))
        await self.broker.bucket(subjects.ATTEMPTS).put(key, attempts.encode())

    # ---- as its manager

    async def tell_to_leave(self, *, force: bool = False) -> None:
        """Have the executor told to leave, at once."""
        self.orders = Orders(LEAVE, force=force)
        await self._tell(Control(self.name))

    async def leave(self, *, force: bool = False) -> ExecutorReport:
        """Tell it to leave and return its last report."""
        await self.tell_to_leave(force=force)
        return await self.ended()

    async def ended(self) -> ExecutorReport:
        """Wait for its end and return its last report."""
        assert self._serving is not None
        await self._serving
        assert self.report is not None
        return self.report

    async def _tell(self, control: Control) -> None:
        await self.broker.publish(subjects.control(APPLICATION, SESSION), control.encode())
