"""What a client makes of answers and events, against a scheduler that says what it was told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import flame
from flame.broker.memory import MemoryServer
from flame.client.connection import Connection
from flame.errors import BrokerUnavailable, InvalidArgument, InvalidName, SessionNotFound
from flame.protocol import subjects
from flame.protocol.api import (
    LOOK_UP_LIMIT,
    CancelTasks,
    CloseSession,
    Info,
    SessionInfo,
    TaskCancels,
    Verb,
    answer_error,
    answer_ok,
)
from flame.protocol.codec import unpack
from flame.protocol.codes import ErrorCode, ReasonCode
from flame.protocol.events import ClusterEvent, Noun
from flame.protocol.messages import ResultRecord, RunningEvent, TaskFault, TaskMessage
from flame.protocol.records import ApplicationRecord, ApplicationSpec, SessionRecord
from flame.protocol.states import ApplicationState, CloseMode, ExecutorState, SessionState, TaskState
from flame.protocol.topology import application_streams
from tests.support.virtual_time import run_virtually

RECORD = SessionRecord(id="s1", application="agent", created=1.0)
APPLICATION = ApplicationRecord(name="agent", spec=ApplicationSpec(command="c"), created=1.0)


class Scheduler:
    """Answers the control API from a session's record that tests change, and publishes what they say."""

    def __init__(self, server: MemoryServer) -> None:
        self.broker = server.connect("scheduler")
        self.client = Connection(server.connect("client"))
        self.info = SessionInfo(session=RECORD)
        self.requests: list[dict[str, Any]] = []
        self.states: dict[str, TaskState] = {}
        self.on_look: Callable[[], None] = lambda: None

    async def start(self) -> None:
        for spec in application_streams("agent"):
            await self.broker.ensure_stream(spec)
        for verb in Verb:
            await self.broker.answer(subjects.api(verb), self.answer)

    async def answer(self, subject: str, data: bytes) -> bytes:
        fields = unpack(data)
        verb = Verb(subject.removeprefix(subjects.api("")))
        self.requests.append({"verb": verb, **fields})
        if verb is Verb.INFO:
            return answer_ok(Info(version="1", scheduler="one", nodes=1))
        if verb is Verb.GET_APPLICATION:
            return answer_ok(APPLICATION)
        if verb is Verb.CANCEL_TASKS:
            asked = CancelTasks.check("cancel", {name: fields[name] for name in fields if name != "v"})
            return answer_ok(
                TaskCancels(states={task: self.states[task] for task in asked.tasks if task in self.states})
            )
        if verb is Verb.CLOSE_SESSION:
            mode = CloseMode(fields.get("mode", CloseMode.CLOSE))
            if not self.info.session.settled:
                self.session(state=SessionState.CLOSING, close_mode=mode)
            return answer_ok(self.info.session)
        if verb is Verb.GET_SESSION:
            if fields["name"] != RECORD.id:
                return answer_error(SessionNotFound(f"session {fields['name']} is not known"))
            self.on_look()
            return answer_ok(self.info)
        return answer_ok(self.info.session)

    def session(self, **fields: Any) -> None:
        self.info = self.info.changed(session=self.info.session.changed(**fields))

    async def tell(self, subject: str, event: ClusterEvent) -> None:
        await self.broker.publish(subject, event.encode())


