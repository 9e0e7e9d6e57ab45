"""The synchronous API on a real cluster: in scripts, threads and running loops, and how programs that use it end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import flame
import flame.sync
from flame.sync.background import NAME
from flame.sync.callbacks import NAME as CALLBACKS
from tests.support.cluster import PATIENCE_S, Cluster, kill
from tests.support.complaints import complaints

EXAMPLE = Path(__file__).parents[2] / "examples" / "sync_client.py"


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return the first true value of ``condition``."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return value


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """End the background after the module's tests."""
    yield
    flame.sync.close()
    assert not threads() & {NAME, CALLBACKS}


@pytest.fixture
def client(cluster: Cluster) -> Iterator[flame.sync.Connection]:
    """A client of the cluster that knows the application of tests/services/lab.py."""
    with flame.sync.connect(cluster.broker.endpoint) as connection:
        with contextlib.suppress(flame.ApplicationExists):
            connection.register_application("lab", cluster.service("lab", delay_release_s=30))
        yield connection
    assert connection.closed


@pytest.fixture
def ping(client: flame.sync.Connection) -> Iterator[flame.sync.Session]:
    with client.create_session("flmping") as session:
        yield session
    assert session.state is flame.SessionState.CLOSED


@pytest.fixture
def session(client: flame.sync.Connection) -> Iterator[flame.sync.Session]:
    """A session of the lab with one executor."""
    with client.create_session("lab", max_instances=1) as session:
        yield session


# ---- as in a script


def test_a_session_from_its_beginning_to_its_end(client: flame.sync.Connection) -> None:
    with client.create_session("lab", b"data", labels={"sync": "yes"}) as session:
        assert json.loads(session.invoke(call("who")).output)["common_data"] == "data"
        with pytest.raises(flame.TaskFailed, match="no luck") as caught:
            session.invoke(call("fail", "no luck"))
        assert caught.value.task.state is flame.TaskState.FAILED
        handle = session.create_task(call("echo", 1))
        assert handle.result().output == b"1"
        assert session.get_task(handle.id) == handle.task
        assert [task.state.value for task in session.list_tasks()] == ["succeed", "failed", "succeed"]
        assert [info.session.id for info in client.list_sessions(labels={"sync": "yes"})] == [session.id]
        again = client.open_session(session.id)
        assert again.invoke(call("echo", 2)).output == b"2"
        [executor] = client.list_executors(session=session.id)
        assert client.get_executor(executor.id).session == session.id
    assert session.state is flame.SessionState.CLOSED
    assert client.get_session(session.id).session.settled
    assert len(client.list_tasks(session.id)) == 4
    with pytest.raises(flame.SessionNotOpen):
        session.create_task(b"late")


def test_applications_nodes_and_the_cluster(cluster: Cluster, client: flame.sync.Connection) -> None:
    client.register_application("ours", cluster.service("lab"))
    assert client.update_application("ours", cluster.service("lab", description="new")).spec.description == "new"
    assert client.get_application("ours").name == "ours"
    assert "ours" in {application.name for application in client.list_applications()}
    client.unregister_application("ours")
    with pytest.raises(flame.ApplicationNotFound):
        client.create_session("ours")
    assert client.info().nodes == 1
    assert [client.get_node(node.name).name for node in client.list_nodes()] == ["node1"]
    assert client.endpoint == cluster.broker.endpoint


def test_what_the_cluster_says_one_after_another(client: flame.sync.Connection) -> None:
    with client.events(application="lab") as events:
        with client.create_session("lab") as session:
            watch = session.watch()
            session.invoke(call("print", "hello"))
        told: list[tuple[str, str]] = []
        while ("session", "closed") not in told:
            event = events.next(PATIENCE_S)
            told.append((event.noun.value, event.state))
        assert told[0] == ("session", "open")
    with pytest.raises(StopIteration):
        next(events)
    seen = [event.session_state if event.kind == "session" else event.task_state for event in watch]
    assert seen[0] is flame.SessionState.OPEN
    assert flame.TaskState.SUCCEED in seen
    assert seen[-1] is flame.SessionState.CLOSED
    with pytest.raises(StopIteration):
        next(watch)
    lines = [line.text for line in client.read_logs(session=session.id, follow=True)]
    assert lines == ["hello", "hello"]
    with pytest.raises(flame.SessionNotFound), client.events(session="nosuchsession"):
        pass
    with pytest.raises(flame.SessionNotFound):
        next(client.read_logs(session="nosuchsession"))


