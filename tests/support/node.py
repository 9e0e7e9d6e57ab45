"""An executor manager with a real broker and real processes, where a test writes what a scheduler would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from flame.broker.embedded import EmbeddedBroker
from flame.broker.jetstream import JetStreamBroker
from flame.protocol import subjects, topology
from flame.protocol.records import (
    ApplicationRecord,
    ApplicationSpec,
    BindingRecord,
    ExecutorRecord,
    NodeRecord,
    SessionRecord,
)
from flame.protocol.states import ExecutorState
from flame_services.executor_manager.program import ExecutorManager
from flame_services.executor_manager.settings import ManagerSettings

RAW = Path(__file__).parents[1] / "integration" / "raw_executor.py"
NODE = "here"
APP = "app"
PATIENCE_S = 20.0


async def until(condition: Callable[[], Any], what: str, limit_s: float = PATIENCE_S) -> Any:
    """Return the first true answer of ``condition``; it may be a coroutine function."""
    deadline = time.monotonic() + limit_s
    while True:
        answer = condition()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass
class Control:
    """Plays the scheduler, and knows what raw executors noted."""

    broker: JetStreamBroker
    embedded: EmbeddedBroker
    folder: Path
    sessions: dict[str, int] = field(default_factory=dict)
    managers: list[ExecutorManager] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return self.embedded.endpoint

    # ---- what a scheduler writes

    async def prepare(self) -> None:
        for bucket in topology.buckets():
            await self.broker.ensure_bucket(bucket)
        for stream in topology.application_streams(APP):
            await self.broker.ensure_stream(stream)

    async def application(self, mode: str = "", **changes: Any) -> None:
        fields: dict[str, Any] = {
            "command": sys.executable,
            "arguments": (str(RAW),),
            "environments": {"MODE": mode, "NOTES": str(self.folder / "notes")} | changes.pop("environments", {}),
        }
        spec = ApplicationSpec(**fields | changes)
        record = ApplicationRecord(name=APP, spec=spec, created=time.time())
        await self.broker.bucket(subjects.APPLICATIONS).put(APP, record.encode())

    async def session(self, session: str = "s1", **fields: Any) -> None:
        usual = {"id": session, "application": APP, "created": time.time(), "epoch": 1}
        record = SessionRecord.model_validate(usual | fields)
        if record.common_data_key:
            await self.broker.bucket(subjects.COMMON_DATA).put(record.common_data_key, b"be kind")
        await self.broker.bucket(subjects.SESSIONS).put(session, record.encode())

    async def bind(self, executor: str = "e1", session: str = "s1", **fields: Any) -> None:
        epoch = fields.get("epoch", 1)
        binding = BindingRecord(
            **{
                "executor": executor,
                "node": NODE,
                "application": APP,
                "session": session,
                "epoch": epoch,
                "consumer": subjects.consumer(session, epoch),
                "created": time.time(),
            }
            | fields
        )
        await self.broker.bucket(subjects.BINDINGS).put(subjects.executor_key(NODE, executor), binding.encode())

    async def unbind(self, executor: str = "e1") -> None:
        await self.broker.bucket(subjects.BINDINGS).delete(subjects.executor_key(NODE, executor))

    async def serve(self, mode: str = "", executor: str = "e1", **application: Any) -> None:
        """Bind an executor of a fresh session to this node."""
        await self.application(mode, **application)
        await self.session()
        await self.bind(executor)

    # ---- what there is to see

    async def record(self, executor: str = "e1") -> ExecutorRecord | None:
        entry = await self.broker.bucket(subjects.EXECUTORS).get(subjects.executor_key(NODE, executor))
        return None if entry is None or entry.value is None else ExecutorRecord.decode(entry.value)

    async def node(self) -> NodeRecord | None:
        entry = await self.broker.bucket(subjects.NODES).get(NODE)
        return None if entry is None or entry.value is None else NodeRecord.decode(entry.value)

    async def reaches(self, state: ExecutorState, executor: str = "e1", limit_s: float = PATIENCE_S) -> ExecutorRecord:
        """Wait for a state, and fail at once if the executor is released instead."""
        seen: list[ExecutorRecord] = []

        async def there() -> bool:
            record = await self.record(executor)
            if record is not None:
                seen.append(record)
            return record is not None and record.state in (state, ExecutorState.RELEASED)

        await until(there, f"{executor} is {state.value}", limit_s)
        assert seen[-1].state is state, seen[-1]
        return seen[-1]

    async def released(self, executor: str = "e1", limit_s: float = PATIENCE_S) -> ExecutorRecord:
        return await self.reaches(ExecutorState.RELEASED, executor, limit_s)

    def notes(self, word: str, executor: str = "e1") -> list[Any]:
        """What raw executors noted under a word."""
        file = self.folder / "notes"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [found[2:] for line in lines if (found := json.loads(line))[:2] == [executor, word]]

    # ---- managers

    def settings(self, **fields: Any) -> ManagerSettings:
        usual = {"endpoint": self.endpoint, "node": NODE, "work_dir": self.folder / "node", "stop_timeout_s": 3}
        return ManagerSettings.model_validate(usual | fields)

    async def manager(self, **fields: Any) -> ExecutorManager:
        manager = ExecutorManager(self.settings(**fields))
        self.managers.append(manager)
        await manager.start()
        return manager

    @contextlib.asynccontextmanager
    async def program(self, *options: str, **popen: Any) -> AsyncIterator[subprocess.Popen[str]]:
        """Run the manager as a program of its own, which has said that it is ready."""
        command = [
            *(sys.executable, "-m", "flame_services.executor_manager", "--endpoint", self.endpoint),
            *("--node", NODE, "--work-dir", str(self.folder / "node"), "--stop-timeout-s", "3", *options),
        ]
        log = self.folder / "program.log"
        process = start_program(command, log, **popen)
        try:
            await until(lambda: "ready" in log.read_text() or process.poll() is not None, "the program is ready")
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def start_program(command: list[str], log: Path, **popen: Any) -> subprocess.Popen[str]:
    with log.open("w") as output:
        return subprocess.Popen(command, stderr=output, text=True, start_new_session=True, **popen)


def left_of(endpoint: str) -> list[psutil.Process]:
    """Return the processes that belong to a cluster and still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLAME_ENDPOINT") == endpoint and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