def with_scheduler(test: Callable[[Scheduler], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in virtual time with a scheduler and a client of it."""

    async def main() -> None:
        scheduler = Scheduler(MemoryServer())
        await scheduler.start()
        await test(scheduler)
        await scheduler.client.close()
        await scheduler.broker.close()

    def run() -> None:
        run_virtually(main(), limit_s=120)

    run.__name__ = run.__qualname__ = test.__name__
    return run


def event(noun: Noun, name: str, happened: str, **fields: Any) -> ClusterEvent:
    return ClusterEvent(noun=noun, id=name, event=happened, **{"state": happened, "at": 2.0, **fields})


EXECUTOR = event(
    Noun.EXECUTOR, "e1", "released", before="bound", session="s1", node="n1", code=ReasonCode.KILLED, reason="signal 9"
)


# ---- cancelling


@with_scheduler
async def test_tasks_are_cancelled_in_requests_of_no_more_than_fit(scheduler: Scheduler) -> None:
    ids = [f"t{number}" for number in range(LOOK_UP_LIMIT + 1)]
    scheduler.states = dict.fromkeys(ids[1:], TaskState.CANCELLED)
    assert await scheduler.client.cancel_tasks("s1", ids, "enough") == scheduler.states
    assert [len(request["tasks"]) for request in scheduler.requests] == [LOOK_UP_LIMIT, 1]
    assert {request["reason"] for request in scheduler.requests} == {"enough"}
    assert await scheduler.client.cancel_tasks("s1", []) == {}
    assert len(scheduler.requests) == 2


@with_scheduler
async def test_what_can_not_be_cancelled_is_refused_here(scheduler: Scheduler) -> None:
    for tasks, error, says in (
        ("t1", InvalidArgument, "expected a list of ids"),
        (["a.b"], InvalidName, "task 'a.b'"),
        ([1], InvalidName, "task 1"),
    ):
        with pytest.raises(error, match=says):
            await scheduler.client.cancel_tasks("s1", tasks)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="cancel_tasks: reason"):
        await scheduler.client.cancel_tasks("s1", ["t1"], "x" * 1001)
    assert scheduler.requests == []


@with_scheduler
async def test_a_handle_cancels_its_task_and_tells_its_state(scheduler: Scheduler) -> None:
    session = await scheduler.client.open_session("s1")
    handle = await session.create_task(b"x")
    with pytest.raises(flame.TaskNotFound, match=handle.id):
        await handle.cancel()
    scheduler.states = {handle.id: TaskState.CANCELLED}
    assert await handle.cancel("enough") is TaskState.CANCELLED
    assert scheduler.requests[-1]["tasks"] == [handle.id]
    fault = TaskFault(ErrorCode.TASK_CANCELLED, "enough")
    subject = subjects.result("agent", "s1", handle.id)
    await scheduler.broker.store(subject, ResultRecord(TaskState.CANCELLED, error=fault).encode(), 5.0)
    with pytest.raises(flame.TaskCancelled, match="enough"):
        await handle
    asked = len(scheduler.requests)
    assert await handle.cancel() is TaskState.CANCELLED
    assert len(scheduler.requests) == asked, "what has ended need not be asked about"


# ---- options


@with_scheduler
async def test_options_of_a_task_are_stored_with_it(scheduler: Scheduler) -> None:
    session = await scheduler.client.open_session("s1")
    options = flame.TaskOptions(timeout_s=5, max_attempts=3)
    handles = [await session.create_task(b"x", options=options), *(await session.create_tasks([b"y"], options=options))]
    handles.append(await session.create_task(b"z"))
    stored = []
    for handle in handles:
        message = await scheduler.broker.last(subjects.task_stream("agent"), subjects.task("agent", "s1", handle.id))
        assert message is not None
        stored.append(TaskMessage.decode(message.data).options)
    assert stored == [options, options, None]
    with pytest.raises(InvalidArgument, match=r"options: expected a flame\.TaskOptions, got dict"):
        await session.create_task(b"x", options={"timeout_s": 5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.TASK_TIMEOUT, flame.TaskTimeout),
        (ErrorCode.TASK_EXPIRED, flame.TaskExpired),
        (ErrorCode.OUT_OF_MEMORY, flame.TaskFailed),
        (ErrorCode.TASK_POISONED, flame.TaskFailed),
        (ErrorCode.TASK_FAILED, flame.TaskFailed),
    ],
)
def test_a_failed_task_raises_what_its_code_means(code: ErrorCode, kind: type[flame.TaskError]) -> None:
    task = flame.Task("t1", "s1", "agent", TaskState.FAILED, error=TaskFault(code, "the reason"))
    with pytest.raises(flame.TaskError, match="the reason") as caught:
        task.check()
    assert type(caught.value) is kind
    assert caught.value.task is task


# ---- closing


@with_scheduler
async def test_who_closes_is_told_how_far_it_is(scheduler: Scheduler) -> None:
    session = await scheduler.client.open_session("s1")
    looks = iter(range(5, -1, -1))

    def ends_soon() -> None:
        pending = next(looks, 0)
        scheduler.info = scheduler.info.changed(pending=pending)
        if pending == 0:
            scheduler.session(state=SessionState.CLOSED, settled=True)

    scheduler.on_look = ends_soon
    told: list[SessionInfo] = []
    begun = asyncio.get_running_loop().time()
    await session.close("drain", on_progress=told.append)
    assert asyncio.get_running_loop().time() - begun == pytest.approx(2.5, abs=0.6)
    assert [info.pending for info in told] == [5, 4, 3, 2, 1, 0, 0]
    assert told[-1].session.settled
    [request] = [request for request in scheduler.requests if request["verb"] is Verb.CLOSE_SESSION]
    assert CloseSession.check("close", {"id": "s1", "mode": request["mode"]}).mode is CloseMode.DRAIN


@with_scheduler
async def test_a_close_that_takes_too_long_goes_on(scheduler: Scheduler) -> None:
    session = await scheduler.client.open_session("s1")
    with pytest.raises(flame.TimedOut, match="still closing after 2 s"):
        await session.close(CloseMode.FORCE, timeout_s=2)
    scheduler.session(state=SessionState.CLOSED, settled=True)
    await session.close()
    assert session.state is SessionState.CLOSED


@with_scheduler
async def test_a_mode_that_is_none_is_refused_before_anything_is_asked(scheduler: Scheduler) -> None:
    session = await scheduler.client.open_session("s1")
    asked = len(scheduler.requests)
    for close in (session.close("now"), scheduler.client.close_session("s1", mode="now")):
        with pytest.raises(InvalidArgument, match=r"mode: .*'drain', 'close' or 'force', got 'now'"):
            await close
    assert len(scheduler.requests) == asked


# ---- events


@with_scheduler
async def test_events_are_those_of_what_was_asked_for(scheduler: Scheduler) -> None:
    client = scheduler.client
    told = {
        "session": event(Noun.SESSION, "s1", "closing", application="agent", session="s1"),
        "executor": EXECUTOR,
        "other": event(Noun.SESSION, "s2", "open", application="agent", session="s2"),
        "foreign": event(Noun.SESSION, "s3", "open", application="ping", session="s3"),
        "application": event(Noun.APPLICATION, "agent", "disabled", state=ApplicationState.DISABLED.value),
        "node": event(Noun.NODE, "n1", "ready", node="n1"),
    }
    wanted: list[tuple[str | None, str | None, set[str]]] = [
        (None, None, set(told)),
        (None, "agent", {"session", "executor", "other", "application"}),
        ("s1", None, {"session", "executor"}),
        ("s1", "agent", {"session", "executor"}),
    ]
    for session, application, names in wanted:
        async with client.events(session=session, application=application) as events:
            for name in ("session", "executor"):
                await scheduler.tell(subjects.session_events("agent", "s1"), told[name])
            await scheduler.tell(subjects.session_events("agent", "s2"), told["other"])
            await scheduler.tell(subjects.session_events("ping", "s3"), told["foreign"])
            await scheduler.tell(subjects.application_events("agent"), told["application"])
            await scheduler.tell(subjects.node_events("n1"), told["node"])
            await asyncio.sleep(1)
            await events.aclose()
            assert {found.id async for found in events} == {told[name].id for name in names}


@with_scheduler
async def test_events_of_tasks_come_if_they_are_asked_for_and_only_the_broker_ends_one(scheduler: Scheduler) -> None:
    async with scheduler.client.events(session="s1", tasks=True) as events:
        running = RunningEvent("e1", 1, 2.0)
        await scheduler.broker.publish(subjects.event("agent", "s1", "t1", "running"), running.encode())
        record = ResultRecord(TaskState.FAILED, error=TaskFault("task_failed", "no luck"), executor="e1", finished=3.0)
        for unheard in (
            subjects.event("agent", "s1", "t1", "done"),  # forged
            subjects.event("agent", "s1", "t1", "newer"),
        ):
            await scheduler.broker.publish(unheard, record.encode())
        await scheduler.broker.publish(subjects.event("agent", "s1", "t1", "running"), b"rubbish")
        await scheduler.broker.publish(subjects.session_events("agent", "s1"), b"rubbish")
        await scheduler.broker.store(subjects.result("agent", "s1", "t1"), record.encode(), 5.0)
        first, second = await anext(events), await anext(events)
        await events.aclose()
        assert [found async for found in events] == []
    assert (first.noun, first.id, first.state, first.executor, first.at) == (Noun.TASK, "t1", "running", "e1", 2.0)
    assert (second.state, second.code, second.reason, second.at) == ("failed", "task_failed", "no luck", 3.0)
    assert second.session == "s1"


@with_scheduler
async def test_events_that_can_not_be_are_refused(scheduler: Scheduler) -> None:
    with pytest.raises(InvalidName, match="'a b'"):
        scheduler.client.events(session="a b")
    with pytest.raises(InvalidName, match=r"'a\.b'"):
        scheduler.client.events(application="a.b")
    with pytest.raises(SessionNotFound, match="nope"):
        await anext(scheduler.client.events(session="nope"))
    with pytest.raises(InvalidArgument, match="session s1 is one of application agent, not of ping"):
        await anext(scheduler.client.events(session="s1", application="ping"))


@with_scheduler
async def test_who_follows_events_is_told_that_the_connection_was_closed(scheduler: Scheduler) -> None:
    events = scheduler.client.events()
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(1)
    await scheduler.client.close()
    with pytest.raises(BrokerUnavailable, match="closed"):
        await waiting
    with pytest.raises(BrokerUnavailable, match="closed"):
        await anext(events)


# ---- watching a session


@with_scheduler
async def test_a_watch_tells_of_executors_and_of_what_the_session_waits_for(scheduler: Scheduler) -> None:
    session = await scheduler.client.open_session("s1")
    watch = session.watch()
    subject = subjects.session_events("agent", "s1")
    await scheduler.tell(subject, event(Noun.SESSION, "s1", "waiting", state="open", reason="needs gpu=1"))
    retry = {"code": ReasonCode.ENTER_FAILED, "reason": "attempt 1 of 5"}
    await scheduler.tell(subject, event(Noun.SESSION, "s1", "retrying", state="open", **retry))
    await scheduler.tell(subject, EXECUTOR)
    await scheduler.tell(subject, event(Noun.EXECUTOR, "e2", "a newer state"))
    closed = RECORD.changed(state=SessionState.CLOSED, settled=True, ended=3.0, reason="nothing to do")
    scheduler.info = scheduler.info.changed(session=closed)
    await scheduler.tell(subject, event(Noun.SESSION, "s1", "closed", record=closed.encode()))
    events = [found async for found in watch]
    assert [found.kind for found in events] == ["session", "waiting", "retrying", "executor", "session"]
    assert [found.reason for found in events] == ["", "needs gpu=1", "attempt 1 of 5", "signal 9", "nothing to do"]
    executor = events[3]
    assert (executor.executor, executor.executor_state, executor.node) == ("e1", ExecutorState.RELEASED, "n1")
    assert (executor.code, events[2].code) == ("killed", "enter_failed")
    assert {found.time for found in events[1:4]} == {2.0}


@with_scheduler
async def test_a_watch_learns_of_an_end_that_it_did_not_hear(scheduler: Scheduler) -> None:
    session = await scheduler.client.open_session("s1")
    watch = session.watch()
    scheduler.session(state=SessionState.FAILED, settled=True, ended=3.0, reason="no entry")
    events = [found async for found in watch]
    assert [(found.session_state.value, found.reason) for found in events] == [("open", ""), ("failed", "no entry")]