def test_waiting_for_what_comes_next_has_a_limit_and_loses_nothing(ping: flame.sync.Session) -> None:
    with ping.watch() as watch:
        assert next(watch).session_state is flame.SessionState.OPEN
        with pytest.raises(flame.TimedOut, match=r"within 0\.1 s"):
            watch.next(0.1)
        handle = ping.create_task(b"x")
        assert watch.next(PATIENCE_S).task_id == handle.id


def test_who_closes_is_told_on_the_own_thread_how_far_it_is(client: flame.sync.Connection) -> None:
    told: list[tuple[flame.SessionInfo, threading.Thread]] = []
    session = client.create_session("lab", max_instances=1)
    session.create_tasks([call("sleep", 0.3)] * 3)
    session.close("drain", on_progress=lambda info: told.append((info, threading.current_thread())))
    assert told[-1][0].session.settled
    assert told[-1][0].succeeded == 3
    assert {thread for _, thread in told} == {threading.current_thread()}

    def stop(info: flame.SessionInfo) -> None:
        raise LookupError("seen enough")

    other = client.create_session("lab", max_instances=1)
    other.create_task(call("sleep", 1))
    with pytest.raises(LookupError, match="seen enough"):
        other.close("drain", on_progress=stop)
    until(lambda: client.get_session(other.id).session.settled, "the closing goes on")


def test_limits_of_time_are_those_of_the_asynchronous_api(session: flame.sync.Session) -> None:
    session.invoke(call("echo", 0))
    begun = time.monotonic()
    with pytest.raises(flame.TimedOut, match=r"has not ended after 0\.2 s; it goes on"):
        session.invoke(call("sleep", 1), timeout_s=0.2)
    handle = session.create_task(call("sleep", 1))
    for wait in (handle.result, handle.exception, handle.finished):
        with pytest.raises(flame.TimedOut, match=r"has not ended after 0\.1 s; it goes on"):
            wait(timeout=0.1)
    with pytest.raises(TimeoutError):
        handle.result(0)
    assert time.monotonic() - begun < 1.5
    assert handle.result(PATIENCE_S).state is flame.TaskState.SUCCEED
    assert handle.result(0) is handle.finished()


