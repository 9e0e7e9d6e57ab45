"""What users test their own services with: the cluster in this process, its clock, and assertions on events."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest

import flame
import flame.testing
from flame.errors import ConfigurationError
from flame.testing import EmbeddedCluster, EventLog, Faults, MemoryCluster, Stuck, VirtualClock, run_virtually


class Echo(flame.FlameService):
    """Says what it was told, and remembers it."""

    def __init__(self, greeting: str = "") -> None:
        self.greeting = greeting
        self.heard: list[bytes] = []
        self.left = False

    async def on_session_enter(self, context: flame.SessionContext) -> None:
        self.common_data = context.common_data.decode()

    async def on_task_invoke(self, context: flame.TaskContext) -> str:
        self.heard.append(context.input)
        verb, _, argument = context.input.decode().partition(" ")
        if verb == "sleep":
            await asyncio.sleep(float(argument))
        if verb == "fail":
            raise ValueError(argument)
        return f"{self.greeting}{self.common_data} {context.input.decode()}".strip()

    async def on_session_leave(self) -> None:
        self.left = True


class InThread:
    """A service whose method is not ``async``."""

    def on_task_invoke(self, context: flame.TaskContext) -> str:
        time.sleep(float(context.input))
        return "done"


@pytest.fixture
async def cluster() -> AsyncIterator[MemoryCluster]:
    async with MemoryCluster(clock=VirtualClock()) as made:
        yield made


def clock_of(cluster: MemoryCluster) -> VirtualClock:
    assert cluster.clock is not None
    return cluster.clock


# ---- the clock


async def test_timers_fire_in_order_each_at_its_time() -> None:
    fired: list[tuple[str, float]] = []
    with VirtualClock() as clock:

        def fire(name: str) -> None:
            fired.append((name, clock.elapsed))

        for name, after_s in (("c", 30.0), ("a", 10.0), ("b", 20.0), ("late", 31.0)):
            asyncio.get_running_loop().call_later(after_s, fire, name)
        await clock.advance(30)
    assert [(name, round(at, 2)) for name, at in fired] == [("a", 10.0), ("b", 20.0), ("c", 30.0)]


async def test_what_a_timer_sets_off_happens_before_the_next_one() -> None:
    seen: list[str] = []

    async def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            await asyncio.sleep(nap)
            seen.append(f"{name}{nap:g}")

    with VirtualClock() as clock:
        tasks = [asyncio.create_task(sleeper("a", 10, 5)), asyncio.create_task(sleeper("b", 14))]
        await clock.advance(20)
        assert all(task.done() for task in tasks)
    assert seen == ["a10", "b14", "a5"]


async def test_time_passes_by_itself_where_everything_waits() -> None:
    began = time.perf_counter()
    with VirtualClock() as clock:
        before = time.time()
        await asyncio.sleep(3000)
        assert clock.elapsed == pytest.approx(3000, abs=0.1)
        assert time.time() - before == pytest.approx(3000, abs=0.1)
        assert time.monotonic() == asyncio.get_running_loop().time() == clock.time()
    assert time.perf_counter() - began < 5


async def test_without_auto_time_stands_still_but_for_advance() -> None:
    with VirtualClock(auto=False) as clock:
        sleeper = asyncio.create_task(asyncio.sleep(1))
        await clock.advance(0.75)
        for _ in range(100):
            await asyncio.sleep(0)
        assert clock.elapsed == pytest.approx(0.75)
        assert not sleeper.done()
        await clock.advance(0.25)
        assert sleeper.done()


async def test_real_time_is_back_afterwards() -> None:
    real = time.monotonic
    clock = VirtualClock()
    clock.uninstall()  # safe before
    clock.install()
    await asyncio.sleep(1000)
    clock.uninstall()
    clock.uninstall()
    assert time.monotonic is real
    assert abs(asyncio.get_running_loop().time() - time.monotonic()) < 1
    began = time.perf_counter()
    await asyncio.sleep(0.02)
    assert 0.01 < time.perf_counter() - began < 5


async def test_there_is_one_clock_at_a_time() -> None:
    with VirtualClock(), pytest.raises(ConfigurationError, match="another one is installed"):
        VirtualClock().install()


async def test_time_does_not_go_back_nor_where_no_clock_is() -> None:
    clock = VirtualClock()
    with pytest.raises(ConfigurationError, match="not installed"):
        await clock.advance(1)
    with clock, pytest.raises(ValueError, match="can't go back, got -1 seconds"):
        await clock.advance(-1)


def test_another_kind_of_loop_is_refused() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        with pytest.raises(ConfigurationError, match="expected one of asyncio's own selector event loops, got uvloop"):
            VirtualClock().install()

    uvloop.run(main())


async def test_while_a_thread_works_time_passes_as_usual() -> None:
    with VirtualClock() as clock:
        async with asyncio.timeout(60):  # a jump would end it
            await asyncio.to_thread(time.sleep, 0.3)
        assert 0.2 < clock.elapsed < 50


async def test_what_a_thread_does_at_once_takes_no_time() -> None:
    with VirtualClock() as clock:
        for _ in range(20):
            await asyncio.to_thread(time.sleep, 0.001)
        assert clock.elapsed < 0.02


async def test_while_a_socket_is_open_time_passes_as_usual_but_for_advance() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()

    with VirtualClock() as clock:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        async with asyncio.timeout(60):
            writer.write(b"hello\n")
            assert await reader.readline() == b"hello\n"
        assert clock.elapsed < 50
        await clock.advance(1000)
        assert clock.elapsed > 1000
        writer.close()
        server.close()


def test_who_waits_for_ever_is_stuck() -> None:
    async def wait(tick_s: float) -> None:
        async def ticks() -> None:
            while True:  # noqa: ASYNC110  # it is there so that a timer always runs
                await asyncio.sleep(tick_s)

        with VirtualClock(limit_s=100):
            ticking = asyncio.create_task(ticks())
            try:
                await asyncio.Event().wait()
            finally:
                ticking.cancel()

    with pytest.raises(Stuck, match="100 s of virtual time have passed without an end"):
        asyncio.run(wait(1))


def test_who_waits_without_any_timer_is_stuck() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await wait()

    clock = VirtualClock()

    async def with_clock() -> None:
        with clock:
            await main()

    with pytest.raises(Stuck, match="no timer runs"):
        asyncio.run(with_clock())
    clock.uninstall()


def test_the_same_seed_takes_the_same_course() -> None:
    async def main() -> list[str]:
        async with MemoryCluster(faults=Faults(lose_live=0.2, delay_live=0.2), seed=3) as cluster:
            await cluster.register(Echo, max_instances=3)
            session = await cluster.create_session("Echo")
            tasks = await session.create_tasks([f"sleep {n % 3}" for n in range(20)])
            return [f"{(await task).id} {(await task).executor}" for task in tasks]

    assert run_virtually(main(), seed=1) == run_virtually(main(), seed=1)
    assert run_virtually(main(), seed=1) != run_virtually(main(), seed=2)


def test_a_program_in_virtual_time_has_a_limit() -> None:
    with pytest.raises(TimeoutError):
        run_virtually(asyncio.sleep(100), limit_s=10)


# ---- the cluster


async def test_each_session_has_its_own_instance(cluster: MemoryCluster) -> None:
    await cluster.register(Echo)
    one, two = await cluster.create_session("Echo", b"one"), await cluster.create_session("Echo", b"two")
    assert (await one.invoke("x")).output == b"one x"
    assert (await two.invoke("x")).output == b"two x"
    await one.close()
    services = {service.common_data: service for service in cluster.services("Echo")}
    assert services["one"].left
    assert not services["two"].left


async def test_an_instance_is_copied_as_a_fork_would(cluster: MemoryCluster) -> None:
    made = Echo("Hello ")
    await cluster.register(made, "echo")
    session = await cluster.create_session("echo", b"you")
    assert (await session.invoke("there")).output == b"Hello you there"
    assert made.heard == []
    assert cluster.services("echo")[0].heard == [b"there"]


async def test_without_a_clock_time_is_real() -> None:
    async with MemoryCluster() as cluster:
        await cluster.register(Echo)
        session = await cluster.create_session("Echo")
        began = time.perf_counter()
        assert (await session.invoke("sleep 0.05")).output == b"sleep 0.05"
        assert 0.04 < time.perf_counter() - began < 10


async def test_the_functions_of_the_module_reach_it(cluster: MemoryCluster) -> None:
    await cluster.register(Echo, "agent")
    session = await flame.create_session("agent", b"a")
    assert (await session.invoke("b")).output == b"a b"
    async with await flame.connect("nats://198.51.100.1:4222") as connection:
        assert [info.session.id for info in await connection.list_sessions()] == [session.id]
    assert (await flame.open_session(session.id)).id == session.id


async def test_a_later_cluster_on_the_same_loop_is_another_one() -> None:
    sessions: list[flame.Session] = []
    for expected in (b"1", b"2"):
        async with MemoryCluster() as cluster:
            await cluster.register(Echo, "agent")
            session = await flame.create_session("agent", expected)
            assert (await session.invoke("")).output == expected
            assert len(await cluster.connection.list_sessions()) == 1
            sessions.append(session)
    with pytest.raises(flame.BrokerUnavailable):
        await sessions[0].invoke("")


async def test_a_method_that_blocks_has_a_thread(cluster: MemoryCluster) -> None:
    await cluster.register(InThread, timeout_s=30)
    session = await cluster.create_session("InThread")
    assert (await session.invoke("0.05")).output == b"done"
    assert clock_of(cluster).elapsed < 25


async def test_an_executor_is_lost_and_its_task_runs_again(cluster: MemoryCluster) -> None:
    await cluster.register(Echo)
    async with cluster.events() as events:
        session = await cluster.create_session("Echo")
        task = await session.create_task("sleep 10")
        first = (await events.expect(task=task, state="running")).executor
        cluster.kill_executor(first)
        done = await task
        assert (done.attempt, done.executor != first) == (2, True)
        assert 10 < clock_of(cluster).elapsed < 12
        event = await events.expect(executor=first, state="released", code="killed")
        assert event.session == session.id
    with pytest.raises(flame.ExecutorNotFound, match=f"no executor '{first}' lives here; these do: {done.executor}"):
        cluster.kill_executor(first)


async def test_a_node_is_lost_and_its_sessions_go_on_elsewhere() -> None:
    async with MemoryCluster(nodes=2, clock=VirtualClock()) as cluster:
        await cluster.register(Echo, max_instances=1)
        async with cluster.events() as events:
            session = await cluster.create_session("Echo")
            task = await session.create_task("sleep 100")
            lost = await events.expect(task=task, state="running")
            node = (await events.expect(executor=lost.executor, state="bound")).node
            await cluster.lose_node(node)
            assert (await task).executor != lost.executor
            await events.expect(node=node, state="unknown")
        with pytest.raises(flame.NodeNotFound, match="no node 'node9'; there are node1, node2"):
            await cluster.lose_node("node9")


async def test_a_session_ends_when_nobody_uses_it(cluster: MemoryCluster) -> None:
    await cluster.register(Echo, idle_timeout_s=1800, delay_release_s=60)
    async with cluster.events() as events:
        session = await cluster.create_session("Echo")
        await session.invoke("x")
        await clock_of(cluster).advance(120)
        assert cluster.executors == []
        events.refute(session=session, state="closed")
        await events.expect(session=session, state="closed", code="idle_timeout", within_s=2000)


async def test_a_connection_can_be_interrupted(cluster: MemoryCluster) -> None:
    await cluster.register(Echo)
    session = await cluster.create_session("Echo")
    task = await session.create_task("sleep 5")
    cluster.server.interrupt()
    await asyncio.sleep(1)
    cluster.server.restore()
    assert (await task).output == b"sleep 5"


async def test_a_clock_that_stands_still_hinders_neither_start_nor_stop() -> None:
    clock = VirtualClock(auto=False)
    async with MemoryCluster(clock=clock) as cluster:
        assert not clock.auto
        await cluster.register(Echo)
        session = await cluster.create_session("Echo")
        task = await session.create_task("sleep 10")
        await clock.advance(9.9)
        assert not task.done()
        await clock.advance(1)
        assert task.done()
        await session.create_task("sleep 1000")


async def test_a_service_that_can_not_be_made_fails_its_session(cluster: MemoryCluster) -> None:
    def broken() -> Echo:
        raise LookupError("no key")

    await cluster.register(broken, session_retry_limit=2)
    async with cluster.events() as events:
        session = await cluster.create_session("broken")
        with pytest.raises(flame.TaskFailed, match="LookupError: no key"):
            await session.invoke("x")
        assert len(events.matching(noun="executor", session=session, state="released")) == 2


async def test_a_service_that_never_enters_or_leaves_is_ended_in_time(cluster: MemoryCluster) -> None:
    class Slow(flame.FlameService):
        async def on_session_enter(self, context: flame.SessionContext) -> None:
            if context.common_data == b"enter":
                await asyncio.sleep(10_000)

        async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
            return context.input

        async def on_session_leave(self) -> None:
            await asyncio.sleep(10_000)

    await cluster.register(Slow, session_retry_limit=1)
    async with cluster.events() as events:
        entering = await cluster.create_session("Slow", b"enter")
        task = await entering.create_task("x")
        failed = await events.expect(session=entering, state="failed", within_s=400)
        assert "on_session_enter took longer than 300 s" in failed.reason
        assert (await task.finished()).state is flame.TaskState.FAILED
        leaving = await cluster.create_session("Slow")
        await leaving.invoke("x")
        await leaving.close(timeout_s=60)
        released = await events.expect(noun="executor", session=leaving, state="released")
        assert "on_session_leave took longer than 10 s" in released.reason


async def test_an_application_without_a_service_here_says_so(cluster: MemoryCluster) -> None:
    await cluster.connection.register_application("strange", {"command": "python", "session_retry_limit": 1})
    session = await cluster.create_session("strange")
    with pytest.raises(flame.TaskFailed, match=r"no service in this process: register it by MemoryCluster\.register"):
        await session.invoke("x")


@pytest.mark.parametrize(
    ("service", "text"),
    [
        (object, "object has no on_task_invoke"),
        (object(), "got object; expected the class of a FlameService"),
        (7, "got int; expected the class of a FlameService"),
    ],
)
async def test_what_is_no_service_is_refused(cluster: MemoryCluster, service: object, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        await cluster.register(service, "app")


async def test_registering_is_as_strict_as_ever(cluster: MemoryCluster) -> None:
    await cluster.register(Echo)
    with pytest.raises(flame.ApplicationExists):
        await cluster.register(Echo)
    with pytest.raises(flame.InvalidName):
        await cluster.register(Echo, "no name")
    with pytest.raises(flame.InvalidArgument, match="max_instances"):
        await cluster.register(Echo, "other", max_instances=0)
    with pytest.raises(flame.InvalidArgument, match="max_instance"):
        await cluster.register(Echo, "other", max_instance=1)


async def test_it_belongs_to_its_loop(cluster: MemoryCluster) -> None:
    await cluster.register(Echo)

    async def elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="reached from the event loop that it was started in"):
            await flame.create_session("Echo")
        with pytest.raises(ConfigurationError, match="reached from the event loop that it was started in"):
            await cluster.create_session("Echo")

    await asyncio.to_thread(asyncio.run, elsewhere())


async def test_it_is_started_once() -> None:
    cluster = MemoryCluster()
    with pytest.raises(ConfigurationError, match="not started"):
        cluster.client()
    await cluster.stop()  # safe before
    async with cluster:
        pass
    await cluster.stop()
    with pytest.raises(ConfigurationError, match="make another one"):
        await cluster.start()


async def test_nothing_of_it_is_left() -> None:
    before = asyncio.all_tasks()
    async with MemoryCluster(nodes=2, clock=VirtualClock()) as cluster:
        await cluster.register(Echo)
        sessions = [await cluster.create_session("Echo") for _ in range(3)]
        tasks = [await session.create_task("sleep 100") for session in sessions]
        await sessions[0].invoke("x")
        assert not any(task.done() for task in tasks[1:])
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


# ---- events


async def test_what_is_expected_may_have_happened_or_be_to_come(cluster: MemoryCluster) -> None:
    await cluster.register(Echo)
    async with cluster.events() as events:
        session = await cluster.create_session("Echo")
        expecting = asyncio.create_task(events.expect(noun="task", session=session, state="failed"))
        good, bad = await session.create_tasks(["x", "fail y"])
        assert (await expecting).id == bad.id
        found = await events.expect(task=good, state="succeed")
        assert found.session == session.id
        await events.expect(task=bad.id, code="task_failed", reason=lambda text: "y" in text)
        assert [event.id for event in events.matching(noun="task", state="failed")] == [bad.id]
        with pytest.raises(AssertionError, match="did not happen within 3 s"):
            await events.expect(task=good, after=found, within_s=3)
        events.clear()
        assert list(events) == []


async def test_a_failure_lists_what_was_seen(cluster: MemoryCluster) -> None:
    await cluster.register(Echo)
    async with cluster.events() as events:
        with pytest.raises(AssertionError, match="nothing at all was seen"):
            await events.expect(session="x", state="failed", within_s=1)
        session = await cluster.create_session("Echo")
        await session.invoke("x")
        with pytest.raises(AssertionError) as failure:
            await events.expect(session=session, state="failed", within_s=5)
        first, *lines = str(failure.value).splitlines()
        assert first == f"did not happen within 5 s: state=failed, noun=session, id={session.id}"
        assert any(f"session {session.id}: open" in line for line in lines)
        assert any(": bound" in line and "node=node1" in line for line in lines)
        with pytest.raises(AssertionError, match="happened, and should not have: state=open"):
            events.refute(session=session, state="open")


async def test_a_question_that_has_no_answer_is_refused(cluster: MemoryCluster) -> None:
    async with cluster.events() as events:
        with pytest.raises(TypeError, match=r"events have no stat; they have .*state"):
            await events.expect(session="x", stat="failed")
        with pytest.raises(TypeError, match="expected one of application, session, executor, node, task, got 'job'"):
            events.refute(noun="job")
        with pytest.raises(TypeError, match="nothing to look for"):
            events.matching()


async def test_a_log_can_be_of_one_session(cluster: MemoryCluster) -> None:
    await cluster.register(Echo)
    one, two = [await cluster.create_session("Echo") for _ in range(2)]
    async with cluster.events(session=one.id) as events:
        await asyncio.gather(one.invoke("x"), two.invoke("x"))
        await events.expect(noun="task", state="succeed")
        assert {event.session for event in events} == {one.id}


async def test_a_log_says_why_it_hears_nothing_more(cluster: MemoryCluster) -> None:
    client = cluster.client()
    async with EventLog(client) as events:
        await client.close()
        with pytest.raises(flame.BrokerUnavailable, match="the connection was closed"):
            await events.expect(session="x")


# ---- the package


def test_every_name_is_there_and_documented() -> None:
    for name in flame.testing.__all__:
        value = getattr(flame.testing, name)
        assert value.__doc__, name
        members = [getattr(value, member) for member in vars(value) if not member.startswith("_")]
        assert all(member.__doc__ for member in members if callable(member)), name
    assert set(flame.testing.__all__) <= set(dir(flame.testing))
    with pytest.raises(AttributeError, match="no attribute 'Cluster'"):
        _ = flame.testing.Cluster


def test_the_package_loads_no_programs_until_they_are_asked_for() -> None:
    code = (
        "import sys, flame, flame.testing, flame.testing.plugin, flame.testing.clock;"
        "assert not [m for m in sys.modules if m.startswith(('flame_services', 'nats', 'pydantic'))];"
        "from flame.testing import MemoryCluster; assert 'flame_services.testing' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_a_real_cluster_that_is_not_started_says_so() -> None:
    cluster = EmbeddedCluster()
    await cluster.stop()
    for use in (lambda: cluster.endpoint, lambda: cluster.folder):
        with pytest.raises(ConfigurationError, match="EmbeddedCluster: not started"):
            use()
    with pytest.raises(ConfigurationError, match="is no file; expected the script of a service"):
        await cluster.register("nothing.py")
