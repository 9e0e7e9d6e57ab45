"""Functions of a client's own on a real cluster: from executor to executor, under faults, and switched off."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

import flame
import flame.sync
from flame.broker.embedded import EmbeddedBroker, EmbeddedBrokerConfig
from flame.broker.jetstream import connect
from flame.protocol import subjects
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.states import TaskState
from flame_services.scheduler.cluster import BUILT_IN, FOUNDED_KEY, found_cluster
from tests.support.cluster import Cluster, eventually, kill, started_executors
from tests.support.complaints import complaints
from tests.support.proxy import Proxy

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """End the background after the module's tests."""
    yield
    flame.sync.close()


class Refusal(Exception):
    """Something of this program's own."""


class Counter:
    """Counts, in one thread."""

    def __init__(self, start: int) -> None:
        self.count = start
        self.thread = threading.get_ident()

    def increment(self, by: int = 1) -> int:
        assert threading.get_ident() == self.thread
        self.count += by
        return self.count

    def pid(self) -> int:
        return os.getpid()

    def sleep(self) -> None:
        time.sleep(60)


class Large:
    """Knows in which thread it was loaded."""

    def __init__(self) -> None:
        self.data = bytes(1_000_000)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, thread=threading.current_thread().name)


def square(x: int) -> int:
    return x * x


def refuse_later() -> None:
    time.sleep(0.5)
    raise Refusal("later")


def dying_square(x: int) -> tuple[int, int]:
    attempt = flame.current_task().attempt
    if attempt == 1 and x % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x, attempt


def refuse(text: str) -> None:
    raise Refusal(text)


# ---- results


async def test_chains_need_no_more_than_one_executor(connection: flame.Connection) -> None:
    async with connection.functions(max_instances=1) as fs:
        call = fs.function(square)(2)
        for _ in range(4):
            call = fs.function(square)(call)
        calls = [fs.function(lambda *args: sum(args))(fs.function(square)(n), n, call) for n in range(20)]
        assert [await c for c in calls] == [n * n + n + 2**32 for n in range(20)]
        # What is more than a little is read by the executor that needs it.
        values = [fs.function(bytes)(n * 1000) for n in range(5)]
        assert await fs.function(lambda parts: [len(part) for part in parts])(values) == [0, 1000, 2000, 3000, 4000]
        with pytest.raises(flame.TaskFailed, match="no such luck") as raised:
            await fs.function(square)(fs.function(refuse)("no such luck"))
        assert isinstance(raised.value.__cause__, Refusal)
        failed = [task for task in await fs.session.list_tasks(limit=200) if task.state is TaskState.FAILED]
        assert len(failed) == 1


async def test_large_values_go_from_executor_to_executor(connection: flame.Connection) -> None:
    async with connection.functions(max_instances=1) as fs:
        large = fs.function(bytes)(3_000_000)
        assert await fs.function(len)(large) == 3_000_000
        task = await fs.session.get_task(large.task_id)
        assert task.output_size > 3_000_000
        assert large._handle is not None
        assert large._handle.task.output == b"", "it was not brought here"
        assert await fs.function(len)(b"x" * 2_000_000) == 2_000_000
        assert len(await large) == 3_000_000
        table = b"y" * 1_000_000
        assert await fs.function(lambda: len(table))() == 1_000_000
        counter = await fs.create(Counter, fs.function(len)(large))
        assert await counter.increment() == 3_000_001


async def test_whoever_has_the_context_reads_outputs_of_its_own_session_only(connection: flame.Connection) -> None:
    async def read(task: str) -> bytes:
        return await flame.current_task().output_of(task)

    async with connection.functions() as fs, connection.functions() as other:
        mine, others = fs.function(square)(3), other.function(square)(4)
        failing = fs.function(refuse)("not this one")
        await mine, await others
        with pytest.raises(flame.TaskFailed):
            await failing
        reading = fs.function(read)
        assert (await reading(mine.task_id)).endswith(b"\t.")
        cases: list[tuple[str, type[Exception], str]] = [
            (others.task_id, flame.TaskNotFound, "has no result of a task"),
            ("never-was", flame.TaskNotFound, "never-was"),
            (failing.task_id, flame.TaskFailed, "not this one"),
            ("a b", flame.InvalidName, "'a b'"),
        ]
        for task, kind, says in cases:
            with pytest.raises(flame.TaskFailed, match=says) as raised:
                await reading(task)
            error = raised.value.task.error
            assert error is not None
            assert error.type.endswith(kind.__name__)


# ---- faults


