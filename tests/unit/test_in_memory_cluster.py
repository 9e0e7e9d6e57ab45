"""What a cluster makes of trouble, in virtual time: nothing that a client does may leave somebody waiting for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import flame
from flame.broker.memory import Faults, MemoryServer
from flame.errors import BrokerUnavailable, FlameError, InternalError, MalformedMessage, TaskCancelled, TaskFailed
from flame.protocol import defaults, subjects
from flame.protocol.api import (
    LOOK_UP_LIMIT,
    ApplicationPage,
    Info,
    List,
    LookUpTasks,
    Named,
    OpenSession,
    TaskLooks,
    Verb,
    answer_ok,
)
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord, TaskMessage
from flame.protocol.records import ApplicationRecord, ApplicationSpec
from flame.protocol.states import SessionState, TaskState
from flame_services.scheduler.recorder import Writing
from flame_services.scheduler.settle import settle_tasks
from tests.support.memory_cluster import MemoryCluster
from tests.support.virtual_time import run_virtually

SWEPT_S = 45.0
"""By then the sweep has been by several times."""


class Echo:
    """Does what its input says: text comes back, a number is slept, what begins with ! is raised."""

    def __init__(self) -> None:
        self.running = 0

    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        text = context.input.decode()
        if text.startswith("!"):
            raise ValueError(text[1:])
        self.running += 1
        try:
            if text.startswith("sleep "):
                await asyncio.sleep(float(text.split()[1]))
        finally:
            self.running -= 1
        return context.input


def virtually(
    limit_s: float = 3600.0,
) -> Callable[[Callable[[MemoryCluster], Coroutine[Any, Any, None]]], Callable[[], None]]:
    """Run a test in virtual time with a cluster of its own."""

    def decorate(test: Callable[[MemoryCluster], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def main() -> None:
            async with MemoryCluster(MemoryServer(), Echo) as cluster:
                await test(cluster)

        def run() -> None:
            run_virtually(main(), limit_s=limit_s)

        run.__name__ = run.__qualname__ = test.__name__
        return run

    return decorate


def now() -> float:
    return asyncio.get_running_loop().time()


# ---- tasks that no client of ours would store


@virtually()
async def test_a_task_with_an_illegal_name_does_not_keep_its_session_from_ending(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application(max_instances=1))
    busy = await session.create_task("sleep 30")
    await asyncio.sleep(1.0)
    strange = subjects.task(session.application, session.id, "ü")
    await client.broker.store(strange, TaskMessage(b"x").encode(), 5.0)
    waiting = await session.create_task("waits")
    begun = now()
    await session.close(timeout_s=300)
    assert now() - begun < 60
    assert (await busy).output == b"sleep 30"
    with pytest.raises(TaskCancelled):
        await waiting
    stored = await client.broker.last(
        subjects.result_stream(session.application), subjects.result(session.application, session.id, "ü")
    )
    assert stored is not None
    assert ResultRecord.decode(stored.data).state is TaskState.CANCELLED


@virtually()
async def test_a_task_with_an_illegal_name_runs_and_hinders_no_other(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    strange = subjects.task(session.application, session.id, "ü")
    await client.broker.store(strange, TaskMessage(b"x").encode(), 5.0)
    assert (await session.invoke("after it", timeout_s=60)).output == b"after it"


@virtually()
async def test_tasks_of_unknown_sessions_get_their_records_whatever_lies_beside_them(cluster: MemoryCluster) -> None:
    client = cluster.client()
    application = await cluster.application()
    names = [("unknown", "t"), ("ü", "t"), ("unknown", "ü")]
    for session_id, task in names:
        await client.broker.store(subjects.task(application, session_id, task), TaskMessage(b"x").encode(), 5.0)
    await asyncio.sleep(SWEPT_S)
    for session_id, task in names:
        subject = subjects.result(application, session_id, task)
        record = await client.broker.last(subjects.result_stream(application), subject)
        assert record is not None, subject
        assert ResultRecord.decode(record.data).state is TaskState.CANCELLED
    assert (await client.broker.stream_state(subjects.task_stream(application))).messages == 0


@virtually()
async def test_a_task_that_is_none_gets_a_record_and_the_next_one_runs(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    await client.broker.store(subjects.task(session.application, session.id, "t"), b"rubbish", 5.0)
    assert (await session.invoke("next", timeout_s=60)).output == b"next"
    task = await session.get_task("t")
    assert task.state is TaskState.FAILED
    assert task.error is not None
    assert task.error.code == ErrorCode.INVALID_ARGUMENT


# ---- sessions that nobody looks after


@virtually()
async def test_a_session_whose_binding_was_removed_by_hand_is_served_again(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    await session.invoke("first", timeout_s=60)
    (key,) = cluster.view.sessions[session.id].bindings
    await client.broker.bucket(subjects.BINDINGS).delete(key)
    await asyncio.sleep(5.0)
    assert (await session.invoke("second", timeout_s=SWEPT_S)).output == b"second"


@virtually()
async def test_a_step_that_can_not_be_finished_is_not_tried_without_end(cluster: MemoryCluster) -> None:
    client = cluster.client()
    application = await cluster.application()
    session = await client.create_session(application)
    tried = 0
    carry_out = cluster._planner._carrier.carry_out

    async def counted(step: Any) -> Any:
        nonlocal tried
        tried += 1
        return await carry_out(step)

    cluster._planner._carrier.carry_out = counted  # type: ignore[method-assign]
    for stream in (subjects.task_stream(application), subjects.result_stream(application)):
        await client.broker.delete_stream(stream)
    await client.close_session(session.id)
    await asyncio.sleep(20.0)
    assert 2 <= tried <= 60


# ---- answers of the control API


@virtually()
async def test_many_large_results_come_in_answers_that_can_be_sent(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    record = ResultRecord(TaskState.SUCCEED, b"x" * (defaults.INLINE_LIMIT_BYTES - 200)).encode()
    tasks = [f"t{n}" for n in range(100)]
    for task in tasks:
        await client.broker.store(subjects.result(session.application, session.id, task), record, 5.0)
    found: set[str] = set()
    asked = tuple(tasks)
    for _ in range(20):
        request = LookUpTasks(application=session.application, session=session.id, tasks=asked)
        looks = await client.call(Verb.LOOK_UP_TASKS, request, TaskLooks)
        assert len(answer_ok(looks)) < defaults.MAX_PAYLOAD_BYTES
        assert looks.results
        assert set(looks.results) | set(looks.unread) == set(asked)
        found |= set(looks.results)
        asked = looks.unread
        if not asked:
            break
    assert found == set(tasks)


@virtually()
async def test_long_lists_come_in_answers_that_can_be_sent(cluster: MemoryCluster) -> None:
    client = cluster.client()
    for n in range(60):
        name = f"large{n:02}"
        spec = ApplicationSpec(command="-", description="x" * 300_000)
        cluster.view.put_application(name, ApplicationRecord(name=name, spec=spec, created=1.0))
    page = await client.call(Verb.LIST_APPLICATIONS, List(), ApplicationPage)
    assert page.more
    assert len(answer_ok(page)) < defaults.MAX_PAYLOAD_BYTES
    names = [application.name for application in await client.list_applications()]
    assert names == sorted(cluster.view.applications)


@virtually()
async def test_an_answer_that_is_too_large_is_refused_and_not_left_out(cluster: MemoryCluster) -> None:
    spec = ApplicationSpec(command="-", description="x" * (defaults.MAX_PAYLOAD_BYTES + 1))
    cluster.view.put_application("huge", ApplicationRecord(name="huge", spec=spec, created=1.0))
    with pytest.raises(
        InternalError, match=r"get_application: an answer of 8\d+ bytes is more than a message may hold"
    ):
        await cluster.client().get_application("huge")


@virtually()
async def test_a_task_with_an_illegal_name_is_listed_like_any_other(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    strange = subjects.task(session.application, session.id, "ü")
    await client.broker.store(strange, TaskMessage(b"sleep 100").encode(), 5.0)
    assert [task.id for task in await session.list_tasks()] == ["ü"]
    await session.close(timeout_s=300)
    assert [task.state for task in await session.list_tasks()] == [TaskState.SUCCEED]


@virtually()
async def test_a_session_whose_record_can_not_be_read_is_refused_and_not_asked_for_without_end(
    cluster: MemoryCluster,
) -> None:
    client = cluster.client()
    application = await cluster.application()
    await client.broker.bucket(subjects.SESSIONS).put("unreadable", b"rubbish")
    create = flame.SessionSpec(application=application).request("unreadable")
    with pytest.raises(FlameError) as refusal:
        await client.call(Verb.OPEN_SESSION, OpenSession(id="unreadable", create=create), TaskLooks)
    assert "unreadable" in str(refusal.value)
    assert "recursion" not in str(refusal.value)


@virtually()
async def test_an_illegal_id_leaves_no_common_data_behind(cluster: MemoryCluster) -> None:
    client = cluster.client()
    application = await cluster.application()
    request = flame.SessionSpec(application=application, common_data=b"secret").request("legal")
    for wrong in ("a.b", "a b"):
        with pytest.raises(flame.InvalidName):
            await client.call(Verb.CREATE_SESSION, request.model_copy(update={"id": wrong}), TaskLooks)
    assert await client.broker.bucket(subjects.COMMON_DATA).entries() == []


# ---- clients


@virtually()
async def test_a_closed_connection_refuses_everything_at_once(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    await client.close()
    begun = now()
    calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
        lambda: session.invoke("x"),
        lambda: session.create_task("x"),
        lambda: session.get_task("t"),
        session.close,
        client.list_sessions,
        client.info,
        lambda: client.create_session(session.application),
        lambda: client.open_session(session.id),
    ]
    for call in calls:
        with pytest.raises(BrokerUnavailable, match="closed"):
            await call()
    assert now() - begun < 1.0


@virtually()
async def test_closing_a_connection_ends_every_wait_at_once(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application(concurrency=3))
    waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(session.invoke("sleep 600")) for _ in range(3)]
    await asyncio.sleep(10.0)
    waits.append(asyncio.ensure_future(session.close()))
    await asyncio.sleep(10.0)
    assert not any(wait.done() for wait in waits)
    begun = now()
    await client.close()
    ends = await asyncio.gather(*waits, return_exceptions=True)
    assert all(isinstance(end, BrokerUnavailable) for end in ends), ends
    assert now() - begun < 2.0


@virtually()
async def test_a_client_goes_on_asking_after_a_fault_of_the_scheduler(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    cluster.server.faults = Faults(lose_live=1.0)  # nobody hears of the end
    cluster.scheduler.last = _fails_once(cluster.scheduler.last)  # type: ignore[method-assign]
    assert (await session.invoke("x", timeout_s=120)).output == b"x"


def _fails_once(method: Any) -> Any:
    failed = False

    async def wrapped(*arguments: Any) -> Any:
        nonlocal failed
        if not failed:
            failed = True
            raise RuntimeError("a fault of the scheduler")
        return await method(*arguments)

    return wrapped


@virtually()
async def test_an_answer_that_can_not_be_read_is_a_flame_error(cluster: MemoryCluster) -> None:
    # Another version might answer like this: what is expected here is not in it.
    with pytest.raises(MalformedMessage, match=r"the answer to get_application: version: Field required"):
        await cluster.client().call(Verb.GET_APPLICATION, Named(name="flmping"), Info)


@virtually(limit_s=36_000)
async def test_one_missed_end_among_very_many_tasks_is_learned_of_all_the_same(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application(concurrency=1000, max_instances=1))
    tasks = [await session.create_task("sleep 20000") for _ in range(10 * LOOK_UP_LIMIT)]
    await asyncio.sleep(300.0)  # by now it asks as rarely as it ever does
    missed = tasks[-1]
    record = ResultRecord(TaskState.SUCCEED, b"by somebody else").encode()
    cluster.server.faults = Faults(lose_live=1.0)
    other = cluster.server.connect("other")
    await other.store(subjects.result(session.application, session.id, missed.id), record, 5.0)
    await other.purge(
        subjects.task_stream(session.application), subjects.task(session.application, session.id, missed.id)
    )
    begun = now()
    async with asyncio.timeout(10_000):
        assert (await missed).output == b"by somebody else"
    assert now() - begun < 10 * 5.0 + 70.0


@virtually()
async def test_what_ended_while_the_connection_was_gone_is_learned_soon_after_it_is_back(
    cluster: MemoryCluster,
) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    await session.invoke("warm", timeout_s=60)
    task = await session.create_task("sleep 1")
    await asyncio.sleep(0.5)
    link = cluster.broker_of(client)
    cluster.server.interrupt(link)
    await asyncio.sleep(2.0)
    cluster.server.restore(link)
    begun = now()
    async with asyncio.timeout(60):
        await task
    assert now() - begun < 2.0


# ---- executors


@virtually()
async def test_a_count_of_attempts_that_can_not_be_read_stops_no_task(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application())
    subject = subjects.task(session.application, session.id, "t")
    await client.broker.bucket(subjects.ATTEMPTS).put(subjects.task_key(subject), b"rubbish")
    await client.broker.store(subject, TaskMessage(b"x", again=True).encode(), 5.0)
    assert (await session.invoke("next", timeout_s=60)).output == b"next"
    await asyncio.sleep(20.0)
    assert (await session.get_task("t")).output == b"x"


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_service_that_raises_fails_its_task_and_goes_on(concurrency: int) -> None:
    @virtually()
    async def test(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application(concurrency=concurrency))
        for n in range(10):
            with pytest.raises(TaskFailed, match=f"no {n}"):
                await session.invoke(f"!no {n}", timeout_s=60)
        assert (await session.invoke("yes", timeout_s=60)).output == b"yes"
        assert len(cluster.view.sessions[session.id].bindings) == 1

    test()


@virtually()
async def test_tasks_run_at_once_up_to_the_concurrency_and_the_session_ends_in_order(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application(concurrency=3, max_instances=1))
    begun = now()
    tasks = [await session.create_task("sleep 10") for _ in range(6)]
    async with asyncio.timeout(120):
        await asyncio.gather(*tasks)
    assert 20 <= now() - begun < 25
    await session.close(timeout_s=60)
    assert session.state is SessionState.CLOSED


# ---- settling


class Racing:
    """A connection on which a task is stored after each look at what waits."""

    def __init__(self, broker: Any, store: Callable[[], Coroutine[Any, Any, None]], times: int) -> None:
        self._broker = broker
        self._store = store
        self._left = times

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._broker, name)
        if name not in ("stream_state", "subjects"):
            return method

        async def then_store(*arguments: Any) -> Any:
            found = await method(*arguments)
            if self._left:
                self._left -= 1
                await self._store()
            return found

        return then_store


@pytest.mark.parametrize("times", [1, 2, 3, 4, 7])
def test_no_task_is_removed_without_its_record_however_late_it_was_stored(times: int) -> None:
    @virtually()
    async def test(cluster: MemoryCluster) -> None:
        broker = cluster.server.connect("test")
        application = await cluster.application()
        stored: list[str] = []

        async def store() -> None:
            stored.append(f"t{len(stored)}")
            await broker.store(subjects.task(application, "s", stored[-1]), TaskMessage(b"x").encode(), 5.0)

        racing: Any = Racing(broker, store, times)
        async with asyncio.timeout(60):
            await settle_tasks(racing, Writing(racing), application, "s", None)
            await settle_tasks(broker, Writing(broker), application, "s", None)
        assert len(stored) == times
        for task in stored:
            record = await broker.last(subjects.result_stream(application), subjects.result(application, "s", task))
            assert record is not None, task

    test()
