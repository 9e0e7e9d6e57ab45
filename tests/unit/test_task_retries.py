"""Tasks that run again, later, or not at all: after the service raised, delayed ones, and those that came too late."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import flame
from flame.broker.memory import Faults
from flame.protocol import defaults, subjects
from flame.protocol.codec import VERSION, pack
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import Attempts, TaskMessage
from flame.protocol.states import TaskState
from tests.support.lone_executor import APPLICATION, SESSION, LoneExecutor
from tests.support.virtual_time import run_virtually


class Service:
    """Raises as often as the input says and then returns which attempt it is; keeps when it was called."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = {}

    async def on_task_invoke(self, context: flame.TaskContext) -> str:
        calls = self.calls.setdefault(context.task_id, [])
        calls.append(now())
        if context.input.startswith(b"sleep"):
            await asyncio.sleep(float(context.input[5:]))
        elif len(calls) <= int(context.input or 0):
            raise ValueError("not yet")
        return str(context.attempt)


def now() -> float:
    return asyncio.get_running_loop().time()


def virtually(test: Callable[[LoneExecutor, Service], Awaitable[None]], **assignment: Any) -> None:
    async def main() -> None:
        service = Service()
        async with LoneExecutor(service, **assignment) as executor:
            await test(executor, service)

    run_virtually(main())


# ---- again


def test_a_task_whose_service_raises_runs_again_as_often_as_it_may() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a", b"2")
        record = await executor.record("a")
        assert (record.state, record.output, record.attempt) == (TaskState.SUCCEED, b"3", 3)
        first, second, third = service.calls["a"]
        assert 0.5 <= second - first <= 1.1
        assert 1.0 <= third - second <= 2.1
        await executor.ask("b", b"9")
        record = await executor.record("b")
        assert (record.state, record.attempt) == (TaskState.FAILED, 4)
        assert record.error is not None
        assert (record.error.code, record.error.type) == (ErrorCode.TASK_FAILED, "ValueError")
        assert len(service.calls["b"]) == 4
        report = await executor.leave()
        assert (report.succeeded, report.failed) == (1, 1)
        assert await executor.waiting() == 0

    virtually(test, max_attempts=4, retry_backoff_s=1.0)


def test_a_task_runs_once_if_nobody_says_otherwise_and_as_often_as_it_says_itself() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("once", b"1")
        assert (await executor.record("once")).state is TaskState.FAILED
        await executor.ask("twice", b"1", max_attempts=2)
        assert (await executor.record("twice")).attempt == 2
        assert len(service.calls["once"]) == 1
        assert await executor.attempts("once") == Attempts()

    virtually(test)


def test_only_what_is_to_be_retried_is() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a", b"1")
        assert (await executor.record("a")).state is TaskState.FAILED
        await executor.ask("b", b"sleep60", timeout_s=1)
        assert (await executor.record("b")).attempt == 3
        assert len(service.calls["b"]) == 3

    virtually(test, max_attempts=3, retry_on=("KeyError", "TaskTimeout"))


def test_a_timeout_is_not_retried_unless_it_is_asked_for() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a", b"sleep60", timeout_s=1)
        record = await executor.record("a")
        assert record.error is not None
        assert (record.error.code, record.attempt) == (ErrorCode.TASK_TIMEOUT, 1)
        assert len(service.calls["a"]) == 1

    virtually(test, max_attempts=3)


def test_others_run_while_a_task_waits_to_run_again() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a", b"1")
        await executor.ask("b", b"0")
        await executor.record("b")
        assert len(service.calls["a"]) == 1
        assert await executor.stored_record("a") is None
        assert (await executor.record("a")).attempt == 2

    virtually(test, max_attempts=2, retry_backoff_s=10.0)


def test_a_task_that_waits_to_run_again_is_run_by_whoever_serves_then() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a", b"1")
        await asyncio.sleep(1)
        assert (await executor.attempts("a")).raised == 1
        await executor.leave()
        await executor.broker.delete_consumer(executor.consumer.stream, executor.consumer.name)  # with the delay
        not_before = (await executor.attempts("a")).not_before
        async with LoneExecutor(service, executor.server, "e2", max_attempts=2, fence=100) as second:
            record = await second.record("a")
            assert (record.executor, record.attempt) == ("e2", 2)
            assert record.started >= not_before

    virtually(test, max_attempts=2, retry_backoff_s=20.0)


