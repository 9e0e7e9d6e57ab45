"""The manager's side of a process that somebody has started by hand: what it is told, and that it is never killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from flame.broker.memory import MemoryServer
from flame.protocol import defaults, subjects, topology
from flame.protocol.attaching import END, GONE, LEAVE
from flame.protocol.records import ApplicationRecord, ApplicationSpec, BindingRecord, SessionRecord
from flame.protocol.states import ExecutorState
from flame.protocol.supervision import LEAVE as TO_LEAVE
from flame.protocol.supervision import SERVE, ExecutorReport
from flame_services.executor_manager import attached as module
from flame_services.executor_manager import reasons
from flame_services.executor_manager.attached import Attached, AttachedExecutor, AttachedPlace
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.keeper import LeaseKeeper
from tests.support.cluster import alive, eventually

BINDING = BindingRecord(executor="x1", node="n", application="app", session="s", epoch=1, consumer="s-1", created=1.0)


class Node:
    """A node of one process, which does nothing by itself."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()  # it handles signals from now on
        self.channel, other = socket.socketpair()
        self.channel.settimeout(10)
        self.attached = Attached("app", "w1", self.process.pid, other)
        broker = self.broker = MemoryServer().connect("manager")
        self.place = AttachedPlace("n", broker, Consumers(broker), LeaseKeeper(broker, folder), self.attached)

    async def start(self) -> None:
        for bucket in topology.buckets():
            await self.broker.ensure_bucket(bucket)
        for stream in topology.application_streams("app"):
            await self.broker.ensure_stream(stream)
        application = ApplicationRecord(name="app", spec=ApplicationSpec(command="x"), created=1.0)
        await self.broker.bucket(subjects.APPLICATIONS).create("app", application.encode())
        session = SessionRecord(id="s", application="app", created=1.0, epoch=1)
        await self.broker.bucket(subjects.SESSIONS).create("s", session.encode())

    async def stop(self) -> None:
        self.attached.close()
        self.channel.close()
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        await self.broker.close()

    def bind(self, **changes: object) -> AttachedExecutor:
        executor = AttachedExecutor(self.place, BINDING.changed(**changes))
        executor.start()
        return executor

    def report(self, state: ExecutorState, *, pid: int | None = None) -> ExecutorReport:
        return ExecutorReport(state, self.process.pid if pid is None else pid, patient=True)

    async def bound(self) -> AttachedExecutor:
        """Return an executor that takes tasks."""
        executor = self.bind()
        assert await self.attached.wait_in("w1", self.report(ExecutorState.IDLE))
        for state in (ExecutorState.IDLE, ExecutorState.BOUND):
            orders = await executor.report(self.report(state))
            assert orders.want == SERVE
        return executor


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setattr(module, "ASK_S", 0.05)
    monkeypatch.setattr(module, "HOLD_S", 0.05)
    monkeypatch.setattr(defaults, "TASK_STOP_S", 0.05)
    made = Node(tmp_path)
    await made.start()
    yield made
    await made.stop()


async def released(executor: AttachedExecutor) -> AttachedExecutor:
    async with asyncio.timeout(10):
        await executor.released.wait()
    return executor


async def test_it_waits_for_its_session_and_gets_its_name_with_it(node: Node) -> None:
    idle = node.report(ExecutorState.IDLE)
    assert not await node.attached.wait_in("w1", idle)
    executor = node.bind()
    assert await node.attached.wait_in("w1", idle)
    orders = await executor.report(idle)
    assert (orders.want, orders.executor, orders.folder) == (SERVE, "x1", "")
    assert orders.assignment is not None
    assert orders.assignment.session == "s"
    assert executor.life.record.started == "attached"
    assert (await executor.report(node.report(ExecutorState.IDLE, pid=os.getpid()))).want == TO_LEAVE


