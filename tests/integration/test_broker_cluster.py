"""Three servers of cluster.conf, one of which dies while there is work: nothing is lost and nothing is doubled."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest

import flame
from flame.protocol import subjects
from flame.protocol.states import NodeState
from tests.support.cluster import eventually, processes_of
from tests.support.servers import ServedCluster, Server, Servers, cluster_of_three


class Replicated:
    """Three servers with a cluster of one node on them, and what a test wants to know of the servers."""

    def __init__(self, cluster: ServedCluster) -> None:
        self.cluster = cluster
        self.servers = cluster.servers.servers

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        client = await nats.connect(self.cluster.broker.endpoint.split(","))
        try:
            yield client.jetstream()
        finally:
            await client.close()

    async def leader_of(self, stream: str) -> Server:
        async def led_by() -> str | None:
            async with self._client() as jetstream:
                name: str | None = (await jetstream.stream_info(stream)).cluster.leader
                return name

        return self.servers[await eventually(led_by, f"{stream} has a leader")]

    async def have_led(self, stream: str, server: Server) -> None:
        """Have a stream led by a certain server."""

        async def is_led() -> bool:
            if await self.leader_of(stream) is server:
                return True
            body = json.dumps({"placement": {"preferred": server.name}}).encode()
            async with self._client() as jetstream:
                await jetstream._nc.request(f"$JS.API.STREAM.LEADER.STEPDOWN.{stream}", body, timeout=5)
            return False

        await eventually(is_led, f"{server.name} leads {stream}")

    async def is_whole(self) -> bool:
        """Whether every server has a current copy of every stream."""
        with contextlib.suppress(nats.errors.Error):
            async with self._client() as jetstream:
                groups = [stream.cluster for stream in await jetstream.streams_info()]
                return all(g.leader and len(g.replicas) == 2 and all(r.current for r in g.replicas) for g in groups)
        return False

    async def restart(self, server: Server) -> None:
        server.run()
        await server.ready()
        await eventually(self.is_whole, "every stream has three copies")

    async def client_at(self, port: int) -> flame.Connection:
        """Return a client that is connected to one certain server, and knows all."""
        while True:
            connection = await flame.connect(self.cluster.broker.endpoint)
            if connected_to(connection) == port:
                return connection
            await connection.close()


def connected_to(connection: flame.Connection) -> int:
    port: int = connection.broker._nc.connected_url.port  # type: ignore[attr-defined]
    return port


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicated]:
    folder = tmp_path_factory.mktemp("three")
    cluster = ServedCluster(folder, Servers(cluster_of_three(folder)), replicas=3)
    try:
        asyncio.run(cluster.start())
        yield Replicated(cluster)
    finally:
        asyncio.run(cluster.stop())
    assert processes_of(cluster.broker.endpoint) == []


class Load:
    """Tasks of several sessions, each with an input of its own, and what came of them."""

    def __init__(self, folder: Path, sessions: list[flame.Session], each: int) -> None:
        self._folder = folder
        self._sessions = sessions
        self._each = each
        self.finished = 0
        self._invoked: list[asyncio.Task[None]] = []

    def begin(self, first: int, last: int) -> None:
        """Invoke the tasks of these numbers in every session."""
        for number in range(first, last):
            self._invoked += [asyncio.create_task(self._invoke(session, number)) for session in self._sessions]

    async def _invoke(self, session: flame.Session, number: int) -> None:
        task = await session.invoke(str(number))
        assert task.output == str(number * number).encode()
        self.finished += 1

    async def end(self, limit_s: float) -> None:
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*self._invoked)

    def runs(self, session: flame.Session) -> Counter[int]:
        return Counter(int(line) for line in (self._folder / session.id).read_text().split())


class Users:
    """Clients that make sessions, run a task in each and close them, one after the other."""

    def __init__(self, cluster: ServedCluster, number: int) -> None:
        self._cluster = cluster
        self._stopping = False
        self._users = [asyncio.create_task(self._use()) for _ in range(number)]
        self.sessions: list[str] = []

    async def _use(self) -> None:
        async with self._cluster.connect() as connection:
            while not self._stopping:
                async with await connection.create_session("flmping") as session:
                    assert (await session.invoke(b"x")).output == b"x"
                self.sessions.append(session.id)

    async def end(self, limit_s: float) -> None:
        """Let each finish what it is doing."""
        self._stopping = True
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*self._users)


LIMIT_S = 60.0
"""For what goes on while a server dies; it takes about 12 s."""


@pytest.mark.parametrize("killed", ["the server that leads everything", "the server that the client is connected to"])
async def test_a_killed_server_loses_and_doubles_nothing(replicated: Replicated, killed: str, tmp_path: Path) -> None:
    leads = "leads" in killed
    application = "tally-1" if leads else "tally-2"
    each = 1000
    async with replicated.cluster.connect() as first:
        await first.register_application(application, replicated.cluster.service("tally", max_instances=2))
    streams = (subjects.result_stream(application), "KV_flame-sessions", "KV_flame-bindings", "KV_flame-nodes")
    leader = await replicated.leader_of(subjects.task_stream(application))
    other = next(server for server in replicated.servers.values() if server is not leader)
    victim = leader if leads else other
    for stream in streams if leads else ():
        await replicated.have_led(stream, victim)

    async with await replicated.client_at(other.port) as connection:
        users = Users(replicated.cluster, 2)
        sessions = []
        for name in ("a", "b"):
            id_ = f"{application}-{name}"
            sessions.append(await connection.create_session(application, str(tmp_path / id_).encode(), session_id=id_))
        load = Load(tmp_path, sessions, each)
        load.begin(0, each // 2)
        await eventually(lambda: load.finished >= 100 and users.sessions, "the load runs")
        victim.kill()
        try:
            load.begin(each // 2, each)  # in the middle of it
            await load.end(LIMIT_S)
            await users.end(LIMIT_S)

            assert load.finished == each * len(sessions)
            assert connected_to(connection) != victim.port
            for session in sessions:
                assert set(load.runs(session)) == set(range(each))  # more than once only where a fault asks for it
                await session.close(timeout_s=30)
                counts = await connection.get_session(session.id)
                assert (counts.succeeded, counts.failed, counts.cancelled, counts.pending) == (each, 0, 0, 0)
            assert await stored_in(connection, subjects.result_stream(application)) == each * len(sessions)
            assert await stored_in(connection, subjects.task_stream(application)) == 0
            assert len(users.sessions) == len(set(users.sessions))
            assert [node.state for node in await connection.list_nodes()] == [NodeState.READY]
        finally:
            await replicated.restart(victim)


async def stored_in(connection: flame.Connection, stream: str) -> int:
    return (await connection.broker.stream_state(stream)).messages
