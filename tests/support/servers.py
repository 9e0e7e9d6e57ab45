"""Servers started from the files of ``broker_config``, and clusters on top of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

from flame.broker.embedded import find_nats_server
from flame.broker.embedded.probe import jetstream_fault
from flame.broker.jetstream import connect
from flame.broker.seam import Broker
from flame.config import Security
from flame.errors import BrokerUnavailable
from tests.support.cluster import Cluster, eventually, processes_of

BROKER_CONFIG = Path(__file__).parents[2] / "broker_config"

Edits = Mapping[str, str]
"""What an operator would change in the files, by what is there now."""


def _on(*lines: str) -> Edits:
    """Switch lines on as the files say."""
    return {line: line.removeprefix("# ") for line in lines}


OPTIONS: Mapping[str, Edits] = {
    "sync": _on("# sync_interval: always"),
    "encryption": _on("# key: $FLAME_STORE_KEY", "# cipher: chachapoly"),
    "authorization": _on("# authorization: { user: $FLAME_BROKER_USER, password: $FLAME_BROKER_PASSWORD }"),
    "tls": _on("# include ./tls.conf", "# timeout: 5"),
    "verified clients": _on("# verify: true"),
}
"""Every line of the files that is off."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def edited_copy(folder: Path, edits: Edits) -> Path:
    """Copy ``broker_config`` to ``folder`` with changes, each of which must change something."""
    shutil.copytree(BROKER_CONFIG, folder)
    unused = set(edits)
    for file in sorted(folder.glob("*.conf")):
        text = file.read_text()
        for old, new in edits.items():
            if old in text:
                unused.discard(old)
                text = text.replace(old, new)
        file.write_text(text)
    assert not unused, f"not in broker_config: {unused}"
    return folder


class Server:
    """One nats-server with a configuration of its own, that can be killed and started again."""

    def __init__(self, folder: Path, file: str, port: int, edits: Edits, environment: Mapping[str, str]) -> None:
        folder.mkdir(parents=True)
        self.name = folder.name
        self.port = port
        self.log = folder / "server.log"
        self.config = edited_copy(
            folder / "config",
            {"port: 4222": f"port: {port}", "/var/lib/flame": str(folder / "store"), **edits},
        )
        self._file = self.config / file
        self._environment = dict(environment)
        self.check: Callable[[], Awaitable[bool]] = self._answers
        """Whether it serves; another one where it takes more than a connection."""
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Start the process; `ready` tells when it serves."""
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [find_nats_server(), "-c", self._file],
                env={**os.environ, **self._environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def ready(self) -> None:
        """Return when it answers JetStream requests; in a cluster there must be a leader for that."""

        async def serves() -> bool:
            assert self.alive, f"{self.name} has ended:\n{self.log.read_text()[-2000:]}"
            return await self.check()

        await eventually(serves, f"{self.name} answers")

    async def _answers(self) -> bool:
        with contextlib.suppress(TimeoutError):  # without a leader nobody answers
            async with asyncio.timeout(0.5):
                return await jetstream_fault("127.0.0.1", self.port) is None
        return False

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(30)


class Servers:
    """The servers of one broker, by name. Stands in for an embedded broker in a `Cluster`."""

    def __init__(self, servers: list[Server], scheme: str = "nats", user: str = "") -> None:
        self.servers = {server.name: server for server in servers}
        self.endpoint = ",".join(f"{scheme}://{user}127.0.0.1:{server.port}" for server in servers)

    async def start(self) -> None:
        for server in self.servers.values():
            server.run()
        for server in self.servers.values():
            await server.ready()

    async def stop(self) -> None:
        for server in self.servers.values():
            await asyncio.to_thread(server.stop)

    def on_port(self, port: int | None) -> Server:
        return next(server for server in self.servers.values() if server.port == port)


def single(folder: Path, edits: Edits | None = None, environment: Mapping[str, str] | None = None) -> Server:
    """Return a server of ``single.conf``."""
    return Server(folder / "flame", "single.conf", free_port(), edits or {}, environment or {})


def cluster_of_three(folder: Path, edits: Edits | None = None) -> list[Server]:
    """Return the servers of ``cluster.conf``."""
    routes = {f"flame-{number}": free_port() for number in (1, 2, 3)}
    environment = {"FLAME_ROUTES": f"[{', '.join(f'nats://127.0.0.1:{port}' for port in routes.values())}]"}
    return [
        Server(
            folder / name,
            "cluster.conf",
            free_port(),
            {"port: 6222": f"port: {route}", "host: 0.0.0.0": "host: 127.0.0.1", **(edits or {})},
            {**environment, "FLAME_SERVER_NAME": name},
        )
        for name, route in routes.items()
    ]


class ServedCluster(Cluster):
    """A cluster whose broker is made of configured servers."""

    def __init__(self, folder: Path, servers: Servers, *, replicas: int = 1) -> None:
        super().__init__(folder, scheduler_options=("--replicas", str(replicas)))
        self.servers = servers
        self.broker = servers  # type: ignore[assignment]  # it has what a cluster needs of one


@contextlib.asynccontextmanager
async def served(folder: Path, servers: Servers, *, replicas: int = 1) -> AsyncIterator[ServedCluster]:
    """Run a cluster of one node on servers; afterwards nothing of it is alive."""
    cluster = ServedCluster(folder, servers, replicas=replicas)
    try:
        yield await cluster.start()
    except BaseException:
        print(cluster.logs())  # noqa: T201  # pytest shows it with the failure
        raise
    finally:
        await cluster.stop()
    assert processes_of(servers.endpoint) == []


async def run_tasks(cluster: Cluster) -> None:
    """Run a session of a service with a process of its own."""
    async with cluster.connect() as connection:
        await connection.register_application("lab", cluster.service("lab"))
        async with await connection.create_session("lab") as session:
            tasks = await asyncio.gather(*(session.invoke(json.dumps(["echo", n]), timeout_s=20) for n in range(20)))
            assert [task.output for task in tasks] == [str(n).encode() for n in range(20)]


async def try_connect(endpoint: str, security: Security | None = None) -> Broker | None:
    """Return a connection if there can be one now."""
    try:
        return await connect(endpoint, security=security, timeout_s=2)
    except BrokerUnavailable:
        return None


async def answers(endpoint: str, security: Security | None = None) -> bool:
    """Whether there can be a connection now."""
    broker = await try_connect(endpoint, security)
    if broker is not None:
        await broker.close()
    return broker is not None