async def test_a_session_of_another_application_is_refused_through_no_fault_of_its_own(node: Node) -> None:
    refused = (await released(node.bind(application="other"))).life.record
    assert (refused.clean, refused.entered, refused.code) == (False, False, "unbound")
    assert refused.reason == "node n serves no application but app"
    executor = node.bind()
    assert await node.attached.wait_in("w1", node.report(ExecutorState.IDLE))
    assert not executor.released.is_set()


async def test_a_second_session_is_refused(node: Node) -> None:
    await node.bound()
    refused = (await released(node.bind(executor="x2"))).life.record
    assert (refused.code, refused.reason) == ("unbound", "node n serves one session only, and has had it")


async def test_a_session_that_has_ended_meanwhile_leaves_the_process_free(node: Node) -> None:
    assert (await released(node.bind(epoch=7))).life.record.clean
    await node.bound()


async def test_it_is_asked_to_end_by_force_and_then_let_go_of_but_not_killed(node: Node) -> None:
    executor = await node.bound()
    node.process.send_signal(signal.SIGSTOP)  # a breakpoint
    executor.force()
    await released(executor)
    assert node.channel.recv(64) == END
    assert alive(node.process.pid)
    assert psutil.Process(node.process.pid).status() == psutil.STATUS_STOPPED
    node.process.send_signal(signal.SIGCONT)
    assert await asyncio.to_thread(node.process.wait, 10) == -signal.SIGTERM


async def test_it_is_asked_first_and_that_is_enough(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK_S", 60.0)
    executor = await node.bound()
    executor.terminate(reasons.mute(1), 60.0)
    assert (await executor.report(node.report(ExecutorState.BOUND))).want == TO_LEAVE
    assert (await executor.report(node.report(ExecutorState.UNBINDING))).want == TO_LEAVE
    await executor.report(node.report(ExecutorState.RELEASED))
    node.channel.send(GONE)
    await released(executor)
    assert executor.life.record.clean
    assert alive(node.process.pid)


async def test_nothing_ends_it_that_takes_its_time(node: Node) -> None:
    executor = await node.bound()
    executor.end_stuck(reasons.mute(1))
    executor.end_if_mute()
    executor.leave()
    assert (await executor.report(node.report(ExecutorState.UNBINDING))).want == TO_LEAVE
    await asyncio.sleep(0.3)  # longer than any limit of these tests
    assert not executor.released.is_set()
    node.channel.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        assert node.channel.recv(64) == b"", "it was told to end"


@pytest.mark.parametrize("entered", [True, False])
async def test_a_process_that_has_died_is_noticed(node: Node, *, entered: bool) -> None:
    executor = await node.bound() if entered else node.bind()
    await eventually(lambda: executor.life.record.started, "it was started")
    node.process.kill()
    await released(executor)
    record = executor.life.record
    assert (record.clean, record.entered, record.code) == (not entered, entered, "exited")
    assert record.reason == "the process that was attached for it has ended"
    assert node.attached.over.is_set()


async def test_a_process_that_leaves_before_it_has_entered_blames_nobody(node: Node) -> None:
    executor = node.bind()
    await eventually(lambda: executor.life.record.started, "it was started")
    node.channel.send(GONE)
    record = (await released(executor)).life.record
    assert (record.clean, record.code) == (True, "manager_stopped")


async def test_it_says_that_it_wants_to_leave_and_goes_on_until_then(node: Node) -> None:
    node.channel.send(LEAVE + b"?")
    await eventually(node.attached.over.is_set, "it is heard")
    assert node.attached.leaves
    assert not node.attached.ended.is_set()
    node.channel.shutdown(socket.SHUT_WR)
    await eventually(node.attached.ended.is_set, "it is gone")


async def test_one_that_waits_when_the_manager_stops_is_told_to_leave(node: Node) -> None:
    node.attached.stop_waiting()
    assert await node.attached.wait_in("w1", node.report(ExecutorState.IDLE))
    assert node.attached.given == {}
