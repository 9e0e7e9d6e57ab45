"""Runs that are to end before they do so by themselves: over their time, cancelled, or in a session ended by force."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import flame
from flame.broker.memory import MemoryServer
from flame.protocol import subjects
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord
from flame.protocol.states import TaskState
from flame.service.tasks import LOOP_TICK_S
from tests.support.cluster import eventually
from tests.support.lone_executor import APPLICATION, SESSION, LoneExecutor
from tests.support.virtual_time import run_virtually

Invoke = Callable[[flame.TaskContext], Any]


class Service:
    """Calls what it was made with, and keeps the contexts."""

    def __init__(self, invoke: Invoke) -> None:
        self.invoke = invoke
        self.contexts: list[flame.TaskContext] = []
        self.begun = asyncio.Event()

    async def on_task_invoke(self, context: flame.TaskContext) -> Any:
        self.contexts.append(context)
        self.begun.set()
        return await self.invoke(context)


async def sleep_long(context: flame.TaskContext) -> bytes:
    """Sleep as long as the input says, an hour by default."""
    await asyncio.sleep(float(context.input or 3600))
    return b"slept"


async def swallow(_: flame.TaskContext) -> bytes:
    """Take no notice of being cancelled, but end then."""
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        return b"a value all the same"
    return b"slept"


async def fail_at_the_end(_: flame.TaskContext) -> bytes:
    """Fail while cleaning up."""
    try:
        await asyncio.sleep(3600)
    finally:
        raise RuntimeError("cleaning up failed")


def now() -> float:
    return asyncio.get_running_loop().time()


def virtually(invoke: Invoke, test: Callable[[LoneExecutor, Service], Awaitable[None]], **assignment: Any) -> None:
    async def main() -> None:
        service = Service(invoke)
        async with LoneExecutor(service, **assignment) as executor:
            await test(executor, service)

    run_virtually(main())


def is_timeout(record: ResultRecord) -> bool:
    return (
        record.state is TaskState.FAILED
        and record.error is not None
        and (record.error.code, record.error.type) == (ErrorCode.TASK_TIMEOUT, "TaskTimeout")
    )


PLACES = pytest.mark.parametrize("concurrency", [1, 3])


# ---- over their time


@PLACES
@pytest.mark.parametrize("invoke", [sleep_long, swallow, fail_at_the_end])
def test_a_run_is_stopped_at_its_limit_and_failed_whatever_it_makes_of_that(invoke: Invoke, concurrency: int) -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        begun = now()
        await executor.ask("a")
        record = await executor.record("a")
        assert is_timeout(record)
        assert record.error is not None
        assert record.error.message == "the run took longer than 2 s"
        assert (record.executor, record.attempt) == ("e1", 1)
        assert 2 <= now() - begun <= 2 + 3 * LOOP_TICK_S
        service.invoke = sleep_long
        await executor.ask("b", b"0")  # and it goes on
        assert (await executor.record("b")).output == b"slept"
        report = await executor.leave()
        assert (report.succeeded, report.failed, report.cancelled) == (1, 1, 0)
        assert await executor.waiting() == 0

    virtually(invoke, test, timeout_s=2.0, concurrency=concurrency)


def test_a_task_has_its_own_limit_or_its_applications() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("long", b"50", timeout_s=60)
        assert (await executor.record("long")).output == b"slept"
        await executor.ask("short", b"50", timeout_s=1)
        assert is_timeout(await executor.record("short"))
        await executor.ask("default", b"50")
        assert is_timeout(await executor.record("default"))
        long, short, default = service.contexts
        assert long.deadline - short.deadline == pytest.approx(60 - 1 - 50, abs=0.5)
        assert default.deadline > short.deadline
        assert [context.cancelled for context in service.contexts] == [False, True, True]

    virtually(sleep_long, test, timeout_s=10.0)


def test_a_run_without_a_limit_goes_on_for_as_long_as_it_likes() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a", b"3000")
        assert (await executor.record("a")).output == b"slept"
        assert service.contexts[0].deadline == 0.0

    virtually(sleep_long, test, timeout_s=0.0)


def test_a_time_limit_of_user_codes_own_is_not_taken_for_the_tasks() -> None:
    async def invoke(_: flame.TaskContext) -> bytes:
        try:
            async with asyncio.timeout(1):
                await asyncio.sleep(3600)
        except TimeoutError:
            return b"mine"
        return b""

    async def test(executor: LoneExecutor, _service: Service) -> None:
        await executor.ask("a")
        assert (await executor.record("a")).output == b"mine"

    virtually(invoke, test, timeout_s=10.0)


def test_a_group_of_user_codes_own_tasks_is_cancelled_with_its_run() -> None:
    ended: list[str] = []

    async def child(name: str) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(name)

    async def invoke(_: flame.TaskContext) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(child("one"))
            group.create_task(child("two"))

    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a")
        assert is_timeout(await executor.record("a"))
        assert sorted(ended) == ["one", "two"]
        service.invoke = sleep_long
        await executor.ask("b", b"0.5")
        assert (await executor.record("b")).output == b"slept"

    virtually(invoke, test, timeout_s=1.0)


# ---- cancelled


@PLACES
@pytest.mark.parametrize("invoke", [sleep_long, swallow, fail_at_the_end])
def test_a_running_task_that_is_cancelled_ends_and_is_not_counted(invoke: Invoke, concurrency: int) -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a")
        await service.begun.wait()
        begun = now()
        await executor.cancel("a", purge=False)
        service.invoke = sleep_long
        await executor.ask("b", b"0")
        await executor.record("b")
        assert now() - begun < 1
        assert (await executor.record("a")).executor == ""  # still the one of whoever cancelled it
        assert service.contexts[0].cancelled
        report = await executor.leave()
        assert (report.succeeded, report.failed, report.cancelled) == (1, 0, 0)
        assert await executor.waiting() == 0  # it was acknowledged

    virtually(invoke, test, concurrency=concurrency)


async def hold(executor: LoneExecutor, service: Service, *tasks: str) -> None:
    """Have an executor run the first of some tasks, which takes 20 s, and hold the others."""
    await executor.ask("quick", b"0.005")  # tasks as short as this are taken several at once
    await service.begun.wait()
    for number, task in enumerate(tasks):
        await executor.ask(task, b"0" if number else b"20")
    await executor.record("quick")
    await asyncio.sleep(1)
    state = await executor.broker.consumer_state(executor.consumer.stream, executor.consumer.name)
    assert state.unacknowledged == len(tasks)


def ran(service: Service) -> list[str]:
    return [context.task_id for context in service.contexts]


def test_a_held_task_that_is_cancelled_is_never_begun() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await hold(executor, service, "slow", "held", "next")
        await executor.cancel("held", "unknown", purge=False)
        assert (await executor.record("next")).state is TaskState.SUCCEED
        assert ran(service) == ["quick", "slow", "next"]
        assert await executor.waiting() == 0
        report = await executor.leave()
        assert (report.succeeded, report.failed, report.cancelled) == (3, 0, 0)

    virtually(sleep_long, test)


def test_a_task_that_is_delivered_after_it_was_cancelled_is_not_begun() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("first", b"0")
        await executor.record("first")
        await executor.cancel("a", purge=False)
        await asyncio.sleep(1)
        await executor.ask("a", b"0")
        await executor.ask("b", b"0")
        await executor.record("b")
        assert ran(service) == ["first", "b"]

    virtually(sleep_long, test)


def test_a_cancellation_that_could_not_be_heard_is_found_after_the_reconnect() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a")
        await service.begun.wait()
        executor.server.interrupt(executor.connection)
        await executor.cancel("a")
        await asyncio.sleep(1)
        assert not service.contexts[0].cancelled
        executor.server.restore(executor.connection)
        await executor.ask("b", b"0")
        await executor.record("b")
        assert service.contexts[0].cancelled

    virtually(sleep_long, test)


def test_the_first_reason_counts() -> None:
    async def slow_to_end(_: flame.TaskContext) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(3)

    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a")
        await asyncio.sleep(2.5)
        assert service.contexts[0].cancelled  # over its time, and cleaning up
        await executor.tell_to_leave(force=True)
        report = await executor.ended()
        assert is_timeout(await executor.record("a"))
        assert (report.failed, report.cancelled) == (1, 0)

    virtually(slow_to_end, test, timeout_s=2.0)


# ---- a session that is ended by force


@PLACES
@pytest.mark.parametrize("invoke", [sleep_long, swallow, fail_at_the_end])
def test_what_runs_when_a_session_is_ended_by_force_is_recorded_as_cancelled(invoke: Invoke, concurrency: int) -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a")
        await service.begun.wait()
        begun = now()
        report = await executor.leave(force=True)
        assert now() - begun < 0.1
        record = await executor.record("a")
        assert (record.state, record.executor) == (TaskState.CANCELLED, "e1")
        assert record.error is not None
        assert record.error.code == ErrorCode.TASK_CANCELLED
        assert (report.succeeded, report.failed, report.cancelled, report.counted_to) == (0, 0, 1, 1)
        assert await executor.waiting() == 0

    virtually(invoke, test, concurrency=concurrency)


def test_force_can_follow_an_order_to_leave_that_waits_for_what_runs() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a")
        await service.begun.wait()
        await executor.tell_to_leave()
        await asyncio.sleep(30)
        assert await executor.stored_record("a") is None
        report = await executor.leave(force=True)
        assert report.cancelled == 1

    virtually(sleep_long, test)


def test_what_was_held_when_a_session_is_ended_by_force_is_handed_back() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await hold(executor, service, "slow", "held", "next")
        report = await executor.leave(force=True)
        assert (report.succeeded, report.cancelled) == (1, 1)
        state = await executor.broker.consumer_state(executor.consumer.stream, executor.consumer.name)
        assert state.unacknowledged == 2
        assert await executor.waiting() == 2
        assert ran(service) == ["quick", "slow"]

    virtually(sleep_long, test)


# ---- leaving


def test_an_executor_with_nothing_to_do_leaves_at_once() -> None:
    async def test(executor: LoneExecutor, _service: Service) -> None:
        await executor.ask("a", b"0")
        await executor.record("a")
        begun = now()
        await executor.leave()
        assert now() - begun < 0.01

    virtually(sleep_long, test)


# ---- handlers that are not async: in real time, since threads are real


class Blocking:
    """Blocks its thread until it sees that it is cancelled, or for as long as it is told."""

    def __init__(self, *, obeys: bool) -> None:
        self.obeys = obeys
        self.release = threading.Event()
        self.threads = 0
        self.most = 0

    def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        self.threads += 1
        self.most = max(self.most, self.threads)
        try:
            if context.input == b"quick":
                return b"quick"
            while not self.release.wait(0.005) and not (self.obeys and context.cancelled):
                pass
            return b"a value all the same"
        finally:
            self.threads -= 1


async def test_a_handler_in_a_thread_sees_that_its_time_is_over() -> None:
    async with asyncio.timeout(20), LoneExecutor(Blocking(obeys=True), timeout_s=0.2) as executor:
        await executor.ask("a")
        assert is_timeout(await executor.record("a"))
        await executor.leave()


async def test_no_task_runs_beside_a_thread_that_does_not_end() -> None:
    service = Blocking(obeys=False)
    async with asyncio.timeout(20), LoneExecutor(service, timeout_s=0.2) as executor:
        await executor.ask("a")
        await executor.ask("b", b"quick")
        await asyncio.sleep(0.5)
        assert service.threads == 1
        assert await executor.stored_record("a") is None  # its manager would end the process
        service.release.set()
        assert is_timeout(await executor.record("a"))
        assert (await executor.record("b")).output == b"quick"
        assert service.most == 1
        await executor.leave()


async def test_a_handler_in_a_thread_sees_that_its_task_is_cancelled() -> None:
    service = Blocking(obeys=True)
    async with asyncio.timeout(20), LoneExecutor(service, concurrency=2) as executor:
        await executor.ask("a")
        await eventually(lambda: service.threads == 1, "it runs")
        await executor.cancel("a")
        await eventually(lambda: service.threads == 0, "it ends")
        report = await executor.leave()
        assert (report.succeeded, report.failed, report.cancelled) == (0, 0, 0)


async def test_a_coroutine_that_a_handler_returns_too_late_is_not_begun() -> None:
    begun = []

    class Service:
        def __init__(self) -> None:
            self.release = threading.Event()

        def on_task_invoke(self, _context: flame.TaskContext) -> Awaitable[bytes]:
            self.release.wait(10)

            async def rest() -> bytes:
                begun.append(True)
                return b""

            return rest()

    service = Service()
    async with asyncio.timeout(20), LoneExecutor(service, timeout_s=0.1) as executor:
        await executor.ask("a")
        await asyncio.sleep(0.3)
        service.release.set()
        assert is_timeout(await executor.record("a"))
        assert not begun
        await executor.leave()


# ---- what ends an executor from outside


@PLACES
def test_a_cancellation_of_the_executor_itself_is_not_taken_for_one_of_a_task(concurrency: int) -> None:
    async def main() -> None:
        service = Service(sleep_long)
        server = MemoryServer()
        async with LoneExecutor(service, server, concurrency=concurrency) as executor:
            await executor.ask("a")
            await service.begun.wait()
        broker = server.connect("look")
        assert await broker.last("flame-result-app", subjects.result(APPLICATION, SESSION, "a")) is None
        assert not service.contexts[0].cancelled

    run_virtually(main())
