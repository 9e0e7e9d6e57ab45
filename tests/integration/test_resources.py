"""What executors may use of their node, and for how long; the tests write what a scheduler would."""

from __future__ import annotations

import asyncio
import itertools
import os
import re

import psutil
import pytest

from flame.protocol import subjects
from flame.protocol.codes import ErrorCode, ReasonCode
from flame.protocol.messages import ResultRecord, TaskFault
from flame.protocol.records import ExecutorRecord
from flame.protocol.resources import Resources
from flame.protocol.states import ExecutorState, TaskState
from flame.protocol.supervision import Control as ControlMessage
from flame_services.executor_manager.stops import FOLLOW_S
from tests.support.node import APP, Control, until
from tests.support.rogue import SMALL, ask, lost, notes, result, serve, store, waiting

MEBIBYTE = 1024**2


class TestMemory:
    async def test_a_node_says_how_it_is_held(self, control: Control) -> None:
        await control.manager()
        record = await control.node()
        assert record is not None
        assert (record.memory_by, record.cpu_by) == ("watch", "affinity")

    async def test_a_node_says_that_it_is_not_held(self, control: Control) -> None:
        await control.manager(hold_memory=False, hold_cpu=False)
        record = await control.node()
        assert record is not None
        assert (record.memory_by, record.cpu_by) == ("none", "none")
        await serve(control, resources=Resources(cpu=1, memory=MEBIBYTE))
        assert await ask(control, "t1", "echo", 1) == 1
        await ask(control, "t2", "hog", 64, 1.0)

    @pytest.mark.parametrize("fresh", [False, True])
    async def test_of_one_that_takes_too_much_what_runs_fails_and_what_waits_runs_elsewhere(
        self, control: Control, fresh: bool
    ) -> None:
        await control.manager()
        await serve(control, fresh_process=fresh)
        await ask(control, "t0", "echo", 0)
        await store(control, "t1", "hog", 200)
        await store(control, "t2", "echo", 2)
        record = await result(control, "t1")
        assert record.state is TaskState.FAILED
        assert record.error is not None
        assert record.error.code == ErrorCode.OUT_OF_MEMORY
        assert re.fullmatch(r"its executor used \d{3}m of memory, asked for 128m", record.error.message)
        assert (record.executor, record.attempt) == ("e1", 1)
        assert record.started > 0

        ended = await control.released()
        assert (ended.clean, ended.entered, ended.code) == (False, True, ReasonCode.OUT_OF_MEMORY)
        assert re.match(r"used \d{3}m of memory, asked for 128m", ended.reason)
        assert await lost(control, "t1") == 0
        assert await waiting(control) == {"t2"}
        await control.bind("e2", resources=SMALL)
        assert (await result(control, "t2")).attempt == 1

    async def test_a_session_that_is_entered_with_too_much_is_not_entered(self, control: Control) -> None:
        await control.manager()
        await serve(control, enter=("hog", 200))
        ended = await control.released()
        assert (ended.clean, ended.entered, ended.code) == (False, False, ReasonCode.OUT_OF_MEMORY)
        assert re.match(r"used \d{3}m of memory, asked for 128m", ended.reason)

    async def test_children_count(self, control: Control) -> None:
        await control.manager()
        await serve(control, resources=Resources(cpu=0.1, memory=256 * MEBIBYTE))
        await store(control, "t1", "hog_in_children", 100, 3)
        record = await result(control, "t1")
        assert record.error is not None
        assert record.error.code == ErrorCode.OUT_OF_MEMORY

    async def test_what_a_template_has_loaded_does_not_count(self, control: Control) -> None:
        await control.manager()
        await serve(control, "has loaded much", resources=Resources(cpu=0.1, memory=64 * MEBIBYTE))
        assert (await control.reaches(ExecutorState.BOUND)).started == "forked"
        await ask(control, "t1", "hog", 16, 1.0)
        assert await ask(control, "t2", "read_what_was_loaded") == 112 * MEBIBYTE
        await store(control, "t3", "hog", 80)
        record = await result(control, "t3")
        assert record.error is not None
        assert record.error.code == ErrorCode.OUT_OF_MEMORY

    async def test_one_that_asks_for_none_may_use_what_there_is(self, control: Control) -> None:
        await control.manager()
        await serve(control, resources=Resources())
        await ask(control, "t1", "hog", 200, 1.0)