def test_a_lost_executor_is_an_attempt_that_is_not_counted_among_those_that_raised() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.note_attempts("a", Attempts(lost=2))
        await executor.broker.store(subjects.task(APPLICATION, SESSION, "a"), _again(b"1"), 5.0)
        record = await executor.record("a")
        assert (record.state, record.attempt) == (TaskState.SUCCEED, 4)
        noted = await executor.attempts("a")
        assert (noted.lost, noted.raised) == (2, 1)
        assert record.started >= noted.not_before > 0
        assert len(service.calls["a"]) == 2

    virtually(test, max_attempts=2)


def test_a_task_that_was_the_end_of_too_many_executors_is_given_up() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.note_attempts("a", Attempts(lost=defaults.POISON_LIMIT, raised=1))
        await executor.broker.store(subjects.task(APPLICATION, SESSION, "a"), _again(b"0"), 5.0)
        record = await executor.record("a")
        assert record.error is not None
        assert (record.state, record.error.code) == (TaskState.FAILED, ErrorCode.TASK_POISONED)
        assert (record.executor, record.started) == ("e1", 0)
        assert not service.calls
        assert (await executor.leave()).failed == 1

    virtually(test)


def _again(data: bytes) -> bytes:
    """A task that its client has stored before, perhaps: it is looked up."""
    return TaskMessage(data, again=True).encode()


def test_an_attempt_is_noted_once_although_answers_get_lost() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        tasks = [f"t{number}" for number in range(10)]
        for task in tasks:
            await executor.ask(task, b"2", delay_s=1)
        executor.server.faults = Faults(lose_store_answers=0.4, lose_stores=0.3, lose_answers=0.3)
        await asyncio.sleep(600)
        executor.server.faults = Faults()
        for task in tasks:
            assert (await executor.record(task)).attempt == 3
            assert len(service.calls[task]) == 3
        report = await executor.leave()
        assert report.succeeded == len(tasks)

    virtually(test, max_attempts=3)


def test_a_task_that_has_its_record_does_not_run_again() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("a", b"1")
        await asyncio.sleep(1)
        await executor.keep_cancelled("a")  # and nobody was told
        await asyncio.sleep(30)
        assert len(service.calls["a"]) == 1
        assert await executor.waiting() == 0
        assert (await executor.leave()).failed == 0

    virtually(test, max_attempts=2, retry_backoff_s=10.0)


# ---- later


def test_a_delayed_task_is_not_started_before_its_time() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        stored = now()
        await executor.ask("late", delay_s=30)
        await executor.ask("now")
        await executor.record("now")
        assert now() - stored < 1
        record = await executor.record("late")
        assert 30 <= now() - stored <= 31
        assert (record.attempt, record.output) == (1, b"1")
        assert len(service.calls["late"]) == 1

    virtually(test)


def test_a_delay_counts_from_when_the_task_was_stored() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("long", b"sleep25")
        stored = now()
        await executor.ask("late", delay_s=20)
        await executor.record("late")
        assert 25 <= now() - stored < 26  # its delay was over when it was its turn
        assert len(service.calls["late"]) == 1

    virtually(test)


def test_a_delayed_task_is_handed_to_the_next_executor() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        stored = now()
        await executor.ask("a", delay_s=30)
        await asyncio.sleep(5)
        await executor.leave()
        await executor.broker.delete_consumer(executor.consumer.stream, executor.consumer.name)
        async with LoneExecutor(service, executor.server, "e2", fence=100) as second:
            await second.record("a")
            assert 30 <= now() - stored <= 31

    virtually(test)


def test_an_application_can_delay_its_tasks_and_a_task_say_otherwise() -> None:
    async def test(executor: LoneExecutor, _service: Service) -> None:
        stored = now()
        await executor.ask("its")
        await executor.ask("own", delay_s=0)
        await executor.record("own")
        assert now() - stored < 1
        await executor.record("its")
        assert 10 <= now() - stored <= 11

    virtually(test, delay_s=10.0)