def test_the_default_connection_needs_no_endpoint(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAME_ENDPOINT", cluster.broker.endpoint)
    flame.sync.register_application("by-default", cluster.service("lab"))
    with flame.sync.create_session("by-default") as session:
        assert flame.sync.open_session(session.id).invoke(call("echo", 1)).output == b"1"
    other = flame.sync.create_session("by-default")
    flame.sync.close_session(other.id)
    until(lambda: other.state is flame.SessionState.CLOSED, "it is closed")
    flame.sync.close()


def test_a_task_outlives_its_executor(client: flame.sync.Connection, session: flame.sync.Session) -> None:
    pid = json.loads(session.invoke(call("who")).output)["pid"]
    handle = session.create_task(call("sleep", 1))
    until(handle.running, "it runs")
    kill(pid)
    task = handle.result(PATIENCE_S)
    assert task.attempt == 2
    assert int(task.output) != pid


def test_a_broker_that_dies_and_comes_back_costs_nothing(cluster: Cluster, client: flame.sync.Connection) -> None:
    with client.create_session("lab", max_instances=1) as session:
        watch = session.watch()
        session.invoke(call("echo", 0))
        slow = session.create_task(call("sleep", 1))
        tasks = session.map((call("echo", number) for number in range(300)), in_flight=20)
        first = next(tasks)
        cluster.broker.kill()
        asyncio.run(cluster.broker.start())
        assert [int(task.output) for task in (first, *tasks)] == list(range(300))
        assert slow.result(PATIENCE_S).state is flame.TaskState.SUCCEED
    ended = [event.task_id for event in watch if event.task_state is flame.TaskState.SUCCEED]
    assert len(ended) == len(set(ended)) == 302


# ---- futures


def test_handles_are_futures_for_whoever_waits(session: flame.sync.Session) -> None:
    session.invoke(call("echo", 0))
    slow = session.create_task(call("sleep", 1.5))
    quick, failed = session.create_tasks([call("echo", 1), call("fail", "no")])
    done, waiting = concurrent.futures.wait(
        [slow, quick, failed], timeout=PATIENCE_S, return_when=concurrent.futures.FIRST_COMPLETED
    )
    assert slow in waiting | done
    ended = list(concurrent.futures.as_completed([slow, quick, failed], timeout=PATIENCE_S))
    assert set(ended) == {slow, quick, failed}
    assert isinstance(failed.exception(), flame.TaskFailed)
    assert failed.finished().state is flame.TaskState.FAILED
    assert quick.exception() is None
    with pytest.raises(flame.TaskFailed):
        failed.result()
    assert not quick.cancelled()
    assert not quick.running()
    done, waiting = concurrent.futures.wait([slow, quick, failed])
    assert (len(done), len(waiting)) == (3, 0)
    assert "succeed" in repr(slow)
    assert slow.session_id == session.id
    assert slow.application == session.application


def test_a_future_cancels_its_task(session: flame.sync.Session) -> None:
    session.invoke(call("echo", 0))
    running, waiting = session.create_tasks([call("sleep", 60), call("echo", 1)])
    until(running.running, "it runs")
    for handle in (waiting, running):
        assert handle.cancel("not wanted")
        with pytest.raises(flame.TaskCancelled, match="not wanted"):
            handle.result(PATIENCE_S)
        assert handle.cancelled()
    done = session.create_task(call("echo", 2))
    done.result()
    assert not done.cancel()
    others = session.create_tasks([call("sleep", 60)] * 2)
    states = session.cancel_tasks((handle.id for handle in others), "nor these")
    assert set(states.values()) == {flame.TaskState.CANCELLED}
    with pytest.raises(flame.InvalidArgument, match="a list of ids"):
        session.cancel_tasks(others[0].id)


async def test_a_future_can_be_awaited_in_a_loop(session: flame.sync.Session) -> None:
    task = await asyncio.wrap_future(session.create_task(call("echo", 1)))
    assert task.output == b"1"


# ---- where it is used


async def test_it_works_where_a_loop_runs_already(cluster: Cluster) -> None:
    """As in a notebook, whose cells run inside a loop; the asynchronous API stays usable beside it."""
    with flame.sync.connect(cluster.broker.endpoint) as client, client.create_session("flmping") as session:
        assert session.invoke(b"sync").output == b"sync"
        assert [task.output for task in session.map([b"1", b"2"])] == [b"1", b"2"]
        async with await flame.connect(cluster.broker.endpoint) as connection:
            beside = await connection.open_session(session.id)
            assert (await beside.invoke(b"async")).output == b"async"


def test_threads_share_a_connection_and_a_session(ping: flame.sync.Session) -> None:
    def work(number: int) -> list[bytes]:
        mine = [ping.invoke(b"%d" % number).output for _ in range(20)]
        return mine + [handle.result().output for handle in ping.create_tasks([b"%d" % number] * 20)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[b"%d" % number] * 40 for number in range(8)]


# ---- many tasks


def test_many_tasks_are_stored_in_order(ping: flame.sync.Session) -> None:
    inputs = [b"%d" % number for number in range(5000)]
    handles = ping.create_tasks(iter(inputs))
    assert [handle.result().output for handle in handles] == inputs
    assert ping.create_tasks([]) == []


def test_map_yields_in_order_and_takes_inputs_on_the_calling_thread_as_needed(ping: flame.sync.Session) -> None:
    taken: list[threading.Thread] = []

    def inputs() -> Iterator[str]:
        for number in range(3000):
            taken.append(threading.current_thread())
            yield str(number)

    outputs = []
    for task in ping.map(inputs(), in_flight=50):
        outputs.append(int(task.output))
        assert len(taken) <= len(outputs) + 100
    assert outputs == list(range(3000))
    assert set(taken) == {threading.current_thread()}


@pytest.mark.parametrize("in_flight", [1, 2, 7, 1000])
def test_map_yields_each_once_as_they_finish(ping: flame.sync.Session, in_flight: int) -> None:
    tasks = ping.map((b"%d" % number for number in range(100)), ordered=False, in_flight=in_flight)
    assert sorted(int(task.output) for task in tasks) == list(range(100))
    assert list(tasks) == []
    assert list(ping.map([], in_flight=in_flight)) == []


def test_map_of_a_map(ping: flame.sync.Session) -> None:
    """Inputs may come from the cluster, too: nothing waits for itself."""
    first = ping.map((b"%d" % number for number in range(300)), in_flight=20)
    outputs = [task.output for task in ping.map((task.output + b"!" for task in first), in_flight=20)]
    assert outputs == [b"%d!" % number for number in range(300)]


def test_map_raises_at_a_failed_task_or_yields_it(session: flame.sync.Session) -> None:
    inputs = [call("echo", 1), call("fail", "no"), call("echo", 2)]
    states = [task.state.value for task in session.map(inputs, raise_failed=False)]
    assert states == ["succeed", "failed", "succeed"]
    tasks = session.map(inputs)
    assert next(tasks).output == b"1"
    with pytest.raises(flame.TaskFailed):
        next(tasks)
    with pytest.raises(StopIteration):
        next(tasks)


def test_map_ends_with_the_inputs_error(ping: flame.sync.Session) -> None:
    def inputs() -> Iterator[bytes]:
        yield b"1"
        yield b"2"
        raise LookupError("half-way")

    tasks = ping.map(inputs())
    with pytest.raises(LookupError, match="half-way"):
        list(tasks)
    assert list(tasks) == []
    with pytest.raises(flame.InvalidArgument, match="input"):
        list(ping.map([b"1", 2]))  # type: ignore[list-item]


async def test_map_refuses_what_it_can_not_take(ping: flame.sync.Session) -> None:
    async def inputs() -> Any:
        yield b"1"

    for wrong in (inputs(), 5):
        with pytest.raises(flame.InvalidArgument, match="inputs: expected an iterable"):
            ping.map(wrong)  # type: ignore[arg-type]
    with pytest.raises(flame.InvalidArgument, match="in_flight"):
        next(ping.map([b"1"], in_flight=0))


def test_map_is_left_early(ping: flame.sync.Session) -> None:
    with ping.map(b"%d" % number for number in range(10_000)) as tasks:
        assert next(tasks).output == b"0"
    assert list(tasks) == []
    tasks.close()
    dropped = ping.map(b"%d" % number for number in range(10_000))
    next(dropped)
    pump = dropped._pump
    del dropped
    until(lambda: pump._over, "what nobody holds is stopped")
    assert ping.invoke(b"x").output == b"x"


# ---- callbacks


class Listener(flame.TaskInformer):
    """Notes what it hears, and where; may do something with it."""

    def __init__(self, then: Callable[[flame.Task], object] = lambda _: None) -> None:
        self.heard: list[str] = []
        self.threads: set[str] = set()
        self.then = then
        self.errors = 0

    def on_update(self, task: flame.Task) -> None:
        self.threads.add(threading.current_thread().name)
        self.heard.append(task.state.value)
        self.then(task)

    def on_error(self) -> None:
        self.errors += 1


class Coroutine(flame.TaskInformer):
    def __init__(self) -> None:
        self.heard: list[str] = []

    async def on_update(self, task: flame.Task) -> None:
        await asyncio.sleep(0.01)
        self.heard.append(task.state.value)


def test_an_informer_has_heard_everything_when_the_result_is_there(session: flame.sync.Session) -> None:
    listener, coroutine = Listener(), Coroutine()
    session.invoke(call("sleep", 0.3), listener)
    assert listener.heard == ["pending", "running", "succeed"]
    assert listener.threads == {CALLBACKS}
    session.create_task(call("sleep", 0.3), coroutine).result()
    assert coroutine.heard == ["pending", "running", "succeed"]
    failing = Listener()
    with pytest.raises(flame.TaskFailed):
        session.invoke(call("fail", "no"), failing)
    assert (failing.heard[-1], failing.errors) == ("failed", 1)


def test_callbacks_may_use_the_api(session: flame.sync.Session, caplog: pytest.LogCaptureFixture) -> None:
    answers: list[bytes] = []

    def again(task: flame.Task) -> None:
        if task.state.terminal:
            answers.append(session.invoke(call("echo", "again")).output)

    session.invoke(call("echo", 1), Listener(again))
    assert answers == [b'"again"']
    chained: concurrent.futures.Future[flame.sync.TaskHandle] = concurrent.futures.Future()
    first = session.create_task(call("sleep", 0.1))
    first.add_done_callback(lambda handle: chained.set_result(session.create_task(handle.result().output)))
    with pytest.raises(flame.TaskFailed):  # a number is no list of a verb and its arguments
        chained.result(PATIENCE_S).result(PATIENCE_S)
    called: list[object] = []
    first.add_done_callback(called.append)
    assert called == [first], "it had ended: it is called at once"
    assert caplog.records == []


def test_what_callbacks_raise_is_logged_and_harms_nobody(
    session: flame.sync.Session, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: object) -> None:
        raise LookupError("not again")

    session.invoke(call("echo", 1), Listener(fails))
    assert session.invoke(call("echo", 2), Listener()).output == b"2"
    assert "not again" in caplog.text


# ---- where it can't work


def test_the_background_is_not_made_to_wait_for_itself(session: flame.sync.Session) -> None:
    errors: list[Exception] = []
    uses: list[Callable[[], object]] = [
        lambda: session.invoke(b"x"),
        lambda: next(session.watch()),
        lambda: flame.sync.open_session(session.id),
        lambda: other.result(),  # noqa: PLW0108  # it is made later
        flame.sync.close,
    ]
    other = session.create_task(call("sleep", 0.5))

    class Wrong(flame.TaskInformer):
        async def on_update(self, task: flame.Task) -> None:
            for use in uses:
                if not other.done():
                    with pytest.raises(flame.WrongThread, match="would wait for itself") as caught:
                        use()
                    errors.append(caught.value)

    session.create_task(call("echo", 1), Wrong()).result(PATIENCE_S)
    assert len(errors) >= 5
    assert isinstance(errors[0], RuntimeError)


def test_a_callback_does_not_wait_for_a_later_one(session: flame.sync.Session) -> None:
    errors: list[Exception] = []

    def wrong(task: flame.Task) -> None:
        if task.state.terminal:
            handle = session.create_task(call("echo", 1), Listener())
            uses: list[Callable[[], object]] = [handle.result, lambda: session.invoke(call("echo", 1), Listener())]
            for use in uses:
                with pytest.raises(flame.WrongThread, match="calls of an informer") as caught:
                    use()
                errors.append(caught.value)

    session.invoke(call("echo", 1), Listener(wrong))
    assert len(errors) == 2


def test_what_was_closed_is_refused_and_says_so(cluster: Cluster) -> None:
    client = flame.sync.connect(cluster.broker.endpoint)
    session = client.create_session("lab", max_instances=1)
    handle = session.create_task(call("sleep", 1))
    watch = session.watch()
    next(watch)
    client.close()
    client.close()
    waits: list[Callable[[], object]] = [handle.result, lambda: list(watch)]
    for wait in waits:
        with pytest.raises(flame.BrokerUnavailable, match="the connection was closed"):
            wait()
    uses: list[Callable[[], object]] = [
        client.info,
        lambda: session.create_task(b"x"),
        lambda: next(client.events()),
        lambda: list(session.map([b"x"])),
    ]
    for use in uses:
        with pytest.raises(flame.BrokerUnavailable, match="closed"):
            use()


def test_everything_is_closed_at_once_and_begins_anew(cluster: Cluster) -> None:
    client = flame.sync.connect(cluster.broker.endpoint)
    session = client.create_session("lab", max_instances=1)
    handle = session.create_task(call("sleep", 2), Listener())
    watch = session.watch()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waits: list[concurrent.futures.Future[Any]] = [
            pool.submit(session.invoke, call("sleep", 2)),
            pool.submit(handle.result),
            pool.submit(list, watch),
        ]
        until(lambda: len(client._background._calls) == 1, "they wait")
        flame.sync.close()
        flame.sync.close()
        assert not threads() & {NAME, CALLBACKS}
        for wait in waits:
            assert isinstance(wait.exception(PATIENCE_S), flame.BrokerUnavailable), wait.exception()
    assert client.closed
    client.close()
    for use in (client.info, lambda: next(watch), lambda: list(session.map([b"x"]))):
        with pytest.raises(flame.BrokerUnavailable, match=r"flame\.sync was closed: connect again"):
            use()
    with flame.sync.connect(cluster.broker.endpoint) as another:
        another.open_session(session.id).close("force")


def test_no_broker_is_said_in_time() -> None:
    with pytest.raises(flame.BrokerUnavailable):
        flame.sync.connect("nats://127.0.0.1:1", timeout_s=0.5)


# ---- programs

QUIET = (("-W", "error"), ("-X", "dev"))
"""Ways of starting Python that complain of what isn't closed."""


def program(cluster: Cluster, text: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *options, "-c", "import flame, flame.sync\n" + textwrap.dedent(text)],
        env={**os.environ, "FLAME_ENDPOINT": cluster.broker.endpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, output, complaints(errors)


@pytest.mark.parametrize("options", QUIET, ids="".join)
def test_a_program_that_closes_nothing_ends_without_a_word(
    cluster: Cluster, client: flame.sync.Connection, options: tuple[str, ...]
) -> None:
    text = """
        import threading
        class Informer(flame.TaskInformer):
            def on_error(self): print("no more calls at the end", flush=True)
        session = flame.sync.create_session("lab", session_id={id!r}, max_instances=1)
        other = flame.sync.connect()
        watch, events, tasks = session.watch(), other.events(), session.map([b'["echo", 1]'] * 1000, in_flight=10)
        logs = other.read_logs(session=session.id, follow=True)
        events.__enter__()
        print(next(watch).kind, next(tasks).output, session.invoke('["echo", 1]', Informer()).output)
        waiting = session.create_task('["sleep", 60]', Informer())
        waiting.add_done_callback(lambda handle: print(handle.result()))
        threading.Thread(target=lambda: session.invoke('["sleep", 60]'), daemon=True).start()
        threading.Thread(target=lambda: list(session.watch()), daemon=True).start()
        """
    name = f"quiet{abs(hash(options))}"
    begun = time.monotonic()
    assert outcome(program(cluster, text.format(id=name), *options)) == (0, "session b'1' b'1'\n", "")
    assert time.monotonic() - begun < 15
    assert client.get_session(name).session.state is flame.SessionState.OPEN
    client.open_session(name).close("force")


@pytest.mark.parametrize("options", QUIET, ids="".join)
def test_ctrl_c_ends_a_waiting_program_at_once(
    cluster: Cluster, client: flame.sync.Connection, tmp_path: Path, options: tuple[str, ...]
) -> None:
    mark = tmp_path / "runs"
    text = f"""
        with flame.sync.create_session("lab", max_instances=1) as session:
            session.invoke('["block", 5, "{mark}"]')
        """
    with program(cluster, text, *options) as process:
        try:
            until(mark.exists, "it runs")
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            status, output, errors = outcome(process)
        finally:
            process.kill()
    assert time.monotonic() - begun < 4.5, "the session's end is waited for, but not for long"
    assert (status, output) == (-signal.SIGINT, "")
    assert errors.startswith("Traceback (most recent call last):")
    assert errors.endswith("\nKeyboardInterrupt\n")
    assert errors.count("Traceback") == 1


def test_a_program_goes_on_after_ctrl_c(cluster: Cluster, client: flame.sync.Connection) -> None:
    text = """
        import os, signal, threading, time
        session = flame.sync.create_session("lab", max_instances=1)
        session.invoke('["echo", 0]')
        slow = session.create_task('["sleep", 3]')
        watch = session.watch()
        next(watch)
        def waits():
            yield lambda: session.invoke('["sleep", 30]')
            yield slow.result
            yield lambda: list(session.map(['["sleep", 30]'] * 3))
            yield lambda: [next(watch) for _ in range(1000)]
            yield lambda: session.close("drain", on_progress=lambda info: None)
        for wait in waits():
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            begun = time.monotonic()
            try:
                wait()
            except KeyboardInterrupt:
                print(time.monotonic() - begun < 1.5)
            timer.join()
        print(slow.result().state.value, len(session._background._calls))
        session.close("force")
        print(session.state.value)
        """
    status, output, errors = outcome(program(cluster, text, "-X", "dev"))
    assert (status, errors) == (0, "")
    assert output.split() == ["True"] * 5 + ["succeed", "0", "closed"]


def test_a_forked_process_begins_anew(cluster: Cluster, client: flame.sync.Connection) -> None:
    text = """
        import concurrent.futures, os, sys
        connection = flame.sync.connect()
        session = connection.create_session("lab", max_instances=1)
        ended, waiting = session.create_tasks(['["echo", 1]', '["sleep", 2]'])
        ended.result()
        watch = session.watch()
        next(watch)
        child = os.fork()
        if child == 0:
            print(ended.result().output)
            for use in (connection.info, lambda: session.invoke(b"x"), waiting.result, lambda: next(watch)):
                try:
                    use()
                except flame.BrokerUnavailable as error:
                    print("forked" in str(error))
            print(len(concurrent.futures.wait([ended, waiting], timeout=5).done), connection.closed)
            connection.close()
            with flame.sync.connect() as mine:
                print(mine.open_session(session.id).invoke('["echo", 2]').output)
            flame.sync.open_session(session.id)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(waiting.result().state.value, session.invoke('["echo", 3]').output)
        session.close()
        """
    status, output, errors = outcome(program(cluster, text, "-X", "dev", "-W", "ignore::DeprecationWarning"))
    assert (status, errors) == (0, "")
    assert output.split("\n")[:-1] == ["b'1'", *["True"] * 4, "2 True", "b'2'", "succeed b'3'"]


def test_the_example_says_what_it_shows(cluster: Cluster) -> None:
    environment = {**os.environ, "FLAME_ENDPOINT": cluster.broker.endpoint}
    command = [sys.executable, "-X", "dev", str(EXAMPLE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, complaints(done.stderr)) == (0, "")
    lines = done.stdout.splitlines()
    assert sorted(lines[1:4]) == ["as completed: blue", "as completed: green", "as completed: red"]
    assert lines[:1] + lines[4:] == [
        "one: hello",
        "the sum of 0..999: 499500",
        "from threads: a b c",
        "not found: TaskNotFound",
    ]
