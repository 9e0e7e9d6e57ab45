"""The manager of a process that somebody has started by hand: a node of the cluster that has one executor, that one.

`flame.run` starts it, as ``python -m flame_services.executor_manager.attaching``, when it is called in a process that
no manager has started. It is a process of its own since a debugger stops that one for minutes: heartbeats go on here,
and the leases of what it holds are kept from its ledger, as those of any executor.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field

from flame.broker.jetstream import connect
from flame.broker.seam import Broker, Subscription
from flame.cancel import end_tasks
from flame.errors import ConfigurationError, FlameError
from flame.protocol import defaults, subjects
from flame.protocol.records import NodeRecord
from flame.protocol.resources import Resources
from flame.protocol.subjects import check_application, check_token
from flame_services.executor_manager.attached import Attached, AttachedExecutor, AttachedPlace
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.executors import Executors
from flame_services.executor_manager.keeper import LeaseKeeper
from flame_services.executor_manager.ledger_folder import LedgerFolder
from flame_services.executor_manager.node import NodeHeartbeat
from flame_services.executor_manager.settings import NONE, describe_node
from flame_services.program import Settings, failure_of, run_program

NAME: Final = "flame-attaching"
_SUMMARY: Final = "Be the executor manager of one process that was started by hand. For flame.run, which starts it."


class AttachingSettings(Settings):
    """What it is told by `flame.run`."""

    node: Annotated[str, AfterValidator(partial(check_token, "node"))] = Field(description="the name of the node")
    work_dir: Path = Field(description="a folder for this node alone")
    application: Annotated[str, AfterValidator(check_application)] = Field(description="what the process serves")
    executor: Annotated[str, AfterValidator(partial(check_token, "executor"))] = Field(
        description="what the process reports as until it has a session"
    )
    pid: int = Field(ge=1, description="of the process")
    channel_fd: int = Field(ge=0, description="one of a pair of sockets, of which the process has the other")


class AttachingManager:
    """Runs a node for one process."""

    def __init__(self, settings: AttachingSettings) -> None:
        """Take settings; nothing is touched before `start`."""
        self._settings = settings
        self._attached: Attached | None = None
        self._broker: Broker | None = None
        self._heartbeat: NodeHeartbeat | None = None
        self._ledgers: LedgerFolder | None = None
        self._executors: Executors | None = None
        self._subscriptions: list[Subscription] = []
        self._running: list[asyncio.Task[None]] = []
        self._stopped: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Register the node, and tell the process that its reports are answered from now on."""
        settings, node = self._settings, self._settings.node
        attached = self._attached = Attached(
            settings.application, settings.executor, settings.pid, _open(settings.channel_fd)
        )
        broker = self._broker = await connect(settings.endpoint, name=f"{NAME} {node}")
        self._heartbeat = NodeHeartbeat(broker, _record(settings))
        await self._heartbeat.claim(None)
        self._run("heartbeat", self._heartbeat.run())
        self._ledgers = LedgerFolder(node, settings.work_dir)
        self._ledgers.claim()
        leases = LeaseKeeper(broker, self._ledgers.path)
        place = AttachedPlace(node, broker, Consumers(broker), leases, attached)
        executors = self._executors = Executors(place, partial(AttachedExecutor, place))
        leases.on_stuck = executors.end_stuck
        self._subscriptions.append(await broker.answer(subjects.executor_reports(node), executors.on_report))
        self._subscriptions.append(
            await broker.bucket(subjects.BINDINGS).watch(subjects.node_executors(node), executors.on_binding)
        )
        broker.on_reconnect(leases.on_reconnect)
        self._run("leases", leases.run())
        self._run("reminders", executors.remind())
        self._run("backlogs", executors.follow_backlogs())
        attached.say_ready()

    async def stop(self) -> None:
        """Have the process leave, if it is there, and leave the cluster."""
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop())
        await self._stopped

    async def failed(self) -> str:
        """Return when the process has ended, or wants to leave; with a reason if a part of this has failed."""
        assert self._attached is not None
        over = asyncio.create_task(self._attached.over.wait())
        try:
            await asyncio.wait([over, *self._running], return_when=asyncio.FIRST_COMPLETED)
            return "" if over.done() else failure_of(self._running)
        finally:
            await end_tasks([over])

    async def _stop(self) -> None:
        try:
            if self._attached is not None:
                self._attached.stop_waiting()
            if self._heartbeat is not None:
                await self._heartbeat.announce_stop()
            if self._executors is not None:
                await self._executors.stop(defaults.LEAVE_TIMEOUT_S)
        finally:
            await end_tasks(self._running)
            if self._broker is not None:
                with contextlib.suppress(FlameError):
                    for subscription in self._subscriptions:
                        await subscription.stop()
                if self._heartbeat is not None:
                    await self._heartbeat.sign_off()
                await self._broker.close()
            if self._ledgers is not None:
                self._ledgers.release()
            if self._attached is not None:
                if self._attached.ended.is_set():  # otherwise the process removes it, having read what we wrote
                    shutil.rmtree(self._settings.work_dir, ignore_errors=True)
                self._attached.close()

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._running.append(asyncio.create_task(work, name=name))


def _open(descriptor: int) -> socket.socket:
    try:
        channel = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigurationError(f"channel_fd {descriptor}: {error.strerror}") from None
    channel.set_inheritable(False)
    return channel


def _record(settings: AttachingSettings) -> NodeRecord:
    """Describe the node. It has nothing to give, so a scheduler that doesn't know of such nodes leaves it alone."""
    record = describe_node(settings.node, time.time(), Resources())
    return record.changed(memory_by=NONE, cpu_by=NONE, application=settings.application, max_executors=1)


def main() -> None:
    """Run it from the command line."""
    run_program(NAME, _SUMMARY, AttachingSettings, AttachingManager)


if __name__ == "__main__":
    main()
