"""A cluster of real processes for tests: broker, scheduler and executor managers on free ports of 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import pytest

import flame
from flame.broker.embedded import EmbeddedBroker, EmbeddedBrokerConfig
from flame.protocol.records import ExecutorRecord
from flame.protocol.states import ExecutorState

SERVICES = Path(__file__).parents[1] / "services"
PATIENCE_S = 20.0
"""How long a test waits for something that must happen; far more than it takes."""


async def eventually(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Return the first true value of ``condition``, asking again and again; fail after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.02)


class Cluster:
    """Broker, scheduler and executor managers, each a process of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 1,
        manager_options: tuple[str, ...] = (),
        scheduler_options: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.broker = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=folder / "broker"))
        self.manager_options = manager_options
        self.scheduler_options = scheduler_options
        self.node_names = [f"node{number}" for number in range(1, nodes + 1)]
        self.scheduler: subprocess.Popen[bytes] | None = None
        self.managers: dict[str, subprocess.Popen[bytes]] = {}

    async def start(self) -> Self:
        await self.broker.start()
        self.start_scheduler()
        for name in self.node_names:
            self.start_manager(name)
        async with self.connect() as connection:

            async def ready() -> bool:
                with contextlib.suppress(flame.Unavailable):  # not yet
                    return (await connection.info()).nodes >= len(self.node_names)
                return False

            await eventually(ready, "the cluster is ready")
        return self

    def start_scheduler(self) -> None:
        self.scheduler = self._start("flame_services.scheduler", "scheduler", *self.scheduler_options)

    def start_manager(self, name: str, *options: str) -> None:
        """Start the manager of a node, which gets ``options`` instead of those that all others have."""
        usual = ("--node", name, "--work-dir", str(self.folder / name))
        given = options or self.manager_options
        self.managers[name] = self._start("flame_services.executor_manager", name, *usual, *given)

    def _start(self, module: str, log: str, *options: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", module, "--endpoint", self.broker.endpoint, "--log-level", "debug", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def stop(self) -> None:
        for process in (*self.managers.values(), self.scheduler):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in (*self.managers.values(), self.scheduler):
            if process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(process.wait, 30)
                if process.poll() is None:
                    process.kill()
                    process.wait()
        await self.broker.stop()

    def logs(self) -> str:
        """What the programs said, for a failing test."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in sorted(self.folder.glob("*.log"))
        )

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[flame.Connection]:
        async with await flame.connect(self.broker.endpoint) as connection:
            yield connection

    def service(self, name: str, **spec: Any) -> dict[str, Any]:
        """Return the specification of an application that runs a script of ``tests/services``."""
        return {"command": sys.executable, "arguments": [str(SERVICES / f"{name}.py")], **spec}


C = TypeVar("C", bound=Cluster)


@contextlib.contextmanager
def lasting(made: C, session: pytest.Session) -> Iterator[C]:
    """Have a cluster for the tests of a module; afterwards nothing of it is alive. Shows its logs if one has failed."""
    try:
        asyncio.run(made.start())
    except BaseException:
        asyncio.run(made.stop())
        print(made.logs())  # noqa: T201  # pytest shows it with the failure
        raise
    failed = session.testsfailed
    yield made
    asyncio.run(made.stop())
    if session.testsfailed > failed:
        print(made.logs())  # noqa: T201  # pytest shows it with the failure
    assert processes_of(made.broker.endpoint) == []


async def executors_of(connection: flame.Connection, session_id: str) -> list[ExecutorRecord]:
    """Return the living executors of a session."""
    return [
        executor
        for executor in await connection.list_executors()
        if executor.session == session_id and executor.state is not ExecutorState.RELEASED
    ]


async def started_executors(connection: flame.Connection, session_id: str) -> list[ExecutorRecord]:
    """Return the living executors of a session once there are some and it is known which process each of them is.

    A task may run, and end, before that.
    """

    async def known() -> list[ExecutorRecord]:
        found = await executors_of(connection, session_id)
        return found if all(executor.pid for executor in found) else []

    found: list[ExecutorRecord] = await eventually(known, f"the executors of session {session_id} are known")
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie doesn't."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(pid: int) -> None:
    """End a process at once, if it hasn't ended."""
    assert pid > 1, f"{pid} is no process but many: of the whole test run"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def processes_of(endpoint: str) -> list[str]:
    """Return every living process that belongs to a cluster: its programs, and executors with their children."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
            continue
        command = process.info["cmdline"] or []
        with contextlib.suppress(psutil.Error):
            if endpoint in command or process.environ().get("FLAME_ENDPOINT") == endpoint:
                found.append(f"{process.pid} {' '.join(command)[:120]}")
    return found