async def test_a_function_whose_executor_is_killed_runs_again(connection: flame.Connection) -> None:
    async with connection.functions(min_instances=2, max_instances=2) as fs:
        calls = [fs.function(dying_square)(n) for n in range(6)]
        firsts = [fs.function(lambda pair: pair[0])(call) for call in calls]
        assert [await first for first in firsts] == [n * n for n in range(6)]
        assert all([(await call)[1] > 1 for call in calls[1::2]])


async def test_an_object_whose_executor_is_killed_says_so(connection: flame.Connection) -> None:
    async with connection.functions() as fs:
        counter = await fs.create(Counter, 10)
        assert await counter.increment() == 11
        busy, behind = counter.sleep(), counter.increment()
        pid = await _running(connection, busy)
        kill(pid)
        for call in (busy, behind):
            with pytest.raises(flame.InstanceLost, match="was lost with its executor"):
                await call
        assert [await counter.increment(), await counter.increment()] == [11, 12]
        assert await counter.pid() != pid


async def _running(connection: flame.Connection, call: flame.FunctionCall[Any]) -> int:
    """Return the process of an object that is busy with a call."""
    [executor] = await started_executors(connection, call.session_id)

    async def runs() -> bool:
        return bool((await connection.get_session(call.session_id)).running)

    await eventually(runs, "the call runs")
    return executor.pid


async def test_calls_survive_connections_that_are_cut(cluster: Cluster) -> None:
    proxy = Proxy("127.0.0.1", cluster.broker.port)
    await proxy.open()
    try:
        async with await flame.connect(proxy.endpoint) as connection, connection.functions(max_instances=2) as fs:
            await fs.function(square)(1)
            counter = await fs.create(Counter, 0)
            added = [counter.increment() for _ in range(50)]
            squares = [fs.function(square)(n) for n in range(50)]
            sums = [fs.function(lambda a, b: a + b)(a, b) for a, b in zip(added, squares, strict=True)]
            for number in range(3):
                await proxy.cut()
                await proxy.open()
                await fs.function(partial(square, number))()  # a new function: a change of the common data
            assert [await each for each in sums] == [n + 1 + n * n for n in range(50)]
    finally:
        await proxy.cut()


async def test_the_scheduler_may_be_restarted_while_functions_are_added(
    cluster: Cluster, connection: flame.Connection
) -> None:
    async with connection.functions(max_instances=1) as fs:
        assert await fs.function(square)(1) == 1
        scheduler = cluster.scheduler
        assert scheduler is not None
        scheduler.send_signal(signal.SIGKILL)
        scheduler.wait()
        call = fs.function(lambda x: x + 1)(1)
        old = fs.function(square)(2)
        cluster.start_scheduler()
        assert [await call, await old] == [2, 4]


