"""Everything that a client and a service of the SDK do needs no more permissions than docs/protocol.md lists."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import pytest

import flame
from tests.support.cluster import PATIENCE_S, eventually, kill, lasting, started_executors
from tests.support.guarded import GuardedCluster, guarded_cluster, violations

APPLICATION = "guarded"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[GuardedCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with lasting(guarded_cluster(folder, APPLICATION, APPLICATION), request.session) as made:
        yield made


@pytest.fixture
async def client(cluster: GuardedCluster, connection: flame.Connection) -> AsyncIterator[flame.Connection]:
    """A client that may do what is documented; afterwards nobody has tried to do anything else."""
    if APPLICATION not in {application.name for application in await connection.list_applications()}:
        spec = cluster.service(
            "guarded",
            environments={"GUARDED_ENDPOINT": cluster.endpoint_of("executor")},
            max_attempts=2,
            retry_backoff_s=0,
        )
        await connection.register_application(APPLICATION, spec)
    async with await flame.connect(cluster.endpoint_of("client")) as client:
        yield client
    assert violations(cluster) == []


@pytest.fixture
async def session(client: flame.Connection) -> AsyncIterator[flame.Session]:
    async with await client.create_session(APPLICATION, b"one", credentials={"key": "secret"}) as session:
        yield session


def call(verb: str, *arguments: str) -> str:
    return json.dumps([verb, *arguments])


class Informer(flame.TaskInformer):
    def __init__(self) -> None:
        self.told: list[float | None] = []

    def on_progress(self, task: flame.Task, progress: flame.Progress) -> None:
        self.told.append(progress.done)


async def test_streams_and_progress(session: flame.Session) -> None:
    chunks = ["a", "b", "c"]
    async with session.stream(call("emit", *chunks)) as stream:
        assert [chunk.text async for chunk in stream] == chunks
        assert stream.task.output == b"emitted"
    assert [chunk.text async for chunk in session.open_stream(stream.task.id)] == chunks
    informer = Informer()
    handle = await session.create_task(call("emit", *chunks), informer)
    assert [chunk.text async for chunk in handle.stream()] == chunks
    await handle
    assert informer.told[-1] == 3


async def test_progress_in_a_watch_and_in_events(client: flame.Connection, session: flame.Session) -> None:
    async with asyncio.timeout(PATIENCE_S), client.events(session=session.id, tasks=True) as events:
        task = await session.create_task(call("emit", "x"), Informer())
        async for event in session.watch():
            if event.progress is not None and event.progress.done == 1:
                break
        async for told in events:
            if (told.id, told.event) == (task.id, "succeed"):
                break


async def test_state(session: flame.Session, connection: flame.Connection) -> None:
    assert json.loads((await session.invoke(call("remember", "k", "v"))).output) == [None, "v", ["k"]]
    for executor in await started_executors(connection, session.id):
        kill(executor.pid)
    assert json.loads((await session.invoke(call("remember", "k", "w"))).output) == ["v", "w", ["k"]]


async def test_common_data_keys_and_many_tasks(session: flame.Session) -> None:
    assert (await session.invoke(call("common_data"))).output == b"one"
    assert await session.update_common_data(b"two") == 1
    assert [task.output async for task in session.map([call("common_data")] * 3)] == [b"two"] * 3
    [handle] = await session.create_tasks([call("again")], keys=["k"])
    assert (await handle).output == b"attempt 2"
    assert (await session.get_task(handle.id)).attempt == 2
    assert (await session.create_task(call("again"), key="k")).id == handle.id
    assert len(await session.list_tasks()) == 5


async def test_large_values(session: flame.Session) -> None:
    assert await session.update_common_data(bytes(400_000)) == 1
    assert (await session.invoke(call("common_data"))).output == bytes(400_000)


async def test_stopping(session: flame.Session, client: flame.Connection) -> None:
    handle = await session.create_task(call("sleep"), Informer())
    await eventually(lambda: handle.task.state is flame.TaskState.RUNNING, "the task runs")
    assert await handle.cancel() is flame.TaskState.CANCELLED
    with pytest.raises(flame.TaskTimeout):
        await session.invoke(call("sleep"), options=flame.TaskOptions(timeout_s=0.2))
    await session.create_task(call("sleep"))
    await session.close("force")
    assert (await client.get_session(session.id)).session.state is flame.SessionState.CLOSED
