"""The brokers of a run: an embedded one for each contestant, or three servers as ``broker_config`` has them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from flame.broker.embedded import EmbeddedBroker, EmbeddedBrokerConfig, find_nats_server
from flame.broker.embedded.probe import jetstream_fault
from flame.broker.embedded.process import GuardedServer

_CONFIGURATION: Final = Path(__file__).parents[1] / "broker_config"
_READY_S: Final = 60.0
_ATTEMPT_S: Final = 0.5
_GRACE_S: Final = 5.0


class Servers(Protocol):
    """One broker, made of one server or several."""

    @property
    def endpoint(self) -> str:
        """Where clients connect to."""

    @property
    def replicas(self) -> int:
        """How often everything is to be stored."""

    def pids(self) -> list[int]:
        """Return the servers' process ids."""


@dataclass(frozen=True, slots=True)
class _Running:
    endpoint: str
    replicas: int
    processes: tuple[int, ...]

    def pids(self) -> list[int]:
        return list(self.processes)


@asynccontextmanager
async def embedded(folder: Path, *, sync_interval: str | None = None) -> AsyncIterator[Servers]:
    """Run an embedded broker."""
    async with EmbeddedBroker(EmbeddedBrokerConfig(data_dir=folder, sync_interval=sync_interval)) as broker:
        yield _Running(broker.endpoint, 1, (broker.pid,))


@asynccontextmanager
async def three(folder: Path) -> AsyncIterator[Servers]:
    """Run three servers of ``cluster.conf``."""
    ports = _free_ports(6)
    clients, routes = ports[:3], ports[3:]
    servers: list[GuardedServer] = []
    try:
        for number, client in enumerate(clients):
            server = _start(folder / f"flame-{number}", f"flame-{number}", client, routes[number], routes)
            servers.append(server)  # those that run are stopped if one can't be started
        pids = [await server.started() or 0 for server in servers]
        for port in clients:
            await _answers(port)
        yield _Running(",".join(f"nats://127.0.0.1:{port}" for port in clients), 3, tuple(pids))
    finally:
        for server in servers:
            server.request_stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * _GRACE_S):
                for server in servers:
                    await server.ended()
        for server in servers:
            server.kill()


def _start(folder: Path, name: str, client: int, route: int, routes: list[int]) -> GuardedServer:
    """Start one server with a copy of the configuration that holds its addresses."""
    others = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
    edits = {
        "$FLAME_SERVER_NAME": name,
        "$FLAME_ROUTES": f"[{others}]",
        "host: 0.0.0.0": "host: 127.0.0.1",
        "port: 4222": f"port: {client}",
        "port: 6222": f"port: {route}",
        "/var/lib/flame": str(folder / "store"),
    }
    shutil.copytree(_CONFIGURATION, folder)
    for file in folder.glob("*.conf"):
        text = file.read_text()
        for old, new in edits.items():
            text = text.replace(old, new)
        file.write_text(text)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)  # kept open by guard and server; nobody else is here
    try:
        command = [str(find_nats_server()), "-c", str(folder / "cluster.conf")]
        return GuardedServer(command, log_file=folder / "server.log", store_lock=lock, grace_s=_GRACE_S)
    finally:
        os.close(lock)


async def _answers(port: int) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):  # without a leader nobody answers
            async with asyncio.timeout(_ATTEMPT_S):
                if await jetstream_fault("127.0.0.1", port) is None:
                    return
        await asyncio.sleep(0.05)
    raise RuntimeError(f"the server on port {port} does not answer")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(listener.getsockname()[1]) for listener in listeners]
