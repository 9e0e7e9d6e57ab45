"""The executor manager as a program: what it consists of, and the order of its start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from functools import partial
from typing import Any, Final

from flame.broker.jetstream import connect
from flame.broker.seam import Broker, Subscription
from flame.cancel import end_tasks
from flame.errors import FlameError, Unavailable
from flame.logs import get_logger
from flame.protocol import subjects
from flame_services.executor_manager.berth import Berths
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.enforcement import Enforcement
from flame_services.executor_manager.executor import Executor
from flame_services.executor_manager.executors import Executors
from flame_services.executor_manager.gpus import Gpus
from flame_services.executor_manager.keeper import LeaseKeeper
from flame_services.executor_manager.ledger_folder import LedgerFolder
from flame_services.executor_manager.leftovers import clear_leftovers
from flame_services.executor_manager.node import NodeHeartbeat
from flame_services.executor_manager.orphans import adopt_orphans, reap_orphans
from flame_services.executor_manager.output import OutputFollower
from flame_services.executor_manager.place import Place
from flame_services.executor_manager.settings import ManagerSettings, node_record
from flame_services.executor_manager.stocks import Stocks
from flame_services.executor_manager.work_folder import WorkFolder
from flame_services.program import failure_of, run_program

log = get_logger("flame.manager")

NAME: Final = "flame-executor-manager"
_SUMMARY: Final = (
    "Run the executors of one node: start the services that the scheduler binds here, and look after them."
)
_LAST_OUTPUT_S: Final = 1.0
_RETRY_S: Final = 0.5


class ExecutorManager:
    """Runs the executors of one node."""

    def __init__(self, settings: ManagerSettings) -> None:
        """Take settings; nothing is touched before `start`."""
        self._settings = settings
        self._node = settings.node_name
        self._folder = WorkFolder(settings.work_dir)
        self._broker: Broker | None = None
        self._heartbeat: NodeHeartbeat | None = None
        self._executors: Executors | None = None
        self._output: OutputFollower | None = None
        self._stocks: Stocks | None = None
        self._subscriptions: list[Subscription] = []
        self._running: list[asyncio.Task[None]] = []
        self._stopped: asyncio.Task[None] | None = None
        self._enforcement = Enforcement(settings)
        self._ledgers: LedgerFolder | None = None

    async def start(self) -> None:
        """Register the node and begin to carry bindings out.

        Raises `ConfigurationError` if the folder or the node's name is another manager's, `BrokerUnavailable` if
        there is no broker.
        """
        settings, node = self._settings, self._node
        started = time.time()
        self._folder.claim()
        last = self._folder.last_user()
        broker = self._broker = await connect(settings.endpoint, name=f"{NAME} {node}")
        held = self._enforcement
        held.claim()
        record = node_record(settings, started, memory_by=held.memory_by, cpu_by=held.cpu_by)
        self._heartbeat = NodeHeartbeat(broker, record)
        await self._heartbeat.claim(last.get("started") if last.get("node") == node else None)
        self._folder.sign(node, started)
        self._run("heartbeat", self._heartbeat.run())
        ended = await self._clear_leftovers(broker, followed=last.get("node") == node)
        held.clear()

        self._output = OutputFollower(broker)
        self._ledgers = LedgerFolder(node, self._folder.path)
        self._ledgers.claim()
        leases = LeaseKeeper(broker, self._ledgers.path)
        berths = Berths(node, settings, self._folder, Gpus(settings.gpus))
        stocks = self._stocks = Stocks(berths)
        place = Place(
            node, settings, broker, self._folder, self._output, Consumers(broker), leases, held, berths, stocks
        )
        await leases.settle_leftovers()
        self._executors = Executors(place, partial(Executor, place), ended)
        leases.on_stuck = self._executors.end_stuck
        self._subscriptions.append(await broker.answer(subjects.executor_reports(node), self._executors.on_report))
        self._subscriptions.append(await broker.bucket(subjects.APPLICATIONS).watch("*", stocks.on_application))
        self._subscriptions.append(
            await broker.bucket(subjects.BINDINGS).watch(subjects.node_executors(node), self._executors.on_binding)
        )
        self._executors.on_first_reading()
        broker.on_reconnect(self._executors.on_reconnect)
        broker.on_reconnect(leases.on_reconnect)
        self._run("leases", leases.run())
        self._run("resources", held.run())
        self._run("stocks", stocks.run())
        self._run("reminders", self._executors.remind())
        self._run("backlogs", self._executors.follow_backlogs())
        self._run("output", self._output.run())

    async def stop(self) -> None:
        """End every executor and leave the cluster. No process is left, whatever the broker does.

        Takes `ManagerSettings.stop_timeout_s` and some seconds at most.
        """
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop())
        await self._stopped

    async def failed(self) -> str:
        """Return the reason when a part of it has failed, which is a fault of ours."""
        if not self._running:
            await asyncio.Event().wait()
        await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        return failure_of(self._running)

    async def _clear_leftovers(self, broker: Broker, *, followed: bool) -> set[str]:
        while True:
            try:
                return await clear_leftovers(broker, self._node, self._folder, followed=followed)
            except Unavailable as error:
                log.warning("can't read what an earlier manager left; trying on", reason=str(error))
                await asyncio.sleep(_RETRY_S)

    async def _stop(self) -> None:
        try:
            if self._stocks is not None:
                self._stocks.close()
            if self._heartbeat is not None:
                await self._heartbeat.announce_stop()
            if self._executors is not None:
                await self._executors.stop(self._settings.stop_timeout_s)
        finally:
            if self._stocks is not None:
                await self._stocks.stop()
            await end_tasks(self._running)
            await self._leave_cluster()
            self._enforcement.release()
            if self._ledgers is not None:
                self._ledgers.release()
            await self._folder.removals()
            self._folder.release()

    async def _leave_cluster(self) -> None:
        if self._output is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_OUTPUT_S):
                    await self._output.drain()
            self._output.remove_all()
        if self._broker is None:
            return
        with contextlib.suppress(FlameError):
            for subscription in self._subscriptions:
                await subscription.stop()
        if self._heartbeat is not None:
            await self._heartbeat.sign_off()
        await self._broker.close()

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._running.append(asyncio.create_task(work, name=name))


class _Program(ExecutorManager):
    """An executor manager that has its process for itself, and so may be the parent of whatever is orphaned there."""

    async def start(self) -> None:
        """See `ExecutorManager.start`."""
        if adopt_orphans():
            self._run("orphans", reap_orphans())
        await super().start()


def main() -> None:
    """Run the executor manager from the command line."""
    run_program(NAME, _SUMMARY, ManagerSettings, _Program)
