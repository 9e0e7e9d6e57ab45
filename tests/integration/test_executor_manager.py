"""The executor manager with a real broker and real processes; the tests write what a scheduler would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from flame.broker.embedded import EmbeddedBroker, EmbeddedBrokerConfig
from flame.broker.errors import ConsumerMissing
from flame.broker.jetstream import connect
from flame.errors import BrokerUnavailable, ConfigurationError
from flame.protocol import subjects, topology
from flame.protocol.codes import ReasonCode
from flame.protocol.records import (
    ExecutorRecord,
    NodeRecord,
)
from flame.protocol.resources import Resources
from flame.protocol.states import ExecutorState, SessionState
from flame.protocol.supervision import LEAVE, SERVE, ExecutorReport, LogChunk, Orders
from flame_services.executor_manager.program import ExecutorManager
from tests.support.cluster import kill
from tests.support.node import APP, NODE, PATIENCE_S, Control, left_of, runs, until


class TestALife:
    async def test_from_the_binding_to_the_release(self, control: Control) -> None:
        await control.manager()
        states: list[str] = []
        watch = await control.broker.bucket(subjects.EXECUTORS).watch(
            f"{NODE}.e1", lambda entry: states.append(ExecutorRecord.decode(entry.value or b"").state.value)
        )
        runs_so: dict[str, Any] = {
            "timeout_s": 9.0,
            "expires_s": 8.0,
            "delay_s": 7.0,
            "max_attempts": 6,
            "retry_backoff_s": 5.0,
            "delay_release_s": 4.0,
        }
        await control.application(concurrency=4, max_instances=6, retry_on=("KeyError",), **runs_so)
        await control.session(common_data_key="s1.1")
        await control.bind(fence=17)
        record = await control.reaches(ExecutorState.BOUND)
        process = psutil.Process(record.pid)
        assert process.create_time() == record.process_started
        assert (record.session, record.epoch, record.application, record.entered) == ("s1", 1, APP, True)
        [[assigned]] = control.notes("assigned")
        assert Path(assigned.pop("ledger")).name == "e1.ledger"
        assert [[assigned]] == [
            [
                {
                    "application": APP,
                    "session": "s1",
                    "epoch": 1,
                    "stream": subjects.task_stream(APP),
                    "consumer": "s1-1",
                    "fence": 17,
                    "common_data": "be kind",
                    "common_data_ref": None,
                    "common_data_version": 0,
                    "credentials": {},
                    "delegations": {},
                    "concurrency": 4,
                    "max_executors": 6,
                    "ack_wait_s": 15.0,
                    "leave_timeout_s": 10.0,
                    "retry_on": ["KeyError"],
                }
                | runs_so
            ]
        ]
        counted = await until(control.record, "a record")
        assert (counted.succeeded, counted.pending, counted.running, counted.idle) == (3, 5, 1, False)

        await control.bind(fence=17, leave=True)
        record = await control.released(limit_s=5)
        assert (record.clean, record.reason, record.entered) == (True, "", True)
        assert (record.succeeded, record.failed, record.running, record.pending) == (7, 2, 0, 0)
        assert not runs(record.pid)
        expected = ["starting", "idle", "binding", "bound", "unbinding", "released"]
        await until(lambda: "released" in states, "the last state is seen")
        assert list(dict.fromkeys(states)) == expected
        assert sorted(states, key=expected.index) == states
        await watch.stop()

        await control.unbind()
        await until(lambda: gone(control), "the record is deleted with the binding")

    async def test_idleness_is_told(self, control: Control) -> None:
        await control.manager()
        await control.serve("idles")

        async def idle() -> bool:
            record = await control.record()
            return record is not None and record.idle

        await until(idle, "the record says that it is idle")

    async def test_it_starts_in_a_folder_of_its_session_with_a_small_environment(
        self, control: Control, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SECRET_OF_THE_NODE", "x")
        await control.manager()
        await control.serve(environments={"GREETING": "hello"})
        record = await control.reaches(ExecutorState.BOUND)
        folder = control.folder / "node" / "sessions" / "s1"
        assert Path(control.notes("started")[0][1]) == folder
        assert folder.stat().st_mode & 0o777 == 0o700
        variables = psutil.Process(record.pid).environ()
        assert variables["GREETING"] == "hello"
        assert "SECRET_OF_THE_NODE" not in variables
        assert "FLAME_LIFETIME_FD" not in variables
        assert variables["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
        assert os.getpgid(record.pid) == os.getsid(record.pid) == record.pid

        await control.bind("e2")
        await control.reaches(ExecutorState.BOUND, "e2")
        await control.bind("e1", leave=True)
        await control.released("e1")
        assert folder.is_dir()
        await control.bind("e2", leave=True)
        await control.released("e2")
        await until(lambda: not any((control.folder / "node" / "sessions").iterdir()), "the folder is removed")

    async def test_a_service_behind_another_program_reports_its_own_pid(self, control: Control) -> None:
        await control.manager()
        await control.serve("is wrapped")
        record = await control.reaches(ExecutorState.BOUND)
        wrapper = psutil.Process(record.pid).ppid()
        assert os.getpgid(record.pid) == wrapper
        kill(record.pid)
        record = await control.released(limit_s=5)
        assert not record.clean
        assert record.reason.startswith(f"its service, process {record.pid}, ended while bound; the command that")
        assert not runs(wrapper)

    async def test_a_foreign_value_among_the_bindings_is_ignored(self, control: Control) -> None:
        await control.manager()
        bucket = control.broker.bucket(subjects.BINDINGS)
        await bucket.put(f"{NODE}.x1", b"?")
        await bucket.put(f"{NODE}.x2", b"\x81\xa1v\x01")
        await control.serve()
        await control.reaches(ExecutorState.BOUND)
        await bucket.delete(f"{NODE}.x1")

    async def test_the_backlog_of_a_blocked_executor_is_seen(self, control: Control) -> None:
        await control.manager()
        await control.broker.create_consumer(topology.session_consumer(APP, "s1", 1, 8))
        await control.serve("blocks")
        await control.reaches(ExecutorState.BOUND)
        for number in range(30):
            await control.broker.store(subjects.task(APP, "s1", f"t{number}"), b"", 5)

        async def seen() -> bool:
            record = await control.record()
            return record is not None and record.pending == 30

        await until(seen, "the record has the backlog", limit_s=5)


async def gone(control: Control) -> bool:
    return await control.record() is None


class TestAStartThatFails:
    @pytest.mark.parametrize(
        ("spec", "reason"),
        [
            ({"command": "/no/such/program"}, "command '/no/such/program' does not exist on node here"),
            ({"command": "no-such-program"}, "command 'no-such-program' is not on the PATH of node here ("),
            ({"command": "/etc"}, "command '/etc' is not a program but a folder or a device"),
            ({"working_directory": "/no/such/folder"}, "working_directory '/no/such/folder' does not exist on node"),
            ({"working_directory": "here"}, "working_directory 'here' is not absolute"),
        ],
    )
    async def test_says_what_is_wrong(self, control: Control, spec: dict[str, Any], reason: str) -> None:
        await control.manager()
        await control.serve(**spec)
        record = await control.released(limit_s=5)
        assert record.reason.startswith(reason)
        assert record.code == ReasonCode.STARTING_REFUSED
        assert (record.clean, record.entered, record.pid) == (False, False, 0)
        await control.unbind()
        await until(lambda: gone(control), "the record is deleted with the binding")

    @pytest.mark.parametrize(
        ("text", "mode", "reason"),
        [
            ("", 0o644, "is not executable: chmod +x it on node here"),
            ("#!/no/such/interpreter", 0o755, "can't be run: the interpreter named in its first line does not exist"),
            ("?", 0o755, "can't be run: it is no program of this kind of machine, and no script with #!"),
        ],
    )
    async def test_says_what_is_wrong_with_a_file(self, control: Control, text: str, mode: int, reason: str) -> None:
        script = control.folder / "service"
        script.write_text(text)
        script.chmod(mode)
        await control.manager()
        await control.serve(command=str(script))
        assert (await control.released(limit_s=5)).reason == f"command '{script}' {reason}"

    async def test_a_service_that_dies_at_once_leaves_its_last_words(self, control: Control) -> None:
        await control.manager()
        await control.serve("dies")
        record = await control.released(limit_s=5)
        assert record.reason == (
            "exited with status 3 before it was ready\nthe end of its stderr:\nthe last words\n  of a service"
        )
        assert (record.clean, record.entered, record.code) == (False, False, ReasonCode.ENDED_EARLY)

    async def test_a_service_that_is_never_ready(self, control: Control) -> None:
        await control.manager(ready_timeout_s=1)
        await control.serve("is never ready")
        record = await control.released(limit_s=5)
        assert record.reason == "not ready within 1 s\nthe end of its stderr:\nwarming up"
        assert (record.clean, record.entered, record.code) == (False, False, ReasonCode.NOT_READY)
        assert not runs(control.notes("started")[0][0])

    async def test_a_service_that_fails_to_enter(self, control: Control) -> None:
        await control.manager()
        await control.serve("fails to enter")
        record = await control.released(limit_s=5)
        assert record.reason == "ValueError: no key\nTraceback:\n  line 1\nValueError: no key"
        assert (record.clean, record.entered, record.code) == (False, False, ReasonCode.ENTER_FAILED)
        assert control.notes("told") == [["idle", SERVE], ["binding", LEAVE]]

    async def test_a_service_that_never_enters(self, control: Control) -> None:
        await control.manager(enter_timeout_s=1)
        await control.serve("never enters")
        record = await control.released(limit_s=5)
        assert record.reason == "on_session_enter took longer than 1 s"
        assert (record.clean, record.entered, record.code) == (False, False, ReasonCode.ENTER_FAILED)

    async def test_a_report_of_somebody_elses_process_is_refused(self, control: Control) -> None:
        await control.manager()
        await control.serve(environments={"CLAIM_PID": str(os.getpid())})
        record = await control.released(limit_s=5)
        assert (record.pid, record.clean) == (0, False)
        assert control.notes("told") == [["idle", LEAVE]]

    @pytest.mark.parametrize(
        "fields", [{"epoch": 2}, {"state": SessionState.CLOSED}, {"state": SessionState.FAILED}, None]
    )
    async def test_a_binding_that_is_not_in_force_starts_nothing(
        self, control: Control, fields: dict[str, Any] | None
    ) -> None:
        await control.manager()
        await control.application()
        if fields is not None:
            await control.session(**fields)
        await control.bind()
        record = await control.released(limit_s=5)
        assert record.clean
        assert record.reason.startswith("superseded")
        assert record.code == ReasonCode.UNBOUND
        assert control.notes("started") == []

    async def test_one_that_is_to_leave_before_it_was_started_is_released_at_once(self, control: Control) -> None:
        await control.manager()
        await control.application()
        await control.session()
        await control.bind(leave=True)
        record = await control.released(limit_s=5)
        assert (record.clean, record.reason) == (True, "")
        assert control.notes("started") == []

    async def test_an_application_that_is_gone(self, control: Control) -> None:
        await control.manager()
        await control.session()
        await control.bind()
        assert (await control.released(limit_s=5)).reason == "application 'app' is not registered any more"


class TestAnEnd:
    async def test_of_a_killed_executor(self, control: Control) -> None:
        await control.manager()
        await control.serve("has children")
        record = await control.reaches(ExecutorState.BOUND)
        kill(record.pid)
        record = await control.released(limit_s=5)
        assert record.reason == "killed by signal SIGKILL while bound"
        assert (record.clean, record.entered, record.code) == (False, True, ReasonCode.KILLED)
        [[child]] = control.notes("child")
        assert not runs(child)

    @pytest.mark.parametrize("mode", ["has children", "ignores SIGTERM and blocks"])
    async def test_with_the_binding_ends_every_process(self, control: Control, mode: str) -> None:
        await control.manager()
        await control.serve(mode)
        record = await control.reaches(ExecutorState.BOUND)
        [[child]] = control.notes("child")
        assert runs(child)
        await control.unbind()
        await until(lambda: not runs(record.pid) and not runs(child), "both are gone", limit_s=8)
        await until(lambda: gone(control), "the record is deleted")

    async def test_of_one_that_does_not_leave_in_time(self, control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flame.protocol.defaults.LEAVE_TIMEOUT_S", 0.5)
        monkeypatch.setattr("flame_services.executor_manager.life.GO_S", 0.5)
        await control.manager()
        await control.serve("never leaves")
        await control.reaches(ExecutorState.BOUND)
        await control.bind(leave=True)
        record = await control.released(limit_s=8)
        assert record.reason == "on_session_leave took longer than 0.5 s"
        assert (record.clean, record.entered, record.code) == (False, True, ReasonCode.LEAVE_FAILED)

    async def test_of_one_that_lingers_after_it_has_left_is_clean(
        self, control: Control, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flame_services.executor_manager.life.GO_S", 0.5)
        await control.manager()
        await control.serve("lingers")
        await control.reaches(ExecutorState.BOUND)
        await control.bind(leave=True)
        record = await control.released(limit_s=8)
        assert (record.clean, record.reason, record.succeeded) == (True, "", 7)
        assert not runs(record.pid)

    async def test_a_blocked_executor_is_reminded_to_leave(self, control: Control) -> None:
        await control.manager()
        await control.serve("blocks")
        await control.reaches(ExecutorState.BOUND)
        nudges: list[bytes] = []
        heard = await control.broker.subscribe(subjects.control(APP, "s1"), lambda m: nudges.append(m.data))
        await control.bind(leave=True)
        await until(lambda: len(nudges) >= 3, "it is nudged again and again", limit_s=6)
        await heard.stop()

    async def test_an_unknown_executor_is_told_to_leave(self, control: Control) -> None:
        await control.manager()
        report = ExecutorReport(ExecutorState.BOUND, 1).encode()
        for body in (report, b"?"):
            answer = await control.broker.request(subjects.executor_report(NODE, "stranger"), body, 5)
            assert Orders.decode(answer).want == LEAVE


class TestALostConsumer:
    async def test_is_made_again_with_a_fence(self, control: Control) -> None:
        await control.manager()
        for number in range(3):
            await control.broker.store(subjects.task(APP, "s1", f"t{number}"), b"", 5)
        await control.serve("has lost its consumer", max_instances=3)
        await until(lambda: control.notes("repaired"), "it has an answer")
        assert control.notes("repaired")[0] == [SERVE, 3]
        state = await control.broker.consumer_state(subjects.task_stream(APP), "s1-1")
        assert state.pending == 3

    async def test_stays_lost_if_the_session_was_bound_anew(self, control: Control) -> None:
        await control.manager()
        await control.serve()
        record = await control.reaches(ExecutorState.BOUND)
        await control.session(epoch=2)
        report = ExecutorReport(ExecutorState.BOUND, record.pid, lost_consumer=True)
        answer = await control.broker.request(subjects.executor_report(NODE, "e1"), report.encode(), 5)
        assert Orders.decode(answer).want == LEAVE
        with pytest.raises(ConsumerMissing):
            await control.broker.consumer_state(subjects.task_stream(APP), "s1-1")

    async def test_is_made_once_for_all_who_miss_it(self, control: Control) -> None:
        await control.manager()
        await control.serve()
        await control.bind("e2")
        asked: list[str] = []
        heard = await control.broker.subscribe("$JS.API.CONSUMER.DURABLE.CREATE.>", lambda m: asked.append(m.subject))
        reports = []
        for executor in ("e1", "e2"):
            record = await control.reaches(ExecutorState.BOUND, executor)
            report = ExecutorReport(ExecutorState.BOUND, record.pid, lost_consumer=True)
            reports.append((subjects.executor_report(NODE, executor), report.encode()))
        answers = await asyncio.gather(*(control.broker.request(*each, 5) for each in reports * 3))
        assert {Orders.decode(answer).want for answer in answers} == {SERVE}
        assert all(Orders.decode(answer).assignment is not None for answer in answers)
        assert len(asked) == 1
        await heard.stop()


class TestOutput:
    async def test_reaches_the_log_stream_and_leaves_the_disk(self, control: Control) -> None:
        chunks: list[LogChunk] = []
        heard = await control.broker.subscribe(
            subjects.log(APP, "s1", "e1"), lambda message: chunks.append(LogChunk.decode(message.data))
        )

        def written(stream: str) -> str:
            return b"".join(chunk.data for chunk in chunks if chunk.stream == stream).decode()

        await control.manager()
        await control.serve("writes")
        await until(lambda: written("stdout").endswith("no end of line"), "all of it arrives")
        assert written("stdout") == "café is open\n" + "x" * 100_000 + "\nno end of line"
        await until(lambda: written("stderr"), "stderr arrives too")
        assert written("stderr") == "to stderr\n"
        assert max(len(chunk.data) for chunk in chunks) <= 64 * 1024
        assert all(abs(chunk.at - time.time()) < 60 for chunk in chunks)
        stored = await control.broker.stream_state(subjects.log_stream(APP))
        assert stored.messages == len(chunks)

        output = control.folder / "node" / "output"
        assert list(output.iterdir())
        await control.bind(leave=True)
        await control.released()
        await until(lambda: not list(output.iterdir()), "the files are removed")
        await heard.stop()

    async def test_that_has_no_stream_harms_nobody(self, control: Control) -> None:
        await control.broker.delete_stream(subjects.log_stream(APP))
        await control.manager()
        await control.serve("writes")
        await control.reaches(ExecutorState.BOUND)
        await control.bind(leave=True)
        assert (await control.released(limit_s=5)).clean


class TestTheNode:
    async def test_is_registered_beats_and_signs_off(self, control: Control) -> None:
        manager = await control.manager(cpu=3, memory="2g", gpu=1)
        record = await control.node()
        assert record is not None
        assert record.capacity == (3.0, 2 * 1024**3, 1)
        assert not record.stopping

        async def later() -> bool:
            now = await control.node()
            assert now is not None
            return now.beat >= record.beat + 2

        await until(later, "two heartbeats", limit_s=4)
        await manager.stop()
        await manager.stop()
        assert await control.node() is None

    async def test_has_one_manager(self, control: Control, tmp_path: Path) -> None:
        await control.manager()
        with pytest.raises(ConfigurationError, match="node 'here' is run by another executor manager"):
            await control.manager(work_dir=tmp_path / "other")

    async def test_of_two_managers_that_start_at_once_one_gives_way(self, control: Control, tmp_path: Path) -> None:
        results = await asyncio.gather(
            *(control.manager(work_dir=tmp_path / str(number)) for number in range(2)), return_exceptions=True
        )
        assert {type(result) for result in results} == {ConfigurationError, ExecutorManager}

    async def test_has_a_folder_that_no_other_manager_may_use(self, control: Control) -> None:
        await control.manager()
        with pytest.raises(ConfigurationError, match=r"work_dir .* is used by another executor manager \(process"):
            await control.manager(node="elsewhere")

    async def test_of_a_dead_manager_can_be_taken_over(self, control: Control, tmp_path: Path) -> None:
        record = NodeRecord(name=NODE, hostname="h", arch="a", os="o", capacity=Resources(1, 1, 0), started=1.0, beat=9)
        await control.broker.bucket(subjects.NODES).put(NODE, record.encode())
        await control.manager(work_dir=tmp_path / "new")
        found = await control.node()
        assert found is not None
        assert found.beat >= 10

    async def test_forgets_executors_of_an_earlier_manager_whose_bindings_went(self, control: Control) -> None:
        bucket = control.broker.bucket(subjects.EXECUTORS)
        usual = {"node": NODE, "application": APP, "session": "s1", "epoch": 1, "created": 1.0, "updated": 1.0}
        for name in ("e1", "e2"):
            record = ExecutorRecord.model_validate(usual | {"id": name, "state": ExecutorState.RELEASED})
            await bucket.put(subjects.executor_key(NODE, name), record.encode())
        await control.bind("e2")
        await control.manager()
        assert await control.record("e1") is None
        assert await control.record("e2") is not None
        assert control.notes("started", "e2") == []
        await control.unbind("e2")

        async def forgotten() -> bool:
            return await control.record("e2") is None

        await until(forgotten, "the record goes with the binding")

    async def test_needs_a_broker(self, control: Control) -> None:
        with pytest.raises(BrokerUnavailable, match="no NATS server answers"):
            await control.manager(endpoint="nats://127.0.0.1:1")

    async def test_waits_for_the_control_plane(self, tmp_path: Path) -> None:
        async with EmbeddedBroker(EmbeddedBrokerConfig(data_dir=tmp_path / "broker")) as embedded:
            broker = await connect(embedded.endpoint)
            control = Control(broker, embedded, tmp_path)
            starting = asyncio.create_task(control.manager())
            done, _ = await asyncio.wait([starting], timeout=1)
            assert not done
            await control.prepare()
            manager = await asyncio.wait_for(starting, PATIENCE_S)
            await manager.stop()
            await broker.close()


class TestTheBrokerAway:
    async def test_executors_and_heartbeats_outlive_a_restart_of_the_broker(self, control: Control) -> None:
        await control.manager()
        await control.serve()
        record = await control.reaches(ExecutorState.BOUND)
        before = await control.node()
        assert before is not None
        control.embedded.kill()
        await control.embedded.start()

        async def beats() -> bool:
            with contextlib.suppress(BrokerUnavailable):
                now = await control.node()
                return now is not None and now.beat > before.beat
            return False

        await until(beats, "heartbeats resume")
        assert runs(record.pid)
        await control.bind(leave=True)
        assert (await control.released()).clean

    async def test_time_limits_wait_for_the_broker(self, control: Control) -> None:
        await control.manager(ready_timeout_s=2)
        await control.serve("waits for a sign")
        [[pid, _]] = await until(lambda: control.notes("started"), "it runs")
        control.embedded.kill()
        await asyncio.sleep(4.5)  # the limit passes, twice
        assert runs(pid)
        await control.embedded.start()
        (control.folder / "go").touch()
        assert (await control.reaches(ExecutorState.BOUND)).pid == pid

    async def test_a_stop_without_a_broker_is_quick_and_leaves_no_process(self, control: Control) -> None:
        manager = await control.manager(stop_timeout_s=30)
        await control.serve("ignores SIGTERM and blocks")
        record = await control.reaches(ExecutorState.BOUND)
        control.embedded.kill()
        began = time.monotonic()
        await manager.stop()
        assert time.monotonic() - began < 10
        assert not runs(record.pid)
        assert left_of(control.endpoint) == []
        await control.embedded.start()


class TestTheManagerStops:
    async def test_executors_leave_in_order(self, control: Control) -> None:
        manager = await control.manager()
        await control.serve("idles")
        await control.reaches(ExecutorState.BOUND)
        await manager.stop()
        record = await control.released(limit_s=1)
        assert (record.clean, record.reason, record.entered) == (True, "", True)
        assert await control.node() is None

    async def test_running_tasks_have_the_time_that_was_set(self, control: Control) -> None:
        manager = await control.manager(stop_timeout_s=2)
        await control.serve("runs a task")
        await control.reaches(ExecutorState.BOUND)
        seen: list[NodeRecord | None] = []
        watch = await control.broker.bucket(subjects.NODES).watch(
            NODE, lambda entry: seen.append(NodeRecord.decode(entry.value) if entry.value else None)
        )
        began = time.monotonic()
        await manager.stop()
        assert 2 <= time.monotonic() - began < 8
        await until(lambda: seen[-1] is None, "the node's record is deleted")
        assert len([node for node in seen if node is not None and node.stopping]) >= 2, "it beats while it stops"
        await watch.stop()
        record = await control.released(limit_s=1)
        assert (record.clean, record.reason) == (False, "the executor manager was stopped")
        assert record.code == ReasonCode.MANAGER_STOPPED

    async def test_one_that_was_not_ready_is_not_blamed(self, control: Control) -> None:
        manager = await control.manager()
        await control.serve("is never ready")
        await control.reaches(ExecutorState.STARTING)
        await until(lambda: control.notes("started"), "it runs")
        await manager.stop()
        record = await control.released(limit_s=1)
        assert (record.clean, record.reason) == (True, "the executor manager was stopped")

    async def test_a_stop_before_a_start_does_nothing(self, control: Control) -> None:
        manager = ExecutorManager(control.settings())
        await manager.stop()

    async def test_sigterm_is_a_clean_stop(self, control: Control) -> None:
        async with control.program() as program:
            await control.serve("has children")
            await control.reaches(ExecutorState.BOUND)
            program.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(program.wait, PATIENCE_S) == 0
        assert (await control.released(limit_s=1)).clean
        assert await control.node() is None
        assert left_of(control.endpoint) == []

    async def test_the_end_of_its_owner_is_one_too(self, control: Control) -> None:
        lifetime, owner = os.pipe()
        try:
            async with control.program("--lifetime-fd", str(lifetime), pass_fds=(lifetime,)) as program:
                await control.serve()
                record = await control.reaches(ExecutorState.BOUND)
                assert psutil.Process(record.pid).environ()["FLAME_LIFETIME_FD"] == str(lifetime)
                os.close(owner)
                assert await asyncio.to_thread(program.wait, PATIENCE_S) == 0
        finally:
            os.close(lifetime)
        assert left_of(control.endpoint) == []


class TestTheManagerIsKilled:
    async def test_its_successor_ends_what_it_left(self, control: Control) -> None:
        async with control.program() as program:
            await control.serve("has children")
            await control.bind("e2")
            old = [await control.reaches(ExecutorState.BOUND, name) for name in ("e1", "e2")]
            await control.application("is never ready")
            await control.bind("e3")
            await control.reaches(ExecutorState.STARTING, "e3")
            await until(lambda: control.notes("started", "e3"), "e3 runs")
            program.kill()
            await asyncio.to_thread(program.wait)
        assert all(runs(record.pid) for record in old)
        await control.unbind("e2")

        began = time.monotonic()
        await control.manager()
        assert time.monotonic() - began < 2, "the last user of the folder is known to be dead"
        assert left_of(control.endpoint) == []
        for name in ("e1", "e3"):
            record = await control.record(name)
            assert record is not None
            assert (record.state, record.clean) == (ExecutorState.RELEASED, False)
            assert record.reason == "the executor manager was restarted"
            assert record.code == ReasonCode.MANAGER_RESTARTED
        assert await control.record("e2") is None
        await control.unbind("e1")
        await until(lambda: gone(control), "the record goes with the binding")