class TestProcessors:
    @pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one processor only")
    async def test_one_that_asks_for_a_whole_one_has_it_and_no_other(self, control: Control) -> None:
        await control.manager()
        await serve(control, resources=Resources(cpu=1, memory=128 * MEBIBYTE))
        await control.reaches(ExecutorState.BOUND)

        for number in itertools.count():
            processors = (await ask(control, f"t{number}", "who"))["processors"]
            if len(processors) == 1:
                break
            assert number < 100
            await asyncio.sleep(0.05)  # it is confined soon after its start

    async def test_one_that_asks_for_a_part_shares_all(self, control: Control) -> None:
        await control.manager()
        await serve(control)
        await ask(control, "t1", "sleep", 0.5)
        assert (await ask(control, "t2", "who"))["processors"] == sorted(os.sched_getaffinity(0))


class TestGpus:
    @pytest.mark.parametrize("fresh", [False, True])
    async def test_each_belongs_to_one_executor(self, control: Control, fresh: bool) -> None:
        await control.manager(gpu="0,2,5")
        record = await control.node()
        assert record is not None
        assert record.capacity.gpu == 3
        one, two, none = (Resources(cpu=0.1, memory=128 * MEBIBYTE, gpu=count) for count in (1, 2, 0))
        await serve(control, resources=two, fresh_process=fresh, concurrency=1)
        assert await ask(control, "t1", "who") | {"pid": 0, "processors": []} == {
            "pid": 0,
            "processors": [],
            "gpus": "0,2",
            "order": "PCI_BUS_ID",
        }
        await control.bind("e1", resources=two, leave=True)
        await control.released("e1")
        await control.bind("e2", resources=one)
        await control.reaches(ExecutorState.BOUND, "e2")
        await control.bind("e3", resources=one)
        await control.reaches(ExecutorState.BOUND, "e3")
        await control.bind("e4", resources=none)
        await control.reaches(ExecutorState.BOUND, "e4")
        given = [psutil.Process(pid).environ() for pid in await pids(control, "e2", "e3", "e4")] if fresh else None
        if given is not None:
            assert [variables["CUDA_VISIBLE_DEVICES"] for variables in given] == ["0", "2", ""]

        await control.bind("e5", resources=two)
        await asyncio.sleep(0.3)  # it waits for a second one
        assert await control.record("e5") is None
        await control.bind("e2", resources=one, leave=True)
        await control.reaches(ExecutorState.BOUND, "e5")

    async def test_a_node_without_any_sets_nothing(self, control: Control) -> None:
        await control.manager(gpu=0)
        await serve(control, environments={"CUDA_VISIBLE_DEVICES": "mine"})
        assert (await ask(control, "t1", "who"))["gpus"] == "mine"

    async def test_what_can_never_be_given_is_refused(self, control: Control) -> None:
        await control.manager(gpu=1)
        await serve(control, resources=Resources(gpu=2))
        ended = await control.released()
        assert (ended.code, ended.reason) == (
            ReasonCode.STARTING_REFUSED,
            "its session needs gpu=2; this node has 1",
        )


async def pids(control: Control, *executors: str) -> list[int]:
    found: list[ExecutorRecord | None] = [await control.record(executor) for executor in executors]
    return [record.pid for record in found if record is not None]


