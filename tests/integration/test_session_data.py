"""Common data that changes, the state of a session, secrets and keys, on real processes: kills, restarts, and leaks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

import flame
from flame.broker.jetstream import connect
from flame.protocol import subjects, topology
from flame.protocol.supervision import LogChunk
from tests.support.cluster import Cluster, eventually, executors_of, kill, started_executors

SESSION_SECRETS = {"credential": "c0nf1dent1al-session-credential", "delegation": "c0nf1dent1al-session-delegation"}
TASK_SECRETS = {"credential": "c0nf1dent1al-task-credential", "delegation": "c0nf1dent1al-task-delegation"}
NEEDLE = b"c0nf1dent1al"


@pytest.fixture
async def keeper(cluster: Cluster, connection: flame.Connection) -> str:
    name = "keeper"
    if name not in {application.name for application in await connection.list_applications()}:
        await connection.register_application(name, cluster.service(name, delay_release_s=30))
    return name


def ask(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def answer(session: flame.Session, verb: str, *arguments: Any, **named: Any) -> Any:
    return json.loads((await session.invoke(ask(verb, *arguments), timeout_s=60, **named)).output)


# ---- common data


async def test_every_executor_has_the_common_data_of_a_task_or_newer(connection: flame.Connection, keeper: str) -> None:
    async with await connection.create_session(keeper, b"0", min_instances=3, max_instances=3) as session:
        seen: set[int] = set()
        for version in range(1, 11):
            assert await session.update_common_data(str(version).encode()) == version
            for each in await asyncio.gather(*(answer(session, "common") for _ in range(12))):
                assert each[:2] == [version, str(version)]
                seen.add(each[3])
        assert len(seen) > 1


async def test_executors_that_are_idle_blocked_new_or_killed(connection: flame.Connection, keeper: str) -> None:
    async with await connection.create_session(keeper, b"0", min_instances=2, max_instances=2) as session:
        await asyncio.gather(*(answer(session, "sleep", 0.2) for _ in range(2)))
        blocked = await session.create_task(ask("block", 1.5))
        await asyncio.sleep(0.2)
        await session.update_common_data(b"1")
        assert (await answer(session, "common"))[:3] == [1, "1", ["1"]]
        assert json.loads((await blocked).output)[:3] == [0, "0", []]
        for executor in await started_executors(connection, session.id):
            kill(executor.pid)
        await session.update_common_data(b"x" * 200_000)
        fresh = await answer(session, "common")
        assert (fresh[0], len(fresh[1])) == (2, 200_000)


async def test_common_data_after_everything_was_restarted(
    cluster: Cluster, connection: flame.Connection, keeper: str
) -> None:
    session = await connection.create_session(keeper, b"0", max_instances=1)
    await answer(session, "common")
    manager, scheduler = cluster.managers["node1"], cluster.scheduler
    assert scheduler is not None
    for program in (manager, scheduler):
        program.send_signal(signal.SIGKILL)
        program.wait()
    cluster.start_scheduler()
    cluster.start_manager("node1")
    assert await session.update_common_data(b"1") == 1
    assert (await answer(session, "common"))[:2] == [1, "1"]
    await session.close()


# ---- state


async def test_state_survives_killed_executors_and_is_its_sessions(connection: flame.Connection, keeper: str) -> None:
    session = await connection.create_session(keeper, max_instances=1)
    other = await connection.create_session(keeper, max_instances=1)
    await answer(session, "put", "user:1", {"seen": [1, 2]})
    await answer(session, "put_bytes", "large", 200_000)
    [executor] = await started_executors(connection, session.id)
    kill(executor.pid)
    assert await answer(session, "get", "user:1") == {"seen": [1, 2]}
    assert len(await answer(session, "get", "large")) == 200_000
    assert await answer(session, "in_thread") == [[1, None, "ü"], ["from a thread", "large", "user:1"]]
    assert await answer(other, "keys") == []
    assert sorted(await asyncio.gather(*(answer(session, "add", "n") for _ in range(20)))) == list(range(1, 21))
    bucket = connection.broker.bucket(subjects.STATE)
    assert len(await bucket.entries(f"{session.id}.>")) == 4
    await session.close()
    assert await bucket.entries(f"{session.id}.>") == []
    await other.close()


async def test_state_waits_for_a_manager_that_is_restarted(
    cluster: Cluster, connection: flame.Connection, keeper: str
) -> None:
    session = await connection.create_session(keeper, max_instances=1)
    await answer(session, "put", "k", 1)
    manager = cluster.managers["node1"]
    manager.send_signal(signal.SIGKILL)
    manager.wait()
    writing = await session.create_task(ask("add", "k"))
    await asyncio.sleep(0.5)
    cluster.start_manager("node1")
    assert (await asyncio.wait_for(writing.finished(), 60)).output in (b"2", b"3")  # run twice if it was not adopted
    await session.close()


# ---- keys


async def test_a_key_is_one_task_whoever_dies(cluster: Cluster, connection: flame.Connection, keeper: str) -> None:
    async with await connection.create_session(keeper, max_instances=2) as session, cluster.connect() as other:
        same = await other.open_session(session.id)
        first = await session.create_task(ask("wait", 1.0), key="order-17")
        again = await same.create_task(ask("wait", 1.0), key="order-17")
        assert first.id == again.id
        with pytest.raises(flame.KeyReused, match="order-17"):
            await same.create_task(ask("wait", 2.0), key="order-17")
        await eventually(lambda: executors_of(connection, session.id), "there is an executor")
        await asyncio.sleep(0.3)
        for executor in await executors_of(connection, session.id):
            if executor.pid:
                kill(executor.pid)
        one, two = await asyncio.gather(first, again)
        assert one.output == two.output
        assert one.attempt > 1
        assert (await same.invoke(ask("wait", 1.0), key="order-17")).output == one.output
        with pytest.raises(flame.KeyReused, match="order-17"):
            await session.create_task(ask("wait", 3.0), key="order-17")


async def test_a_key_over_a_restart_of_the_broker(cluster: Cluster, connection: flame.Connection, keeper: str) -> None:
    async with await connection.create_session(keeper, max_instances=1) as session:
        assert await answer(session, "add", "n", key="once") == 1
        scheduler = cluster.scheduler
        assert scheduler is not None
        scheduler.send_signal(signal.SIGKILL)
        scheduler.wait()
        creating = asyncio.create_task(answer(session, "add", "n", key="once"))
        await asyncio.sleep(0.3)
        cluster.start_scheduler()
        assert await creating == 1


# ---- secrets


async def everything_stored(connection: flame.Connection, applications: list[str], without: set[str]) -> list[bytes]:
    """Return what a cluster stores of applications that have nothing to do: their tasks are gone."""
    names = []
    for application in applications:
        waiting, *others = sorted(
            (spec.name for spec in topology.application_streams(application)),
            key=lambda name: name != subjects.task_stream(application),
        )
        await eventually(partial(is_empty, connection, waiting), f"{waiting} is empty")
        names += others
    names += [f"KV_{spec.name}" for spec in topology.buckets() if spec.name not in without]
    found = []
    for name in names:
        found += [m.subject.encode() + m.data async for m in connection.broker.read(name, ">")]
    return found


async def is_empty(connection: flame.Connection, stream: str) -> bool:
    return (await connection.broker.stream_state(stream)).messages == 0


async def without_credentials(connection: flame.Connection, application: str) -> bool:
    return not await connection.broker.bucket(subjects.CREDENTIALS).entries(f"{application}.*")


def files_with_needle(*folders: Path) -> list[str]:
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                if path.is_file() and not path.is_symlink() and NEEDLE in path.read_bytes():
                    found.append(str(path))
            except OSError:
                continue
    return found


async def test_secrets_are_with_their_executor_and_nowhere_else(
    cluster: Cluster, connection: flame.Connection, keeper: str
) -> None:
    listener = await connect(cluster.broker.endpoint, name="listener")
    heard: list[bytes] = []
    for subject in ("flame.session.>", "flame.event.>", "flame.node.>", "flame.control.>", "flame.application.>"):
        await listener.subscribe(subject, lambda message: heard.append(message.data))
    session = await connection.create_session(
        keeper,
        credentials={"a": SESSION_SECRETS["credential"]},
        delegations={"b": SESSION_SECRETS["delegation"]},
    )
    options = flame.TaskOptions(
        credentials={"c": TASK_SECRETS["credential"]}, delegations={"d": TASK_SECRETS["delegation"]}
    )
    lengths = [{"a": 31}, {"b": 31}, {"c": 28}, {"d": 28}]
    assert await answer(session, "secrets", options=options) == lengths
    with pytest.raises(flame.TaskFailed) as caught:
        await session.invoke(ask("leak"), options=options)
    assert "***" in str(caught.value)
    assert NEEDLE.decode() not in f"{caught.value} {caught.value.task}"
    await session.invoke(ask("print"))
    [executor] = await started_executors(connection, session.id)
    kill(executor.pid)
    assert await answer(session, "secrets", options=options) == lengths

    # While the session is open and its executor lives.
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            assert NEEDLE.decode() not in " ".join(process.cmdline())
            assert NEEDLE.decode() not in str(process.environ())
        except psutil.Error:
            continue
    assert NEEDLE.decode() not in str([await connection.get_session(session.id), await connection.list_executors()])
    assert NEEDLE.decode() not in str(await connection.list_tasks(session.id))
    applications = [application.name for application in await connection.list_applications()]
    stored = await everything_stored(connection, applications, {subjects.CREDENTIALS})
    assert not [message[:80] for message in stored if NEEDLE in message]
    assert not await without_credentials(connection, keeper)
    shown = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "flame_cli.main", "view", "-s", session.id, "-o", "json",
        env={**os.environ, "FLAME_ENDPOINT": cluster.broker.endpoint},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await shown.communicate()
    assert session.id.encode() in output
    assert NEEDLE not in output

    await session.close()
    assert await without_credentials(connection, keeper)
    logs = [log async for log in connection.broker.read(subjects.log_stream(keeper), ">")]
    assert any(b"printed ***" in LogChunk.decode(log.data).data for log in logs)
    assert not [log for log in logs if NEEDLE in log.data]
    assert not [data for data in heard if NEEDLE in data]
    folders = [cluster.folder / name for name in cluster.node_names]
    left = files_with_needle(*folders, Path("/dev/shm"))
    assert left == []
    assert NEEDLE.decode() not in "".join(path.read_text(errors="replace") for path in cluster.folder.glob("*.log"))
    await listener.close()


async def test_a_failing_enter_shows_no_secret(cluster: Cluster, connection: flame.Connection) -> None:
    await connection.register_application("refusing", cluster.service("keeper", session_retry_limit=2))
    session = await connection.create_session("refusing", credentials={"enter": SESSION_SECRETS["credential"]})
    with pytest.raises((flame.TaskFailed, flame.SessionFailed), match=r"refused with \*\*\*"):
        await session.invoke(b"x", timeout_s=60)

    async def logged() -> bool:
        logs = [log async for log in connection.broker.read(subjects.log_stream("refusing"), ">")]
        assert not [log for log in logs if NEEDLE in log.data]
        return any(b"on_session_enter failed" in log.data for log in logs)

    await eventually(logged, "the executor's log was captured")
    await eventually(lambda: without_credentials(connection, "refusing"), "its credentials are gone")
    stored = await everything_stored(connection, ["refusing"], {subjects.CREDENTIALS})
    assert not [message[:80] for message in stored if NEEDLE in message]
    assert NEEDLE.decode() not in "".join(path.read_text(errors="replace") for path in cluster.folder.glob("*.log"))


# ---- the example

SHOP = Path(__file__).parents[2] / "examples" / "session_data"


async def test_the_example(cluster: Cluster, connection: flame.Connection) -> None:
    command = {"command": sys.executable, "arguments": [str(SHOP / "service.py")]}
    await connection.register_application("shop", command)
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SHOP / "client.py"),
        env={**os.environ, "FLAME_ENDPOINT": cluster.broker.endpoint},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await client.communicate()
    assert said.decode().splitlines() == [
        "tea for 2, number 1",
        "cake for 5, number 2",
        "cake for 5, number 2 (the same order)",
        "order-17 was for something else",
        "tea for 3, number 3 (prices of version 1)",
        "somebody has changed the prices before",
        "the till does not open with ***",
    ]
