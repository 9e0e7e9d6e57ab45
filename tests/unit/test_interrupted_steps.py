"""Steps of a scheduler that is killed between any two of its operations, and finished by the next one."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from flame.broker.memory import MemoryServer
from flame.errors import FlameError
from flame.protocol import subjects, topology
from flame.protocol.api import CancelTasks
from flame.protocol.messages import ResultRecord, TaskMessage
from flame.protocol.records import (
    ApplicationRecord,
    ApplicationSpec,
    BindingRecord,
    ExecutorRecord,
    NodeRecord,
    SessionRecord,
)
from flame.protocol.resources import Resources
from flame.protocol.states import CloseMode, ExecutorState, NodeState, SessionState, TaskState
from flame_services.scheduler.carry import Carrier
from flame_services.scheduler.cluster import found_cluster
from flame_services.scheduler.control_api.applications import Applications
from flame_services.scheduler.control_api.cancel import Cancel
from flame_services.scheduler.control_api.sessions import Sessions
from flame_services.scheduler.counts import count_tasks
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.steps import Step
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View
from tests.support.virtual_time import run_virtually

TASKS = [f"t{number:02}" for number in range(12)]
LONGEST = 200
"""Operations; no step takes so many."""


class Killed(FlameError):
    """The scheduler is gone: it does nothing more."""


class Mortal:
    """A connection, or a bucket of it, that ends before or after so many operations; what follows is refused."""

    def __init__(self, inner: Any, left: list[int], *, too_late: bool) -> None:
        self._inner = inner
        self._left = left
        self._too_late = too_late

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name == "bucket":
            return lambda bucket: Mortal(found(bucket), self._left, too_late=self._too_late)
        return self._counted(found) if inspect.iscoroutinefunction(found) else found

    def _counted(self, method: Any) -> Any:
        async def counted(*arguments: Any, **options: Any) -> Any:
            self._left[0] -= 1
            if self._left[0] < 0 or (self._left[0] == 0 and not self._too_late):
                raise Killed("killed")
            done = await method(*arguments, **options)
            if self._left[0] == 0:
                raise Killed("killed")
            return done

        return counted


class Scheduler:
    """The parts that carry steps out, for one life."""

    def __init__(self, server: MemoryServer, name: str, operations: int = 10**9, *, too_late: bool = False) -> None:
        self.left = [10**9]
        self._operations = operations
        self.broker: Any = Mortal(server.connect(name), self.left, too_late=too_late)
        self.view = View()
        self.store = Store(self.broker, self.view)
        self.recorder = Recorder(self.broker, self.store, name)
        self.carrier = Carrier(self.broker, self.view, self.store, self.recorder, lambda _: None, 15.0)
        applications = Applications(self.broker, self.view, self.store, 1)
        self.cancel = Cancel(self.broker, Sessions(self.broker, self.view, self.store, applications), self.recorder)

    async def start(self) -> None:
        await self.store.start()
        self.left[0] = self._operations

    @property
    def killed(self) -> bool:
        return self.left[0] <= 0


Setting = Callable[[MemoryServer], Coroutine[Any, Any, None]]
Act = Callable[[Scheduler], Coroutine[Any, Any, object]]
Check = Callable[[Scheduler], Coroutine[Any, Any, None]]


def interrupted_everywhere(prepare: Setting, act: Act, check: Check) -> None:
    """Kill the first scheduler at each of its operations in turn, have a second one finish, and check."""

    async def once(operations: int, too_late: bool) -> bool:
        server = MemoryServer()
        await prepare(server)
        first = Scheduler(server, "first", operations, too_late=too_late)
        await first.start()
        with contextlib.suppress(Killed):
            await act(first)
        killed = first.killed
        second = Scheduler(server, "second")
        await second.start()
        second.carrier.start()
        await act(second)
        await asyncio.sleep(60.0)
        await second.carrier.stop()
        await check(second)
        return killed

    for too_late in (False, True):
        for operations in itertools.count(1):
            assert operations < LONGEST
            if not run_virtually(once(operations, too_late)):
                break
        assert operations >= 4


async def _session(server: MemoryServer, record: SessionRecord) -> None:
    broker = server.connect("setting")
    await found_cluster(broker, 1)
    for stream in topology.application_streams("app", 1):
        await broker.ensure_stream(stream)
    application = ApplicationRecord(name="app", spec=ApplicationSpec(command="-", session_retry_limit=1), created=1.0)
    await broker.bucket(subjects.APPLICATIONS).create("app", application.encode())
    await broker.bucket(subjects.SESSIONS).create(record.id, record.encode())
    for task in TASKS:
        await broker.store(subjects.task("app", record.id, task), TaskMessage(b"x").encode(), 5.0)


async def _bound(server: MemoryServer, node: str, executor: ExecutorRecord) -> None:
    broker = server.connect("setting")
    key = subjects.executor_key(node, executor.id)
    binding = BindingRecord(
        executor=executor.id, node=node, application="app", session="s", epoch=executor.epoch,
        consumer=subjects.consumer("s", executor.epoch), created=1.0,
    )  # fmt: skip
    await broker.bucket(subjects.BINDINGS).create(key, binding.encode())
    await broker.bucket(subjects.EXECUTORS).create(key, executor.encode())


async def _ran(server: MemoryServer, executor: str, tasks: list[str], state: TaskState = TaskState.SUCCEED) -> None:
    broker = server.connect("setting")
    for task in tasks:
        await broker.store(
            subjects.result("app", "s", task), ResultRecord(state, executor=executor, finished=1.0).encode(), 5.0
        )
        await broker.purge(subjects.task_stream("app"), subjects.task("app", "s", task))


def _executor(name: str, **fields: Any) -> ExecutorRecord:
    told = {"epoch": 1, "state": ExecutorState.RELEASED, "clean": False, "entered": True, **fields}
    return ExecutorRecord(id=name, node="n", application="app", session="s", created=1.0, updated=1.0, **told)


async def _counts(scheduler: Scheduler) -> tuple[int, int, int, int]:
    (info,) = await count_tasks(scheduler.broker, scheduler.view, [scheduler.view.sessions["s"]])
    return info.pending + info.running, info.succeeded, info.failed, info.cancelled


async def _recorded(scheduler: Scheduler) -> int:
    return len(await scheduler.broker.subjects(subjects.result_stream("app"), subjects.session_results("app", "s")))


# ---- settling


@pytest.mark.parametrize("state", [SessionState.CLOSING, SessionState.FAILED])
def test_a_session_that_ends_is_settled_with_exact_counts(state: SessionState) -> None:
    async def prepare(server: MemoryServer) -> None:
        await _session(server, SessionRecord(id="s", application="app", state=state, created=1.0, succeeded=2))
        await _ran(server, "x", TASKS[:2])

    async def act(scheduler: Scheduler) -> None:
        while scheduler.view.sessions["s"].unsettled and not scheduler.killed:
            await scheduler.carrier.carry_out(Step("s", settle=True))

    async def check(scheduler: Scheduler) -> None:
        left = len(TASKS) - 2
        failed = state is SessionState.FAILED
        assert await _counts(scheduler) == (0, 2, left if failed else 0, 0 if failed else left)
        assert await _recorded(scheduler) == len(TASKS)
        record = scheduler.view.sessions["s"].record
        assert record.settled
        assert (record.writer, record.written_from) == ("", 0)
        assert record.state is (SessionState.FAILED if failed else SessionState.CLOSED)

    interrupted_everywhere(prepare, act, check)


# ---- cancelling


def test_cancelled_tasks_are_counted_exactly() -> None:
    async def prepare(server: MemoryServer) -> None:
        await _session(server, SessionRecord(id="s", application="app", created=1.0, succeeded=1))
        await _ran(server, "x", TASKS[:1])

    async def act(scheduler: Scheduler) -> None:
        await scheduler.cancel.cancel_tasks(CancelTasks(session="s", tasks=tuple(TASKS[:6])))

    async def check(scheduler: Scheduler) -> None:
        assert await _counts(scheduler) == (len(TASKS) - 6, 1, 0, 5)
        assert await _recorded(scheduler) == 6
        assert scheduler.view.sessions["s"].record.writer == ""

    interrupted_everywhere(prepare, act, check)


# ---- executors


def test_an_executor_that_did_not_end_in_order_is_counted_once() -> None:
    async def prepare(server: MemoryServer) -> None:
        await _session(server, SessionRecord(id="s", application="app", epoch=1, created=1.0))
        await _ran(server, "x", TASKS[:2])
        counted_to = (await server.connect("setting").stream_state(subjects.result_stream("app"))).last_sequence
        await _ran(server, "other", TASKS[2:4])
        await _ran(server, "x", TASKS[4:5])
        await _ran(server, "x", TASKS[5:6], TaskState.FAILED)
        await _bound(server, "n", _executor("x", succeeded=2, counted_to=counted_to))

    async def act(scheduler: Scheduler) -> None:
        while "n.x" in scheduler.view.bindings and not scheduler.killed:
            await scheduler.carrier.carry_out(Step("s", reap=["n.x"]))

    async def check(scheduler: Scheduler) -> None:
        assert await _counts(scheduler) == (len(TASKS) - 6, 3, 1, 0)
        assert scheduler.view.bindings == {}

    interrupted_everywhere(prepare, act, check)


def test_an_attempt_to_enter_is_counted_once() -> None:
    async def prepare(server: MemoryServer) -> None:
        await _session(server, SessionRecord(id="s", application="app", epoch=1, created=1.0))
        await _bound(
            server, "n", _executor("x", entered=False, reason="ValueError: no\ntraceback", code="enter_failed")
        )

    async def act(scheduler: Scheduler) -> None:
        while "n.x" in scheduler.view.bindings and not scheduler.killed:
            await scheduler.carrier.carry_out(Step("s", reap=["n.x"]))

    async def check(scheduler: Scheduler) -> None:
        record = scheduler.view.sessions["s"].record
        assert (record.state, record.bind_failures) == (SessionState.FAILED, 1)
        assert (record.reason, record.code) == ("ValueError: no\ntraceback", "enter_failed")
        assert record.ended == 0.0  # not before its tasks have their records

    interrupted_everywhere(prepare, act, check)


def test_executors_of_a_lost_node_can_not_go_on_and_the_session_is_served_again() -> None:
    async def prepare(server: MemoryServer) -> None:
        await _session(server, SessionRecord(id="s", application="app", epoch=1, created=1.0))
        broker = server.connect("setting")
        await broker.create_consumer(topology.session_consumer("app", "s", 1, 8, 15.0))
        node = NodeRecord(
            name="m", hostname="-", arch="-", os="-", capacity=Resources(cpu=4, memory=2**34), started=1.0
        )  # fmt: skip
        await broker.bucket(subjects.NODES).put("m", node.encode())
        await _ran(server, "x", TASKS[:3])
        await _bound(server, "n", _executor("x", state=ExecutorState.BOUND, succeeded=2))
        living = _executor("y", state=ExecutorState.BOUND).changed(node="m")
        await _bound(server, "m", living)

    async def act(scheduler: Scheduler) -> None:
        view = scheduler.view
        assert view.nodes["m"].state is NodeState.READY
        while "n.x" in view.bindings and not scheduler.killed:
            await scheduler.carrier.carry_out(Step("s", replace=True, leave=["m.y"]))
        while not any(b.epoch > 1 for b in view.bindings.values()) and not scheduler.killed:
            await scheduler.carrier.carry_out(Step("s", bind=["m"]))

    async def check(scheduler: Scheduler) -> None:
        record = scheduler.view.sessions["s"].record
        (consumer,) = await scheduler.broker.consumers(subjects.task_stream("app"))
        assert consumer.name == subjects.consumer("s", record.epoch)
        (new,) = (b for b in scheduler.view.bindings.values() if not b.leave)
        assert (new.epoch, new.consumer) == (record.epoch, consumer.name)
        assert new.fence >= len(TASKS)
        assert await _counts(scheduler) == (len(TASKS) - 3, 3, 0, 0)

    interrupted_everywhere(prepare, act, check)


def test_what_a_lost_executor_stores_later_is_counted_when_its_session_is_at_rest() -> None:
    async def main() -> None:
        server = MemoryServer()
        await _session(server, SessionRecord(id="s", application="app", epoch=1, created=1.0))
        await _ran(server, "x", TASKS[:2])
        await _bound(server, "n", _executor("x", state=ExecutorState.BOUND))
        scheduler = Scheduler(server, "only")
        await scheduler.start()
        assert await scheduler.carrier.carry_out(Step("s", replace=True))
        await _ran(server, "x", TASKS[2:3])
        await _ran(server, "y", TASKS[3:7])
        await _bound(server, "n", _executor("y", clean=True, succeeded=4))
        await asyncio.sleep(1.0)
        for _ in range(2):
            assert await scheduler.carrier.carry_out(Step("s", reap=["n.y"]))
            assert await _counts(scheduler) == (len(TASKS) - 7, 7, 0, 0)
        await _ran(server, "x", TASKS[7:9])
        await scheduler.store.sessions.change(
            "s", lambda record: record.changed(state=SessionState.CLOSING, close_mode=CloseMode.CLOSE)
        )
        assert await scheduler.carrier.carry_out(Step("s", settle=True))
        assert await _counts(scheduler) == (0, 9, 0, len(TASKS) - 9)
        assert scheduler.view.sessions["s"].record.strays == {}

    run_virtually(main())
