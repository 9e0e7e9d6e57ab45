"""Flame as a contestant: a scheduler and an executor manager as processes, on a broker of theirs."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import flame
from benchmarks.contestant import Processes
from benchmarks.processes import Child, Lifetime
from benchmarks.servers import Servers
from flame.protocol.records import ExecutorRecord
from flame.protocol.states import ExecutorState

_SERVICES: Final = Path(__file__).parent / "services"
_READY_S: Final = 60.0
_POLL_S: Final = 0.02
_CAPACITY: Final = ("--cpu", "2000", "--memory", "8t")
"""What the node claims to have, so that it is never what limits a figure."""


class FlameCluster:
    """Scheduler, executor manager and a connection."""

    def __init__(self, servers: Servers, lifetime: Lifetime, folder: Path) -> None:
        """Plan it; entering it starts it."""
        self._servers = servers
        endpoint = ["--endpoint", servers.endpoint]
        scheduler = [*endpoint, "--replicas", str(servers.replicas)]
        manager = [*endpoint, "--node", "bench", "--work-dir", str(folder / "node"), *_CAPACITY]
        self.scheduler = Child("flame_services.scheduler", scheduler, lifetime, folder / "scheduler.log")
        self.manager = Child("flame_services.executor_manager", manager, lifetime, folder / "manager.log")
        self._connection: flame.Connection | None = None

    @property
    def connection(self) -> flame.Connection:
        """A connection of this process."""
        assert self._connection is not None, "the cluster was not started"
        return self._connection

    @property
    def servers(self) -> Servers:
        """Its broker."""
        return self._servers

    async def __aenter__(self) -> Self:
        """Start it and return when it has a node."""
        try:
            await self.scheduler.start()
            await self.manager.start()
            self._connection = await flame.connect(self._servers.endpoint)
            await self._ready()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        await self._stop()

    async def _ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while True:
            self.scheduler.check()
            self.manager.check()
            try:
                if (await self.connection.info()).nodes:
                    return
            except flame.Unavailable:
                pass  # no scheduler answers yet
            if time.monotonic() > deadline:
                raise RuntimeError(f"the cluster has no node after {_READY_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def _stop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
        await self.manager.stop()
        await self.scheduler.stop()

    async def register(self, name: str, service: str, **spec: Any) -> None:
        """Register an application that runs a program of ``benchmarks/services``."""
        program = str(_SERVICES / f"{service}.py")
        await self.connection.register_application(name, {"command": sys.executable, "arguments": [program], **spec})

    async def executors(self, session: flame.Session) -> list[ExecutorRecord]:
        """Return the executors that take tasks of a session."""
        return [
            executor
            for executor in await self.connection.list_executors()
            if executor.session == session.id and executor.state is ExecutorState.BOUND
        ]

    async def bound(self, session: flame.Session, count: int) -> list[ExecutorRecord]:
        """Return a session's executors once there are so many."""
        deadline = time.monotonic() + _READY_S
        while True:
            executors = await self.executors(session)
            if len(executors) >= count:
                return executors
            if time.monotonic() > deadline:
                raise RuntimeError(f"{session.id} has {len(executors)} of {count} executors after {_READY_S:g} s")
            await asyncio.sleep(_POLL_S)

    @asynccontextmanager
    async def session(self, application: str, *, executors: int) -> AsyncIterator[FlameSession]:
        """Open a session that has so many executors, no more and no less."""
        session = await self.connection.create_session(application, min_instances=executors, max_instances=executors)
        try:
            bound = await self.bound(session, executors)
            yield FlameSession(self, session, [executor.pid for executor in bound])
        finally:
            await session.close()


class FlameSession:
    """A `benchmarks.contestant.Contestant`."""

    def __init__(self, cluster: FlameCluster, session: flame.Session, executors: list[int]) -> None:
        """Made by a cluster."""
        self.session = session
        self._cluster = cluster
        self._executors = executors

    def processes(self) -> Processes:
        """See `Contestant`."""
        return {
            "broker": self._cluster.servers.pids(),
            "executors": self._executors,
            "control": [self._cluster.scheduler.pid, self._cluster.manager.pid],
        }

    async def invoke(self, data: bytes) -> bytes:
        """See `Contestant`."""
        return (await self.session.invoke(data)).output

    async def run_all(self, inputs: list[bytes]) -> None:
        """See `Contestant`."""
        for handle in await self.session.create_tasks(inputs):
            await handle


class MappedSession(FlameSession):
    """The same by `flame.Session.map`, as a program would do that has no need for handles."""

    def __init__(self, other: FlameSession) -> None:
        """Use another's session."""
        super().__init__(other._cluster, other.session, other._executors)  # noqa: SLF001  # its own kind

    async def run_all(self, inputs: list[bytes]) -> None:
        """See `Contestant`."""
        async for _ in self.session.map(inputs):
            pass
