"""`flmctl up`: a whole cluster in one terminal, that ends with it."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from flame.broker.embedded import BrokerStartFailed, DataDirInUse, EmbeddedBroker, EmbeddedBrokerConfig
from flame.client.connection import connect
from flame.config import DEFAULT_ENDPOINT
from flame.errors import Unavailable
from flame_cli.cluster import quiet_logs
from flame_cli.errors import CommandFailed, ExtraMissing
from flame_cli.output import note
from flame_cli.part import Part
from flame_cli.waiting import first_of

START_LIMIT_S: Final = 30.0
MANAGER_STOP_LIMIT_S: Final = 20.0
"""Its executors may be in the middle of something."""
SCHEDULER_STOP_LIMIT_S: Final = 5.0

_POLL_S: Final = 0.05
_ONE_CTRL_C_S: Final = 0.3
"""Programs that pass signals on may deliver one Ctrl-C twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """How to run the cluster."""

    data_dir: Path
    """Holds everything that it keeps: messages, logs, the work of executors."""
    host: str
    port: int
    """0: a free one."""
    client_code: bool
    """It has the built-in applications that run what clients send."""
    verbose: bool
    """The services log to standard error rather than to files."""


def up(options: UpOptions) -> None:
    """Run a cluster until a signal stops it; raise `CommandFailed` if it can't start or can't go on."""
    if any(importlib.util.find_spec(module) is None for module in ("flame_services", "psutil")):
        raise ExtraMissing("flmctl up", "server")
    quiet_logs()
    asyncio.run(_up(options))


async def _up(options: UpOptions) -> None:
    cluster = LocalCluster(options)
    with _StopSignals() as signals:
        try:
            await first_of(cluster.run(), signals.stop.wait())
        except CommandFailed as error:
            if cluster.started:
                note(f"{error}: stopping…")
            raise
        finally:
            if signals.stop.is_set():
                note("stopping…")
            try:
                await first_of(cluster.stop(), signals.force.wait())
            finally:
                await cluster.kill()
            if cluster.started:
                note("stopped")


class LocalCluster:
    """A broker, a scheduler and an executor manager that live no longer than this process."""

    def __init__(self, options: UpOptions) -> None:
        """Plan it; nothing is touched before `run`."""
        self._options = options
        self._broker = EmbeddedBroker(
            EmbeddedBrokerConfig(data_dir=options.data_dir, host=options.host, port=options.port)
        )
        self._scheduler: Part | None = None
        self._manager: Part | None = None
        self._lifetime: int | None = None

    @property
    def started(self) -> bool:
        """Whether anything of it has been running."""
        return self._scheduler is not None

    async def run(self) -> None:
        """Start everything and say when it is ready; never return, but raise when a part of it has ended."""
        note("starting the broker…")
        await self._start_broker()
        endpoint = self._broker.endpoint
        node_dir = str(self._options.data_dir / "node")
        scheduler = self._scheduler = self._part("scheduler", [] if self._options.client_code else ["--no-client-code"])
        manager = self._manager = self._part("executor manager", ["--work-dir", node_dir])
        lifetime, self._lifetime = os.pipe()
        try:
            for part in (scheduler, manager):
                note(f"starting the {part.name}…")
                await part.start(lifetime)
        finally:
            os.close(lifetime)
        await first_of(self._ready(endpoint, scheduler, manager), self._broken(scheduler, manager))
        print(f"Flame is ready at {endpoint}", flush=True)
        self._hint(endpoint)
        await self._broken(scheduler, manager)

    async def stop(self) -> None:
        """End everything in order, each part within its limit. Safe before `run`, and again."""
        if self._manager is not None:
            await self._manager.stop(MANAGER_STOP_LIMIT_S)
        if self._scheduler is not None:
            await self._scheduler.stop(SCHEDULER_STOP_LIMIT_S)
        await self._broker.stop()

    async def kill(self) -> None:
        """End at once whatever still runs. Safe before `run`, and again."""
        for part in (self._manager, self._scheduler):
            if part is not None:
                await part.kill()
        self._broker.kill()
        if self._lifetime is not None:
            os.close(self._lifetime)
            self._lifetime = None

    async def _start_broker(self) -> None:
        try:
            await self._broker.start()
        except DataDirInUse as error:
            raise DataDirInUse(f"{error}: stop that cluster, or choose another folder with --data-dir") from None
        except BrokerStartFailed as error:
            what, _, log = str(error).partition("\n")
            raise CommandFailed(what, log) from None

    def _part(self, name: str, arguments: list[str]) -> Part:
        log = None if self._options.verbose else self._options.data_dir / f"{name.replace(' ', '-')}.log"
        module = f"flame_services.{name.replace(' ', '_')}"
        return Part(name, module, ["--endpoint", self._broker.endpoint, *arguments], log)

    async def _ready(self, endpoint: str, scheduler: Part, manager: Part) -> None:
        """Return when the cluster answers and has a node."""
        note("waiting for the cluster to answer…")
        waiting_for = scheduler
        try:
            async with asyncio.timeout(START_LIMIT_S), await connect(endpoint, name="flmctl") as connection:
                while True:
                    try:
                        nodes = (await connection.info()).nodes
                    except Unavailable:  # not yet
                        nodes = None
                    if nodes:
                        return
                    waiting_for = scheduler if nodes is None else manager
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise waiting_for.failure(f"was not ready within {START_LIMIT_S:g} s") from None

    async def _broken(self, *parts: Part) -> None:
        """Raise when a part has ended by itself."""

        async def ended(part: Part) -> None:
            raise part.failure(f"ended by itself with {_status(await part.ended())}")

        async def broker_ended() -> None:
            raise CommandFailed(f"the broker ended by itself with {_status(await self._broker.wait())}")

        await first_of(broker_ended(), *(ended(part) for part in parts))

    def _hint(self, endpoint: str) -> None:
        where = "" if endpoint == DEFAULT_ENDPOINT else f" --endpoint {endpoint}"
        note(f"try it from another terminal: flmping{where} -t 10\nstop it: Ctrl-C")
        if self._options.host not in ("127.0.0.1", "::1", "localhost"):
            note("everybody who can reach this port may use the cluster: it asks for no credentials")


def _status(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


class _StopSignals:
    """What a person or a supervisor asks for by signals."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.force = asyncio.Event()
        """Ctrl-C again: end at once."""
        self._loop = asyncio.get_running_loop()
        self._asked_at = 0.0
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
            self._numbers.append(signal.SIGHUP)

    def __enter__(self) -> Self:
        for number in self._numbers:
            self._loop.add_signal_handler(number, self._on_signal, number)
        return self

    def __exit__(self, *exception: object) -> None:
        # Everything has stopped: whoever goes on pressing Ctrl-C must not change how this ends.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        for number in self._numbers:
            self._loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self.stop.is_set():
            self._asked_at = self._loop.time()
            self.stop.set()
        elif number is signal.SIGINT and self._loop.time() - self._asked_at > _ONE_CTRL_C_S:
            self.force.set()