async def test_a_handle_that_nobody_awaits_is_quiet(
    connection: flame.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with connection.functions() as fs:
        for call in (fs.function(refuse)("quietly"), fs.function(square)(fs.function(refuse)("twice"))):
            del call
    assert not [record for record in caplog.records if record.name == "asyncio"]


# ---- without async


def test_calls_are_futures_without_async(cluster: Cluster) -> None:
    with flame.sync.connect(cluster.broker.endpoint) as connection, connection.functions(max_instances=2) as fs:
        sq = fs.function(square)
        assert sq(sq(3)).result(60) == 81
        assert list(fs.map(sq, [2, sq(2), 3])) == [4, 16, 9]
        outcomes = list(fs.map(fs.function(refuse), ["a", "b"], raise_failed=False))
        assert [isinstance(outcome, flame.TaskFailed) for outcome in outcomes] == [True, True]
        failing = fs.function(refuse)("no")
        error = failing.exception(60)
        assert isinstance(error, flame.TaskFailed)
        assert isinstance(error.__cause__, Refusal)
        assert not failing.cancelled()
        called: SimpleQueue[int] = SimpleQueue()
        sq(6).add_done_callback(lambda call: called.put(sq(call.result()).result()))  # it may use the API
        assert called.get(timeout=60) == 1296
        counter = fs.create(Counter, sq(2))
        assert [counter.increment().result(), counter.increment(sq(2)).result()] == [5, 9]
        slow = fs.function(asyncio.sleep)(60)
        with pytest.raises(flame.TimedOut, match="it goes on"):
            slow.result(0.05)
        waiting = sq(slow)
        assert slow.cancel("enough")
        assert slow.cancelled()
        assert isinstance(waiting.exception(60), flame.TaskCancelled)
        assert len(fs.function(bytes)(1_000_000).result()) == 1_000_000
        seen: list[int] = []
        threads = [threading.Thread(target=lambda n=n: seen.append(sq(n).result())) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(seen) == [0, 1, 4, 9]
        fs.release(counter)
        assert fs.session.application == "flmfunc"
    with pytest.raises(flame.SessionNotOpen):
        sq(1)


def test_large_values_are_fetched_by_whoever_wants_them_only(cluster: Cluster) -> None:
    with flame.sync.connect(cluster.broker.endpoint) as connection, connection.functions(max_instances=3) as fs:
        large = fs.function(Large)()
        assert large.exception(60) is None
        assert not large.cancelled()
        assert large._call.is_large, "it was not brought here"
        failing, slow = fs.function(refuse_later)(), fs.function(asyncio.sleep)(60)
        calls: list[Future[Any]] = [large, failing, slow]
        done, going_on = wait(calls, timeout=50, return_when=FIRST_EXCEPTION)
        assert (done, going_on) == ({large, failing}, {slow})
        assert isinstance(failing.exception(), flame.TaskFailed)
        assert slow.cancel()
        value: Any = large.result()
        assert value.thread == threading.current_thread().name
        assert large.result() is value


def test_calls_from_before_the_background_was_closed_are_refused(cluster: Cluster) -> None:
    with flame.sync.connect(cluster.broker.endpoint) as connection, connection.functions() as fs:
        former = fs.function(square)(2)
        assert former.result(60) == 4
    flame.sync.close()
    with flame.sync.connect(cluster.broker.endpoint) as connection, connection.functions() as fs:
        with pytest.raises(flame.WrongThread, match="another event loop"):
            fs.function(square)(former)
        with pytest.raises(flame.WrongThread, match="another event loop"):
            fs.create(Counter, former)
        assert fs.function(square)(3).result(60) == 9


def test_what_can_not_be_begun_fails(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no way")

    with flame.sync.connect(cluster.broker.endpoint) as connection, connection.functions() as fs:
        with monkeypatch.context() as patch:
            patch.setattr("flame.calls.caller.Caller.begin", broken)
            error = fs.function(square)(2).exception(60)
        assert isinstance(error, flame.FlameError)
        assert "RuntimeError: no way" in str(error)


# ---- programs


@pytest.mark.parametrize("name", ["functions.py", "functions_sync.py"])
def test_the_example_runs_as_it_says(cluster: Cluster, name: str) -> None:
    environment = {**os.environ, "FLAME_ENDPOINT": cluster.broker.endpoint}
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(EXAMPLES / name)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, complaints(done.stderr)) == (0, ""), done.stderr
    if name == "functions.py":
        assert "pi, roughly: 3.1" in done.stdout
        assert "the sum of the squares: 332833500" in done.stdout
        assert "refused: TypeError" in done.stdout
    else:
        assert "3² + 4² = 25" in done.stdout
        assert "apples left: 1 0" in done.stdout
        assert "and then: LookupError('no apples left')" in done.stdout


# ---- switched off


async def test_operators_leave_it_out_and_upgrades_bring_it_once(tmp_path: Path) -> None:
    async with EmbeddedBroker(EmbeddedBrokerConfig(data_dir=tmp_path)) as embedded:
        broker = await connect(embedded.endpoint)
        try:
            applications = broker.bucket(subjects.APPLICATIONS)

            async def there() -> set[str]:
                return {entry.key for entry in await applications.entries("*") if entry.value is not None} & {*BUILT_IN}

            await found_cluster(broker, 1, client_code=False)
            assert await there() == {"flmping", "flmtest"}
            await found_cluster(broker, 1, client_code=False)
            assert await there() == {"flmping", "flmtest"}
            await found_cluster(broker, 1)
            assert await there() == {*BUILT_IN}
            await applications.delete("flmfunc")
            await applications.delete("flmping")
            await found_cluster(broker, 1)
            assert await there() == {"flmexec", "flmtest"}, "who unregisters one is rid of it"
            # A cluster that was founded before there were functions says nothing of what it was offered.
            await applications.put(FOUNDED_KEY, pack({"v": VERSION, "at": 1.0}))
            await found_cluster(broker, 1)
            assert await there() == {"flmexec", "flmfunc", "flmtest"}
            founded = await applications.get(FOUNDED_KEY)
            assert founded is not None
            assert founded.value is not None
            assert unpack(founded.value)["applications"] == sorted(BUILT_IN)
        finally:
            await broker.close()