class TestRunsThatDoNotStop:
    """The executor would stop them itself if it could; these don't let it."""

    @pytest.mark.parametrize("how", [("block", 600), ("insist",)], ids=lambda how: how[0])
    async def test_one_over_its_time_fails_and_counts_no_attempt(
        self, control: Control, monkeypatch: pytest.MonkeyPatch, how: tuple[object, ...]
    ) -> None:
        monkeypatch.setattr("flame.protocol.defaults.TASK_STOP_S", 0.5)
        await control.manager()
        await serve(control, timeout_s=1.0)
        await ask(control, "t0", "echo", 0)
        await store(control, "t1", *how)
        await store(control, "t2", "echo", 2)
        record = await result(control, "t1")
        assert (record.state, record.executor, record.attempt) == (TaskState.FAILED, "e1", 1)
        assert record.error is not None
        assert (record.error.code, record.error.type) == (ErrorCode.TASK_TIMEOUT, "TaskTimeout")
        ended = await control.released()
        assert (ended.clean, ended.code) == (False, ReasonCode.TASK_STUCK)
        assert ended.reason.startswith("task t1 is over its time and did not stop within 0.5 s")
        assert await lost(control, "t1") == 0
        await control.bind("e2", resources=SMALL)
        assert (await result(control, "t2")).attempt == 1
        assert await waiting(control) == set()

    @pytest.mark.parametrize("how", [("block", 600), ("insist",)], ids=lambda how: how[0])
    async def test_one_that_was_cancelled_ends_with_its_process(
        self, control: Control, monkeypatch: pytest.MonkeyPatch, how: tuple[object, ...]
    ) -> None:
        monkeypatch.setattr("flame.protocol.defaults.TASK_STOP_S", 0.5)
        await control.manager()
        await serve(control)
        await store(control, "t1", *how)
        await until(lambda: f"ran {how[0]} 1" in notes(control), "it runs")
        await asyncio.sleep(FOLLOW_S + 0.2)
        await cancel(control, "t1")
        ended = await control.released()
        assert (ended.clean, ended.code) == (False, ReasonCode.TASK_STUCK)
        assert ended.reason.startswith("task t1 was cancelled and did not stop within 0.5 s")
        assert await lost(control, "t1") == 0
        assert await waiting(control) == set()

    async def test_one_that_was_cancelled_before_its_session_is_followed_ends_too(
        self, control: Control, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flame.protocol.defaults.TASK_STOP_S", 0.5)
        await control.manager()
        await serve(control)
        await store(control, "t1", "block", 600)
        await until(lambda: "ran block 1" in notes(control), "it runs")
        await cancel(control, "t1")
        assert (await control.released()).code == ReasonCode.TASK_STUCK

    async def test_nobody_ends_a_task_that_has_no_record(
        self, control: Control, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flame.protocol.defaults.TASK_STOP_S", 0.2)
        await control.manager()
        await serve(control)
        await store(control, "t1", "block", 3)
        await until(lambda: "ran block 1" in notes(control), "it runs")
        for _ in range(4):
            await control.broker.publish(subjects.control(APP, "s1"), ControlMessage(cancel=("t1",)).encode())
            await asyncio.sleep(0.5)
        record = await result(control, "t1")
        assert (record.state, record.attempt) == (TaskState.SUCCEED, 1)

    async def test_what_runs_when_a_session_is_closed_by_force(
        self, control: Control, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flame.protocol.defaults.TASK_STOP_S", 0.5)
        await control.manager()
        await serve(control)
        await store(control, "t1", "block", 600)
        await until(lambda: "ran block 1" in notes(control), "it runs")
        await control.bind(leave=True, resources=SMALL)
        await asyncio.sleep(1.0)  # running tasks may finish
        record = await control.record()
        assert record is not None
        assert record.state is not ExecutorState.RELEASED
        await control.bind(leave=True, force=True, resources=SMALL)
        ended = await control.released()
        assert (ended.clean, ended.code) == (False, ReasonCode.TASK_STUCK)
        assert await lost(control, "t1") == 0

    async def test_entering_ends_at_once_when_a_session_is_closed_by_force(self, control: Control) -> None:
        await control.manager()
        await serve(control, enter=("sleep", 600))
        await control.reaches(ExecutorState.BINDING)
        await control.bind(leave=True, force=True)
        ended = await control.released(limit_s=8)
        assert (ended.clean, ended.reason) == (True, "its session was closed by force")


async def cancel(control: Control, task: str) -> None:
    """Do what the control side does."""
    fault = TaskFault(ErrorCode.TASK_CANCELLED, "not wanted any more")
    record = ResultRecord(TaskState.CANCELLED, error=fault)
    await control.broker.store(subjects.result(APP, "s1", task), record.encode(), 5)
    await control.broker.purge(subjects.task_stream(APP), subjects.task(APP, "s1", task))
    await control.broker.publish(subjects.control(APP, "s1"), ControlMessage(cancel=(task,)).encode())
