"""What tasks emit while they run: it is heard in order and once, however connections, brokers and executors fare."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import flame
import flame.sync
from flame.protocol import defaults, subjects
from tests.support.cluster import PATIENCE_S, Cluster, eventually, kill, started_executors
from tests.support.proxy import Proxy
from tests.support.servers import Servers, served, single

EXAMPLE = Path(__file__).parents[2] / "examples" / "streaming"
ONCE = flame.TaskOptions(max_attempts=1)


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


@pytest.fixture
async def streamer(cluster: Cluster, connection: flame.Connection) -> str:
    return await registered(connection, cluster.service("streamer", max_attempts=3, max_instances=2), "streamer")


async def registered(connection: flame.Connection, spec: dict[str, Any], name: str) -> str:
    if name not in {application.name for application in await connection.list_applications()}:
        await connection.register_application(name, spec)
    return name


@pytest.fixture
async def session(connection: flame.Connection, streamer: str) -> AsyncIterator[flame.Session]:
    opened = await connection.create_session(streamer)
    yield opened
    await opened.close("force")


async def heard_until(error: type[flame.FlameError], stream: flame.ChunkStream, text: str | None = None) -> list[str]:
    """What comes before an error ends the stream."""
    found: list[str] = []

    async def listen() -> None:
        async for chunk in stream:
            found.append(chunk.text)  # noqa: PERF401  # what came before the error counts

    with pytest.raises(error, match=text):
        await asyncio.wait_for(listen(), PATIENCE_S)
    return found


async def texts(stream: flame.ChunkStream) -> list[str]:
    """Everything that comes, which must be of one run."""
    found: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        async for chunk in stream:
            assert (chunk.attempt, chunk.index) == (1, len(found))
            found.append(chunk.text)
    return found


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


class Endless:
    """Takes part in a stream, and tells its runs apart."""

    def __init__(self, stream: flame.ChunkStream) -> None:
        self.stream = stream
        self.runs: list[list[str]] = []
        self.attempts: list[int] = []

    async def listen(self) -> list[str]:
        async with asyncio.timeout(PATIENCE_S):
            async for chunk in self.stream:
                if chunk.index == 0:
                    self.runs.append([])
                    self.attempts.append(chunk.attempt)
                assert chunk.index == len(self.runs[-1])
                assert chunk.attempt == self.attempts[-1]
                self.runs[-1].append(chunk.text)
        return self.runs[-1]


# ---- in order, once, from the start


async def test_chunks_come_as_they_are_emitted_and_then_the_output(session: flame.Session) -> None:
    stream = session.stream(call("count", 20, 0.02))
    seen = [stream.task.state.terminal async for _ in stream]
    assert not seen[0], "the first came while the task ran"
    assert stream.task.output == b"counted 20"
    assert stream.task.chunks == 20
    assert [chunk async for chunk in stream] == [], "it has ended"


async def test_ten_thousand_chunks(session: flame.Session) -> None:
    assert await texts(session.stream(call("count", 10_000))) == numbers(10_000)


async def test_who_comes_late_or_again_hears_everything_from_the_start(
    cluster: Cluster, session: flame.Session
) -> None:
    stream = session.stream(call("count", 30, 0.01))
    async with asyncio.timeout(PATIENCE_S):
        async for chunk in stream:
            if chunk.index == 10:
                break
    late = texts(session.open_stream(stream.task.id))
    async with cluster.connect() as other:
        elsewhere = await other.open_session(session.id)
        heard = await asyncio.gather(late, texts(elsewhere.open_stream(stream.task.id)))
        assert list(heard) == [numbers(30)] * 2
        assert await texts(elsewhere.open_stream(stream.task.id)) == numbers(30), "the task has ended"
    assert [chunk.index async for chunk in stream] == list(range(11, 30)), "the one that was left goes on"


async def test_a_handle_streams_too_and_the_task_goes_on_without_listeners(session: flame.Session) -> None:
    handle = await session.create_task(call("count", 5, 0.05))
    async with handle.stream() as stream:
        assert (await anext(stream)).data == b"0"
    assert (await handle).chunks == 5
    assert await texts(handle.stream()) == numbers(5)


async def test_a_slow_listener_holds_up_neither_the_task_nor_others(session: flame.Session) -> None:
    count = 4 * defaults.CHUNK_WINDOW
    handle = await session.create_task(call("count", count, 0, 1000))
    slow = handle.stream()
    async with asyncio.timeout(PATIENCE_S):
        first = await anext(slow)
        assert (await handle).output == f"counted {count}".encode()
        assert [chunk.index async for chunk in handle.stream()] == list(range(count))
        assert [first.index, *[chunk.index async for chunk in slow]] == list(range(count))


async def test_a_wait_that_is_given_up_costs_no_chunk(session: flame.Session) -> None:
    found: list[str] = []
    given_up = 0
    async with asyncio.timeout(PATIENCE_S), session.stream(call("count", 5, 0.2)) as stream:
        while True:
            try:
                async with asyncio.timeout(0.03):
                    found.append((await anext(stream)).text)
            except TimeoutError:
                given_up += 1
            except StopAsyncIteration:
                break
        assert stream.task.output == b"counted 5"
    assert (found, given_up > 0) == (numbers(5), True)


async def test_a_stream_that_is_dropped_is_read_no_more(connection: flame.Connection, session: flame.Session) -> None:
    chunks = subjects.chunk_stream(session.application)

    async def readers() -> int:
        return len(await connection.broker.consumers(chunks))

    async for chunk in session.stream(call("count", 1000, 0.05)):
        assert chunk.text == "0"
        assert await readers() == 1
        break

    async def nobody_reads() -> bool:
        return await readers() == 0

    await eventually(nobody_reads, "the stream is read no more")


async def test_a_task_that_emits_nothing_streams_nothing(session: flame.Session) -> None:
    stream = session.stream(call("count", 0))
    assert await texts(stream) == []
    assert stream.task.output == b"counted 0"


# ---- how it ends


async def test_a_failed_task_ends_its_stream_with_its_error(session: flame.Session, tmp_path: Path) -> None:
    stream = session.stream(call("try", str(tmp_path / "runs"), [3, "raise"]), options=ONCE)
    assert await heard_until(flame.TaskFailed, stream, "not yet") == ["1.0", "1.1", "1.2"]


async def test_a_cancelled_task_ends_its_stream(session: flame.Session, tmp_path: Path) -> None:
    async with session.stream(call("try", str(tmp_path / "runs"), [3, "sleep"])) as stream:
        heard = [(await anext(stream)).text for _ in range(3)]
        assert await stream.cancel("enough") is flame.TaskState.CANCELLED
        with pytest.raises(flame.TaskCancelled, match="enough"):
            await anext(stream)
    assert heard == ["1.0", "1.1", "1.2"]
    assert await heard_until(flame.TaskCancelled, session.open_stream(stream.task.id), "enough") == heard


async def test_a_task_that_takes_too_long_ends_its_stream(session: flame.Session, tmp_path: Path) -> None:
    options = flame.TaskOptions(timeout_s=0.5, max_attempts=1)
    stream = session.stream(call("try", str(tmp_path / "runs"), [3, "sleep"]), options=options)
    assert await heard_until(flame.TaskTimeout, stream) == ["1.0", "1.1", "1.2"]


# ---- again


async def test_a_run_after_one_that_raised_begins_anew_and_says_so(session: flame.Session, tmp_path: Path) -> None:
    listener = Endless(session.stream(call("try", str(tmp_path / "runs"), [3, "raise"], [2, "return"])))
    assert await listener.listen() == ["2.0", "2.1"]
    assert listener.runs[0] == ["1.0", "1.1", "1.2"]
    assert listener.attempts == [1, 2]
    assert listener.stream.task.output == b"attempt 2"


async def test_a_run_that_emits_nothing_after_one_that_did_says_so(session: flame.Session, tmp_path: Path) -> None:
    listener = Endless(session.stream(call("try", str(tmp_path / "runs"), [3, "raise"], [0, "return"])))
    assert await listener.listen() == [""]
    assert listener.attempts == [1, 2]


async def test_what_an_executor_has_emitted_that_was_lost_is_begun_anew(session: flame.Session, tmp_path: Path) -> None:
    listener = Endless(session.stream(call("try", str(tmp_path / "runs"), [3, "exit"], [4, "return"])))
    assert await listener.listen() == ["2.0", "2.1", "2.2", "2.3"]
    assert listener.runs[0] == ["1.0", "1.1", "1.2"]
    late = Endless(session.open_stream(listener.stream.task.id))
    await late.listen()
    assert late.runs == listener.runs


async def test_an_executor_that_is_killed_in_the_middle_of_a_flood(
    connection: flame.Connection, session: flame.Session
) -> None:
    await session.invoke(call("count", 0))
    listener = Endless(session.stream(call("count", 3000, 0.001)))
    hearing = asyncio.create_task(listener.listen())
    await eventually(lambda: listener.runs and len(listener.runs[0]) > 200, "some was heard")

    async def running() -> list[int]:
        return [e.pid for e in await started_executors(connection, session.id) if e.running]

    (pid,) = await eventually(running, "it is known who runs it")
    kill(pid)
    assert await hearing == numbers(3000)
    assert listener.attempts == [1, 2]


# ---- connections and brokers


@asynccontextmanager
async def disturbed(proxy: Proxy, pause_s: float) -> AsyncIterator[None]:
    """Cut every connection again and again."""

    async def disturb() -> None:
        while True:
            await asyncio.sleep(pause_s)
            await proxy.cut()
            await proxy.open()

    disturbing = asyncio.create_task(disturb())
    try:
        yield
    finally:
        disturbing.cancel()
        await asyncio.wait((disturbing,))


async def test_a_listener_whose_connection_is_cut_misses_nothing(cluster: Cluster, session: flame.Session) -> None:
    proxy = Proxy("127.0.0.1", cluster.broker.port)
    await proxy.open()
    try:
        async with await flame.connect(proxy.endpoint) as connection:
            elsewhere = await connection.open_session(session.id)
            async with disturbed(proxy, 0.4):
                assert await texts(elsewhere.stream(call("count", 1500, 0.001))) == numbers(1500)
    finally:
        await proxy.cut()


async def test_an_executor_whose_broker_is_killed_emits_everything_once(tmp_path: Path) -> None:
    server = single(tmp_path / "server")
    async with served(tmp_path, Servers([server])) as cluster, cluster.connect() as connection:
        name = await registered(connection, cluster.service("streamer"), "streamer")
        session = await connection.create_session(name)
        listener = Endless(session.stream(call("count", 2000, 0.001)))
        hearing = asyncio.create_task(listener.listen())
        await eventually(lambda: listener.runs and len(listener.runs[0]) > 300, "some was heard")
        await asyncio.to_thread(server.kill)
        server.run()
        await server.ready()
        assert await hearing == numbers(2000)
        assert listener.attempts == [1]
        await session.close()


# ---- other ways to emit


@pytest.mark.parametrize("kind", ["generating", "generating_async"])
async def test_what_a_generator_yields_is_emitted(cluster: Cluster, connection: flame.Connection, kind: str) -> None:
    spec = cluster.service("streamer", environments={"KIND": kind})
    name = await registered(connection, spec, kind.replace("_", "-"))
    async with await connection.create_session(name) as session:
        stream = session.stream(json.dumps([600, "return"]))
        assert await texts(stream) == numbers(600)
        assert stream.task.output == (b"returned" if kind == "generating" else b"")
        failing = session.stream(json.dumps([3, "raise"]))
        assert await heard_until(flame.TaskFailed, failing, "half-way") == numbers(3)
        assert failing.task.error is not None
        assert "/flame/service/" not in failing.task.error.traceback
        slow = session.stream(json.dumps([10_000, "slow"]))
        async with slow:
            await anext(slow)
            await slow.cancel()
        assert (await session.invoke(json.dumps([0, "return"]), timeout_s=4)).chunks == 0, "it stopped at a yield"


async def test_threads_of_a_handler_emit_in_order(session: flame.Session) -> None:
    assert await texts(session.stream(call("thread", 2000))) == numbers(2000)


async def test_a_synchronous_client_streams(cluster: Cluster, session: flame.Session) -> None:
    def listen() -> None:
        with flame.sync.connect(cluster.broker.endpoint) as connection:
            mine = connection.open_session(session.id)
            with mine.stream(call("count", 20)) as stream:
                assert [chunk.text for chunk in stream] == numbers(20)
                assert stream.task.output == b"counted 20"
            assert [chunk.text for chunk in mine.open_stream(stream.task.id)] == numbers(20)
            handle = mine.create_task(call("count", 3))
            assert [chunk.text for chunk in handle.stream()] == numbers(3)

    await asyncio.to_thread(listen)


# ---- what is refused


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("number", "InvalidArgument: emit: expected bytes or str, got int"),
        ("large", "PayloadTooLarge: emit: a chunk of 262144 bytes: the limit is 262016"),
    ],
)
async def test_what_can_not_be_emitted_is_refused(session: flame.Session, what: str, text: str) -> None:
    with pytest.raises(flame.TaskFailed, match=text):
        await session.invoke(call("emit", what), options=ONCE)


async def test_the_largest_chunk_passes(session: flame.Session) -> None:
    [chunk] = [chunk async for chunk in session.stream(call("emit", "largest"))]
    assert len(chunk.data) == 262_016


async def test_nothing_is_emitted_after_the_end(session: flame.Session, tmp_path: Path) -> None:
    mark = tmp_path / "late"
    assert await texts(session.stream(call("late", str(mark)))) == []
    await eventually(mark.exists, "it has tried")
    assert "has ended" in mark.read_text()


async def test_a_task_that_is_not_known_has_no_stream(session: flame.Session) -> None:
    with pytest.raises(flame.TaskNotFound):
        await anext(session.open_stream("nothing"))
    with pytest.raises(flame.InvalidName):
        session.open_stream("a.b")
    with pytest.raises(flame.InvalidArgument, match="there is no task yet"):
        _ = session.stream(b"x").task


async def test_chunks_that_are_not_kept_any_more_are_missed(session: flame.Session) -> None:
    handle = await session.create_task(call("count", 300))
    await handle
    stream = subjects.chunk_stream(session.application)
    subject = subjects.chunk(session.application, session.id, handle.id)
    broker = session._connection.broker
    fifth = None
    async for message in broker.read(stream, subject):
        fifth = message.sequence if fifth is None else fifth
    assert fifth is not None
    await broker.purge(stream, subject, fifth)
    with pytest.raises(flame.ChunksGone, match="is not kept any more"):
        await texts(handle.stream())
    await broker.purge(stream, subject)
    with pytest.raises(flame.ChunksGone, match="some or all"):
        await texts(handle.stream())


# ---- progress


class Listening(flame.TaskInformer):
    def __init__(self) -> None:
        self.told: list[flame.Progress] = []

    def on_progress(self, task: flame.Task, progress: flame.Progress) -> None:
        self.told.append(progress)


async def test_progress_is_told_to_informers_and_watches_and_not_too_often(session: flame.Session) -> None:
    watch = session.watch()
    informer = Listening()
    task = await session.invoke(call("progress", 300, 0.002), informer)
    done = [progress.done for progress in informer.told]
    assert done[0] == 0
    assert done[-1] == 300
    assert done == sorted(done)
    run_s = task.finished - task.started
    assert 2 < len(done) < 3 + run_s / defaults.PROGRESS_INTERVAL_S
    assert informer.told[-1].message == "step 300"
    assert informer.told[-1].total == 300
    seen = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in watch:
            if event.progress is not None:
                assert (event.kind, event.task_id) == ("progress", task.id)
                seen.append(event.progress.done)
            if event.task_state is not None and event.task_state.terminal:
                break
    assert seen == done


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["much"], "progress: done: expected a number from 0, got 'much'"),
        ([-1], "progress: done"),
        ([1, "ten"], "progress: total: expected a number from 0, got 'ten'"),
        ([1, None, 5], "progress: message: expected text, got int"),
        ([1, 2, "x" * 1001], "progress: message: 1001 characters, the limit is 1000"),
    ],
)
async def test_what_can_be_no_progress_is_refused(session: flame.Session, arguments: list[Any], text: str) -> None:
    with pytest.raises(flame.TaskFailed, match=text):
        await session.invoke(call("wrong_progress", *arguments), options=ONCE)


# ---- the example


async def test_the_example_runs_as_printed(cluster: Cluster, connection: flame.Connection) -> None:
    service = {"command": sys.executable, "arguments": [str(EXAMPLE / "service.py")]}
    await registered(connection, service, "model")
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLE / "client.py"),
        env={**os.environ, "FLAME_ENDPOINT": cluster.broker.endpoint},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        said, told = (text.decode() for text in await client.communicate())
    answer = "A task is a message."
    assert f"[attempt 1] {answer}" in said
    assert "21 chunks from x" in said
    assert f"Once more: {answer}" in said
    assert f"At once: {answer}" in said
    assert "thinking: 21 of 21" in told
