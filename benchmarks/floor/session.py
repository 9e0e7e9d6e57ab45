"""The client's side of the floor: one session, its executors as processes of their own."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import msgpack
import nats
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    RePublish,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from benchmarks.contestant import Processes
from benchmarks.floor.names import CONSUMER, IN_PROGRESS, LEASE_S, NOTE, RESULT, RESULTS, TASK, TASKS
from benchmarks.processes import Child, Lifetime

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

    from benchmarks.servers import Servers

_BREATHE: Final = 500
"""After so many publishes the loop may do something else."""
_READY_S: Final = 20.0


class FloorSession:
    """A `benchmarks.contestant.Contestant` without Flame."""

    def __init__(self, servers: Servers, lifetime: Lifetime, folder: Path, *, executors: int) -> None:
        """Plan it; `start` connects."""
        self._servers = servers
        self._executors = [
            Child("benchmarks.floor.executor", ["--endpoint", servers.endpoint], lifetime, folder / f"{number}.log")
            for number in range(executors)
        ]
        self._nc: Client | None = None
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._count = 0
        self._stored = 0
        self._expected = 0
        self._all_stored: asyncio.Future[None] | None = None
        self._reply = ""

    async def __aenter__(self) -> Self:
        """Make streams and consumer, and start the executors."""
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the executors and remove the streams."""
        await self._stop()

    async def _start(self) -> None:
        nc = self._nc = await nats.connect(self._servers.endpoint.split(","))
        replicas = self._servers.replicas
        js = nc.jetstream()
        await js.add_stream(
            StreamConfig(
                name=TASKS,
                subjects=[f"{TASK}>"],
                storage=StorageType.FILE,
                retention=RetentionPolicy.WORK_QUEUE,
                duplicate_window=1,
                num_replicas=replicas,
            )
        )
        await js.add_stream(
            StreamConfig(
                name=RESULTS,
                subjects=[f"{RESULT}>"],
                storage=StorageType.FILE,
                max_msgs_per_subject=1,
                discard=DiscardPolicy.NEW,
                discard_new_per_subject=True,
                allow_direct=True,
                duplicate_window=1,
                num_replicas=replicas,
                republish=RePublish(src=f"{RESULT}>", dest=f"{NOTE}>"),
            )
        )
        await js.add_consumer(
            TASKS,
            ConsumerConfig(
                durable_name=CONSUMER,
                filter_subject=f"{TASK}>",
                ack_policy=AckPolicy.EXPLICIT,
                max_ack_pending=IN_PROGRESS,
                ack_wait=LEASE_S,
                mem_storage=True,
            ),
        )
        inbox = nc.new_inbox()
        self._reply = f"{inbox}.1"
        await nc.subscribe(f"{inbox}.*", cb=self._on_stored)
        await nc.subscribe(f"{NOTE}>", cb=self._on_result)
        for executor in self._executors:
            await executor.start()
        for executor in self._executors:
            await executor.said("ready", _READY_S)

    async def _stop(self) -> None:
        for executor in self._executors:
            await executor.stop()
        nc, self._nc = self._nc, None
        if nc is not None:
            js = nc.jetstream()
            for stream in (TASKS, RESULTS):
                if not nc.is_closed:
                    await js.delete_stream(stream)
            await nc.close()

    # ---- as a contestant

    def processes(self) -> Processes:
        """See `Contestant`."""
        return {"broker": self._servers.pids(), "executors": [executor.pid for executor in self._executors]}

    async def invoke(self, data: bytes) -> bytes:
        """See `Contestant`."""
        return await (await self._publish(data))

    async def run_all(self, inputs: list[bytes]) -> None:
        """See `Contestant`."""
        self._stored = 0
        all_stored = self._all_stored = self._loop.create_future()
        self._expected = len(inputs)
        results = []
        for number, data in enumerate(inputs):
            results.append(await self._publish(data))
            if number % _BREATHE == 0:
                await asyncio.sleep(0)
        await all_stored
        for result in results:
            await result

    async def _publish(self, data: bytes) -> asyncio.Future[bytes]:
        assert self._nc is not None
        self._count += 1
        task = str(self._count)
        result = self._waiting[task] = self._loop.create_future()
        await self._nc.publish(TASK + task, msgpack.packb({"i": data, "t": time.time()}), self._reply)
        return result

    async def _on_stored(self, msg: Msg) -> None:
        if msg.data.startswith(b'{"error"'):
            self._fail(RuntimeError(f"a task was refused: {msg.data!r}"))
            return
        self._stored += 1
        if self._all_stored is not None and self._stored == self._expected:
            self._all_stored.set_result(None)
            self._all_stored = None

    async def _on_result(self, msg: Msg) -> None:
        record: dict[str, Any] = msgpack.unpackb(msg.data)
        result = self._waiting.pop(msg.subject.rsplit(".", 1)[1], None)
        if result is not None:
            result.set_result(record["o"])

    def _fail(self, error: Exception) -> None:
        """One refusal ends the measurement."""
        for future in (*self._waiting.values(), self._all_stored):
            if future is not None and not future.done():
                future.set_exception(error)
