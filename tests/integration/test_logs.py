"""Reading what services wrote, while they run and afterwards."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

import flame
from tests.support.cluster import Cluster, eventually, executors_of


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def read(connection: flame.Connection, **options: Any) -> list[flame.LogLine]:
    async with asyncio.timeout(30):
        return [line async for line in connection.read_logs(**options)]


async def texts(connection: flame.Connection, **options: Any) -> list[str]:
    return [line.text for line in await read(connection, **options) if line.stream == "stdout"]


async def said(connection: flame.Connection, session: flame.Session, count: int) -> list[flame.LogLine]:
    """What a session's services wrote, once there is that much."""

    async def enough() -> list[flame.LogLine] | None:
        lines = await read(connection, session=session.id)
        return lines if len(lines) >= count else None

    lines: list[flame.LogLine] = await eventually(enough, f"{count} lines are there")
    return lines


async def test_lines_say_who_wrote_them_where(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        task = await session.invoke(call("print", "one\ntwo grüße"))
        lines = await said(connection, session, 4)
    assert {(line.application, line.session, line.executor) for line in lines} == {(lab, session.id, task.executor)}
    for stream in ("stdout", "stderr"):
        assert [line.text for line in lines if line.stream == stream] == ["one", "two grüße"]
    assert all(task.started - 60 < line.at < task.finished + 60 for line in lines)


async def test_they_are_there_when_session_and_executor_have_ended(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab) as session:
        task = await session.invoke(call("print", "last words"))
    await said(connection, session, 2)

    async def forgotten() -> bool:
        return not await executors_of(connection, session.id)

    await eventually(forgotten, "the executor is gone")
    assert await texts(connection, session=session.id) == ["last words"]
    assert await texts(connection, executor=task.executor) == ["last words"]
    assert await texts(connection, session=session.id, executor=task.executor, follow=True) == ["last words"]
    assert await texts(connection, session=session.id, executor="another") == []


async def test_the_last_lines_are_those_that_were_written_last(connection: flame.Connection, lab: str) -> None:
    async with await connection.create_session(lab, max_instances=1) as session:
        for number in range(5):
            await session.invoke(call("print", f"{number}a\n{number}b"))
            await said(connection, session, 4 * (number + 1))
        assert len(await read(connection, session=session.id, tail=3)) == 3
        everything = await read(connection, session=session.id)
        assert await read(connection, session=session.id, tail=7) == everything[-7:]
        assert await read(connection, session=session.id, tail=1000) == everything
        assert await read(connection, session=session.id, tail=0) == []


async def test_following_tells_what_comes_and_ends_with_the_session(connection: flame.Connection, lab: str) -> None:
    session = await connection.create_session(lab)
    await session.invoke(call("print", "before"))
    await said(connection, session, 2)
    heard = asyncio.create_task(texts(connection, session=session.id, follow=True))
    late = asyncio.create_task(texts(connection, session=session.id, follow=True, tail=0))
    await asyncio.sleep(0.3)
    await session.invoke(call("print", "after"))
    await session.close()
    assert await heard == ["before", "after"]
    assert await late == ["after"]


async def test_following_survives_a_lost_connection_and_can_be_left(
    cluster: Cluster, connection: flame.Connection, lab: str
) -> None:
    session = await connection.create_session(lab)
    found = []
    async with asyncio.timeout(40), aclosing(connection.read_logs(session=session.id, follow=True)) as lines:
        await session.invoke(call("print", "1"))
        async for line in lines:
            if line.stream == "stderr":
                continue
            found.append(line.text)
            if line.text == "1":
                await cluster.broker.stop()
                await cluster.broker.start()
                await session.invoke(call("print", "2"))
            else:
                break
    assert found == ["1", "2"]
    await session.close()


async def test_much_output_comes_whole_and_in_order(cluster: Cluster, connection: flame.Connection) -> None:
    await connection.register_application("wordy", cluster.service("lab"))
    wanted = [f"{number} {'x' * 80}" for number in range(20_000)]
    async with await connection.create_session("wordy") as session:
        half = len(wanted) // 8
        for begin in range(0, len(wanted), half):
            await session.invoke(call("print", "\n".join(wanted[begin : begin + half])))
    assert await texts(connection, session=session.id, follow=True) == wanted
    await connection.unregister_application("wordy", force=True)
    with pytest.raises(flame.ApplicationNotFound, match="wordy"):
        await read(connection, session=session.id)


async def test_what_there_is_not_is_told(connection: flame.Connection) -> None:
    with pytest.raises(flame.SessionNotFound, match="nope"):
        await read(connection, session="nope")
    with pytest.raises(flame.ExecutorNotFound, match="nope"):
        await read(connection, executor="nope")
    with pytest.raises(flame.InvalidArgument, match="a session, an executor or both"):
        await read(connection)
    with pytest.raises(flame.InvalidArgument, match="tail -1"):
        await read(connection, session="any", tail=-1)
