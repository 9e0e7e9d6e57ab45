"""Large inputs, outputs and common data on real processes: kills and restarts in the middle, and what is left."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import nats
import pytest

import flame
import flame.sync
from flame.protocol import defaults, subjects
from flame.protocol.messages import ResultRecord, TaskMessage
from flame.protocol.states import TaskState
from flame.protocol.values import ValueRef
from tests.integration.test_cli import call
from tests.services.bulk import made
from tests.support.cluster import Cluster, eventually, kill, started_executors
from tests.support.proxy import Proxy

MIB = 1024 * 1024
APP = "bulk"
BIG = 24 * MIB
"""Of 24 parts: three times as many as are under way at once."""
ROOM = "cpu=0.1,mem=1g"


@pytest.fixture
async def session(cluster: Cluster, connection: flame.Connection) -> AsyncIterator[flame.Session]:
    if APP not in {application.name for application in await connection.list_applications()}:
        await connection.register_application(APP, cluster.service(APP, delay_release_s=30))
    async with await connection.create_session(APP, max_instances=1, resources=ROOM) as session:
        yield session


def digest_input(size: int) -> bytes:
    return b"digest " + made(size - 7)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


async def parts(connection: flame.Connection, session: flame.Session, side: str) -> list[str]:
    pattern = subjects.session_blobs(APP, session.id, side)
    return sorted(await connection.broker.subjects(subjects.blob_stream(APP), pattern))


async def ttl_of(cluster: Cluster, subject: str) -> str:
    """The time to live that a part was given, as the broker has it."""
    client = await nats.connect(cluster.broker.endpoint)
    try:
        found = await client.jetstream().get_last_msg(subjects.blob_stream(APP), subject)
        return str((found.headers or {}).get("Nats-TTL", ""))
    finally:
        await client.close()


class At:
    """Does something when a method was called some times, and goes on with the call."""

    def __init__(self, times: int, act: Callable[[], Any]) -> None:
        self._left = times
        self._act = act
        self.acting: asyncio.Future[Any] | None = None

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        async def called(*arguments: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self.acting = asyncio.ensure_future(self._act())
            return await method(*arguments, **named)

        return called

    async def acted(self) -> None:
        assert self.acting is not None
        await self.acting


# ---- in and out


async def test_in_and_out_and_what_stays(
    cluster: Cluster, connection: flame.Connection, session: flame.Session
) -> None:
    given = digest_input(BIG)
    assert (await session.invoke(given)).output == digest(given)
    task = await session.invoke(f"make {BIG}")
    assert (task.output, task.output_size) == (made(BIG), BIG)
    inside, outside = [await parts(connection, session, side) for side in (subjects.IN, subjects.OUT)]
    assert (len(inside), len(outside)) == (24, 24)
    assert await ttl_of(cluster, inside[0]) == ""
    assert await ttl_of(cluster, outside[0]) == f"{defaults.VALUE_AGE_S:.0f}s"
    await session.close()
    assert await parts(connection, session, subjects.IN) == []
    assert await parts(connection, session, subjects.OUT) == outside
    assert (await session.get_task(task.id)).output == made(BIG)


async def test_common_data_and_its_change(connection: flame.Connection, session: flame.Session) -> None:
    one, two = made(BIG), made(5 * MIB)
    async with await connection.create_session(APP, one, resources=ROOM, min_instances=2, max_instances=2) as mine:
        assert (await mine.invoke(b"common")).output == digest(one)
        await mine.update_common_data(two)
        answers = await asyncio.gather(*(mine.invoke(b"common") for _ in range(10)))
        assert {task.output for task in answers} == {digest(two)}
        assert len(await parts(connection, mine, subjects.IN)) == 5
        killed = await started_executors(connection, mine.id)
        for executor in killed:
            kill(executor.pid)

        async def others_serve() -> bool:
            serving = {found.id for found in await started_executors(connection, mine.id) if found.entered}
            return len(serving - {executor.id for executor in killed}) == 2

        await eventually(others_serve, "other executors serve the session")
        assert (await mine.invoke(b"common")).output == digest(two)
    assert await parts(connection, mine, subjects.IN) == []


def test_without_async_and_in_a_terminal(cluster: Cluster, lab_of_bulk: str) -> None:
    with (
        flame.sync.connect(cluster.broker.endpoint) as connection,
        connection.create_session(lab_of_bulk, resources=ROOM) as session,
    ):
        given = digest_input(BIG)
        [one, two] = session.map([given, f"make {BIG}".encode()])
        assert (one.output, two.output) == (digest(given), made(BIG))
        endpoint = cluster.broker.endpoint
        echoed = call("invoke", lab_of_bulk, "-", "-s", session.id, text=b"back " + made(MIB), endpoint=endpoint)
        assert (echoed.returncode, echoed.output) == (0, b"back " + made(MIB))
        listed = call("view", "-s", session.id, "-t", endpoint=endpoint)
        assert f"({BIG} bytes)" in listed.stdout
        viewed = json.loads(call("view", "-s", session.id, "-t", two.id, "-o", "json", endpoint=endpoint).stdout)
        assert viewed["output_size"] == BIG
        assert base64.b64decode(viewed["output_base64"]) == made(BIG)


@pytest.fixture
def lab_of_bulk(session: flame.Session) -> str:
    return session.application


# ---- in the middle


async def test_an_executor_that_is_killed_while_it_stores_its_output(
    connection: flame.Connection, session: flame.Session, tmp_path: Path
) -> None:
    task = await session.invoke(f"die {BIG} {tmp_path / 'died'}", timeout_s=60)
    assert (task.output, task.attempt) == (made(BIG), 2)
    ids = {subjects.stored_value(subject)[1] for subject in await parts(connection, session, subjects.OUT)}
    record = (await session._tasks.look_up([task.id])).results[task.id]
    ref = ResultRecord.decode(record).output_ref
    assert ref is not None
    assert ref.id in ids  # what the first run left is another value, and ages out


async def test_a_broker_that_is_restarted_in_the_middle(
    cluster: Cluster, connection: flame.Connection, session: flame.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def restart() -> None:
        cluster.broker.kill()
        await cluster.broker.start()

    await session.invoke(b"back warm")
    given = digest_input(BIG)
    upload, download = At(10, restart), At(10, restart)
    monkeypatch.setattr(connection.broker, "begin_store", upload.around(connection.broker.begin_store))
    assert (await session.invoke(given, timeout_s=90)).output == digest(given)
    await upload.acted()
    monkeypatch.setattr(connection.broker, "peek", download.around(connection.broker.peek))
    assert (await session.invoke(f"make {BIG}", timeout_s=90)).output == made(BIG)
    await download.acted()


async def test_an_executor_whose_broker_is_restarted(
    cluster: Cluster, connection: flame.Connection, session: flame.Session
) -> None:
    handle = await session.create_task(f"make {4 * BIG}")

    async def some_are_stored() -> bool:
        return len(await parts(connection, session, subjects.OUT)) > 2

    await eventually(some_are_stored, "a part of the output is stored")
    cluster.broker.kill()
    await cluster.broker.start()
    async with asyncio.timeout(90):
        assert (await handle).output == made(4 * BIG)


async def test_a_client_that_reconnects_in_the_middle(
    cluster: Cluster, session: flame.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy("127.0.0.1", cluster.broker.port)
    await proxy.open()

    async def cut() -> None:
        await proxy.cut()
        await asyncio.sleep(0.2)
        await proxy.open()

    try:
        async with await flame.connect(proxy.endpoint) as client:
            mine = await client.open_session(session.id)
            given = digest_input(BIG)
            upload, download = At(5, cut), At(5, cut)
            monkeypatch.setattr(client.broker, "begin_store", upload.around(client.broker.begin_store))
            assert (await mine.invoke(given, timeout_s=90)).output == digest(given)
            await upload.acted()
            monkeypatch.setattr(client.broker, "peek", download.around(client.broker.peek))
            assert (await mine.invoke(f"make {BIG}", timeout_s=90)).output == made(BIG)
            await download.acted()
    finally:
        await proxy.cut()


# ---- whose it is


async def test_a_value_of_another_session_can_not_be_named(
    connection: flame.Connection, session: flame.Session
) -> None:
    await session.invoke(digest_input(MIB))
    [part] = await parts(connection, session, subjects.IN)
    task = await session.invoke(f"make {MIB}")
    async with await connection.create_session(APP, resources=ROOM) as other:
        ref = ValueRef(id=subjects.stored_value(part)[1], size=MIB, parts=1)
        await connection.broker.store(subjects.task(APP, other.id, "stolen"), TaskMessage(input_ref=ref).encode(), 5)

        async def ended() -> flame.Task | None:
            found = await other.get_task("stolen")
            return found if found.state.terminal else None

        stolen = await eventually(ended, "the task has its record")
        assert stolen.state is TaskState.FAILED
        assert stolen.error.code == "value_gone"
        with pytest.raises(flame.TaskNotFound):
            await other.get_task(task.id)


# ---- the example

EXAMPLE = Path(__file__).parents[2] / "examples" / "large_values.py"


async def test_the_example(cluster: Cluster) -> None:
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLE),
        env={**os.environ, "FLAME_ENDPOINT": cluster.broker.endpoint},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await client.communicate()
    assert said.decode().splitlines() == [
        "sending 6 MB",
        "it came back as it was: True",
        "in a list: 0 of 5827030 bytes",
        "looked up: True",
        "packed in the cluster: True",
    ]