def test_who_waits_for_a_task_that_is_due_soon_is_not_idle() -> None:
    async def test(executor: LoneExecutor, _service: Service) -> None:
        await executor.ask("a", delay_s=40)
        await asyncio.sleep(15)
        assert executor.report is not None
        assert executor.report.idle_s > 0
        await asyncio.sleep(10)
        assert executor.report.idle_s == 0  # it is due within the time that an idle executor stays
        await executor.record("a")
        await asyncio.sleep(5)
        assert executor.report.idle_s > 0

    virtually(test, delay_release_s=20.0)


# ---- too late


def test_a_task_that_was_not_started_in_time_expires() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        await executor.ask("long", b"sleep30")
        await executor.ask("expired", expires_s=10)
        await executor.ask("good", expires_s=60)
        assert (await executor.record("good")).state is TaskState.SUCCEED
        record = await executor.record("expired")
        assert record.error is not None
        assert (record.state, record.error.code) == (TaskState.FAILED, ErrorCode.TASK_EXPIRED)
        assert record.error.message == "it was not started within 10 s"
        assert (record.executor, record.attempt, record.started) == ("e1", 0, 0)
        assert "expired" not in service.calls
        assert (await executor.leave()).failed == 1

    virtually(test)


def test_a_task_that_was_started_in_time_runs_again_afterwards() -> None:
    async def test(executor: LoneExecutor, _service: Service) -> None:
        await executor.ask("a", b"1", expires_s=5)
        record = await executor.record("a")
        assert (record.state, record.attempt) == (TaskState.SUCCEED, 2)

    virtually(test, max_attempts=2, retry_backoff_s=20.0)


def test_an_application_says_when_its_tasks_expire() -> None:
    async def test(executor: LoneExecutor, _service: Service) -> None:
        await executor.ask("long", b"sleep30")
        await executor.ask("a")
        await executor.ask("b", expires_s=0)
        assert (await executor.record("b")).state is TaskState.SUCCEED
        assert (await executor.record("a")).state is TaskState.FAILED

    virtually(test, expires_s=10.0)


# ---- bad values


def test_a_task_with_options_that_make_no_sense_fails_and_harms_no_other() -> None:
    async def test(executor: LoneExecutor, service: Service) -> None:
        fields = {"v": VERSION, "kind": "task", "input": b"", "options": {"timeout_s": "soon"}}
        await executor.broker.store(subjects.task(APPLICATION, SESSION, "bad"), pack(fields), 5.0)
        record = await executor.record("bad")
        assert record.error is not None
        assert record.error.code == ErrorCode.INVALID_ARGUMENT
        await executor.ask("good")
        assert (await executor.record("good")).state is TaskState.SUCCEED
        report = await executor.leave()
        assert (report.succeeded, report.failed, report.counted_to) == (1, 1, 2)

    virtually(test)


def test_attempts_that_cannot_be_read_do_not_stop_a_task() -> None:
    async def test(executor: LoneExecutor, _service: Service) -> None:
        key = subjects.task_key(subjects.task(APPLICATION, SESSION, "a"))
        await executor.broker.bucket(subjects.ATTEMPTS).put(key, b"rubbish")
        await executor.broker.store(subjects.task(APPLICATION, SESSION, "a"), _again(b"0"), 5.0)
        assert (await executor.record("a")).state is TaskState.SUCCEED

    virtually(test)


# ---- after a reconnect


def test_nothing_is_begun_after_a_reconnect_before_it_is_known_what_ran_elsewhere() -> None:
    """Its consumer is made again meanwhile, and hands out what it had delivered before as if for the first time."""

    async def test(executor: LoneExecutor, service: Service) -> None:
        server, broker = executor.server, executor.broker
        await executor.ask("first")
        await executor.record("first")
        server.interrupt(executor.connection)
        await broker.store(subjects.task(APPLICATION, SESSION, "a"), TaskMessage(b"0").encode(), 5.0)
        await broker.store(subjects.result(APPLICATION, SESSION, "a"), b"another's record", 5.0)
        await broker.delete_consumer(executor.consumer.stream, executor.consumer.name)
        await broker.create_consumer(executor.consumer)
        server.faults = Faults(lose_answers=1.0)  # so that it takes long to find out
        server.restore(executor.connection)
        await asyncio.sleep(1)
        server.faults = Faults()
        await executor.ask("b")
        await executor.record("b")
        assert "a" not in service.calls
        assert await executor.waiting() == 0

    virtually(test)
