"""Executors that are forked from a template, and what happens to services that can't be."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import flame
from flame.protocol import topology
from flame.protocol.records import ExecutorRecord
from flame.protocol.states import ExecutorState
from tests.support.cluster import SERVICES, Cluster, alive, eventually, executors_of, kill
from tests.support.node import APP, Control, left_of

MANAGER_OPTIONS = ("--template-idle-s", "2", "--cpu", "1000", "--memory", "1000g")
FORKED = "forked"


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def ask(session: flame.Session, verb: str, *arguments: Any) -> Any:
    task = await session.invoke(call(verb, *arguments), timeout_s=60)
    return json.loads(task.output) if task.output else None


async def executor_of(connection: flame.Connection, session: flame.Session) -> ExecutorRecord:
    """Return the one executor of a session once it is bound."""

    async def bound() -> ExecutorRecord | None:
        found = await executors_of(connection, session.id)
        return found[0] if len(found) == 1 and found[0].state is ExecutorState.BOUND else None

    record: ExecutorRecord = await eventually(bound, f"{session.id} has one executor, which is bound")
    return record


@pytest.fixture
async def register(cluster: Cluster, connection: flame.Connection) -> AsyncIterator[Any]:
    """Register the nursery under a name of the test's own, and end everything of it afterwards."""
    names: list[str] = []

    async def registered(name: str, mode: str = "", *, service: str = "nursery", **spec: Any) -> str:
        environments = {"MODE": mode} | spec.pop("environments", {})
        usual = cluster.service(service, delay_release_s=30, environments=environments)
        await connection.register_application(name, usual | spec)
        names.append(name)
        return name

    yield registered
    for name in names:
        with contextlib.suppress(flame.ApplicationNotFound):
            await connection.unregister_application(name, force=True)


def manager_of(cluster: Cluster) -> psutil.Process:
    return psutil.Process(cluster.managers["node1"].pid)


class TestAForkedExecutor:
    async def test_comes_from_a_template_that_has_loaded_the_service_once(
        self, connection: flame.Connection, cluster: Cluster, register: Any
    ) -> None:
        app = await register("forked")
        async with (
            await connection.create_session(app) as first,
            await connection.create_session(app) as second,
        ):
            one, two = await ask(first, "who"), await ask(second, "who")
            records = [await executor_of(connection, first), await executor_of(connection, second)]
        assert [record.started for record in records] == [FORKED, FORKED]
        assert [record.pid for record in records] == [one["pid"], two["pid"]]
        assert one["pid"] != two["pid"]
        assert one["parent"] == two["parent"] == one["loaded_in"] == two["loaded_in"]
        assert one["forked_in"] == one["pid"]
        assert one["group"] == one["pid"]
        assert [one["executor"], two["executor"]] == [record.id for record in records]
        assert one["template"] is None
        assert one["set_while_loading"] == "yes"
        assert Path(one["folder"]).name == first.id
        assert one["threads"] == 1
        template = psutil.Process(one["parent"])
        assert template.ppid() == manager_of(cluster).pid

    @pytest.mark.skipif(not importlib.util.find_spec("uvloop"), reason="uvloop is not installed")
    async def test_runs_the_fastest_loop_there_is(self, connection: flame.Connection, register: Any) -> None:
        async with await connection.create_session(await register("loop")) as session:
            assert (await ask(session, "who"))["loop"] == "uvloop"

    async def test_shares_no_memory_with_another(self, connection: flame.Connection, register: Any) -> None:
        app = await register("memory")
        async with (
            await connection.create_session(app) as first,
            await connection.create_session(app) as second,
        ):
            await ask(first, "set", "mine")
            assert await ask(second, "get") == "untouched"
            assert await ask(first, "get") == "mine"
        async with await connection.create_session(app) as third:
            assert await ask(third, "get") == "untouched"

    @pytest.mark.parametrize("mode", ["", "imports numpy"])
    async def test_draws_random_numbers_of_its_own(
        self, connection: flame.Connection, register: Any, mode: str
    ) -> None:
        if mode and not importlib.util.find_spec("numpy"):
            pytest.skip("numpy is not installed")
        app = await register(f"draws{len(mode)}", mode)
        sessions = [await connection.create_session(app) for _ in range(2)]
        drawn = [await ask(session, "draw") for session in sessions]
        assert len(set(drawn[0] + drawn[1])) == len(drawn[0]) + len(drawn[1])
        for session in sessions:
            assert (await executor_of(connection, session)).started == FORKED
            await session.close()

    async def test_runs_the_exit_functions_that_it_registered_and_no_others(
        self, connection: flame.Connection, register: Any, tmp_path: Path
    ) -> None:
        notes = tmp_path / "notes"
        app = await register("exits", environments={"NOTES": str(notes)})
        async with await connection.create_session(app) as session:
            who = await ask(session, "who")
        await eventually(lambda: not alive(who["pid"]), "the executor has ended")
        assert notes.read_text().splitlines() == [f"{who['pid']} its own exit function"]
        await connection.unregister_application(app)
        await eventually(lambda: not alive(who["parent"]), "the template has ended")
        assert notes.read_text().splitlines()[1:] == [f"{who['parent']} the template's exit function"]

    async def test_writes_to_files_of_its_own(self, connection: flame.Connection, register: Any) -> None:
        app = await register("writes")
        written: dict[str, list[str]] = {}
        for name in ("first", "second"):
            session = await connection.create_session(app)
            await ask(session, "print", f"{name} speaks")
            await session.close()
            async with contextlib.aclosing(connection.read_logs(session=session.id, follow=True)) as lines:
                written[name] = sorted([line.text async for line in lines])
        # What was written while the service was loaded belongs to whoever it was loaded for.
        assert written == {
            "first": ["first speaks", "first speaks", "loading"],
            "second": ["second speaks", "second speaks"],
        }

    async def test_that_is_killed_is_noticed_at_once_and_replaced(
        self, connection: flame.Connection, register: Any
    ) -> None:
        session = await connection.create_session(await register("killed"))
        before = await ask(session, "who")
        kill(before["pid"])
        after = await ask(session, "who")
        assert after["pid"] != before["pid"]
        assert after["parent"] == before["parent"]
        await session.close()

    async def test_whose_renewal_fails_has_not_entered(self, connection: flame.Connection, register: Any) -> None:
        app = await register("renews", "fails to renew", session_retry_limit=1)
        session = await connection.create_session(app)
        with pytest.raises(flame.TaskFailed, match="RuntimeError: no new identity"):
            await ask(session, "who")

    async def test_gets_common_data_that_fits_in_no_order(self, connection: flame.Connection, register: Any) -> None:
        app = await register("much")
        async with await connection.create_session(app, b"x" * 200_000) as session:
            assert (await ask(session, "who"))["forked_in"]
            assert (await executor_of(connection, session)).started == FORKED


class TestAServiceThatCanNotBeForked:
    @pytest.mark.parametrize(
        ("mode", "reason"),
        [
            ("starts a thread", "fresh: 1 other thread (ticker)"),
            ("listens", "fresh: 1 open socket (at 127.0.0.1 port "),
            ("runs a task", "fresh: 1 other asyncio task (ticking)"),
        ],
    )
    async def test_has_a_process_for_each_session_and_says_why(
        self, connection: flame.Connection, cluster: Cluster, register: Any, mode: str, reason: str
    ) -> None:
        app = await register(mode.replace(" ", "-"), mode)
        for _ in range(2):
            async with await connection.create_session(app) as session:
                who = await ask(session, "who")
                assert who["parent"] == manager_of(cluster).pid
                assert who["forked_in"] == 0
                assert who["template"] is None
                assert (await executor_of(connection, session)).started.startswith(reason)
        assert reason.removeprefix("fresh: ")[:15] in cluster.logs()

    async def test_since_its_application_says_so(
        self, connection: flame.Connection, cluster: Cluster, register: Any
    ) -> None:
        async with await connection.create_session(await register("asks", fresh_process=True)) as session:
            assert (await ask(session, "who"))["parent"] == manager_of(cluster).pid
            assert (await executor_of(connection, session)).started == "fresh: its application asks for it"

    async def test_since_it_is_in_another_language(self, connection: flame.Connection, register: Any) -> None:
        app = await register("plain", service="plain")
        pids = set()
        for word in (b"one", b"two"):
            async with await connection.create_session(app) as session:
                assert (await session.invoke(word, timeout_s=60)).output == word.upper()
                record = await executor_of(connection, session)
                assert record.started == "fresh: its service knows of no templates"
                pids.add(record.pid)
        assert len(pids) == 2

    async def test_since_it_can_not_even_be_loaded(self, connection: flame.Connection, register: Any) -> None:
        app = await register("broken", "is broken", session_retry_limit=2)
        session = await connection.create_session(app)
        with pytest.raises(flame.TaskFailed, match="this can't be loaded"):
            await ask(session, "who")


class TestSessionsThatComeWhileATemplateStarts:
    async def test_wait_for_it(self, connection: flame.Connection, register: Any) -> None:
        app = await register("slow", "takes its time")
        sessions = [await connection.create_session(app) for _ in range(4)]
        everyone = await asyncio.gather(*(ask(session, "who") for session in sessions))
        assert len({who["pid"] for who in everyone}) == 4
        assert len({who["loaded_in"] for who in everyone}) == 1
        for session in sessions:
            assert (await executor_of(connection, session)).started == FORKED
            await session.close()


class TestATemplate:
    async def test_that_is_killed_leaves_its_executors_alone(self, connection: flame.Connection, register: Any) -> None:
        app = await register("dies")
        old = await connection.create_session(app)
        before = await ask(old, "who")
        kill(before["parent"])
        await eventually(lambda: not alive(before["parent"]), "the template is dead")
        async with await connection.create_session(app) as new:
            assert (await ask(new, "who"))["pid"] != before["pid"]
            assert (await executor_of(connection, new)).started in (
                "fresh: its template died, and another one is tried later",
                "fresh: the template is gone",
            )
        assert (await ask(old, "who"))["pid"] == before["pid"]

        async def forked_again() -> bool:
            async with await connection.create_session(app) as session:
                who = await ask(session, "who")
            return bool(who["forked_in"]) and who["parent"] != before["parent"]

        await eventually(forked_again, "there is another template")
        await old.close()
        await eventually(lambda: not alive(before["pid"]), "the orphan has ended")
        assert not psutil.pid_exists(before["pid"]), "the manager has asked for its status"

    async def test_that_nobody_uses_ends(self, connection: flame.Connection, register: Any) -> None:
        app = await register("unused")
        async with await connection.create_session(app) as session:
            template = (await ask(session, "who"))["parent"]
        await eventually(lambda: not alive(template), "the template has ended")
        async with await connection.create_session(app) as session:
            who = await ask(session, "who")
        assert who["parent"] != template
        assert who["forked_in"]

    async def test_ends_with_its_registration(self, connection: flame.Connection, register: Any) -> None:
        app = await register("registered", environments={"GENERATION": "1"})
        async with await connection.create_session(app) as session:
            old = await ask(session, "who")
        await connection.unregister_application(app)
        await eventually(lambda: not alive(old["parent"]), "the template has ended")
        await register("registered", "starts a thread")
        async with await connection.create_session(app) as session:
            assert (await ask(session, "who"))["parent"] != old["parent"]
            assert (await executor_of(connection, session)).started == "fresh: 1 other thread (ticker)"

    async def test_is_replaced_when_its_application_changes(
        self, connection: flame.Connection, cluster: Cluster, register: Any
    ) -> None:
        app = await register("changes")
        async with await connection.create_session(app) as session:
            old = await ask(session, "who")
            changed = cluster.service("nursery", delay_release_s=30, environments={"NEW": "1"})
            await connection.update_application(app, changed)
            assert (await ask(session, "who"))["pid"] == old["pid"]
            async with await connection.create_session(app) as other:
                new = await ask(other, "who")
        assert new["forked_in"]
        assert new["parent"] != old["parent"]
        assert psutil.Process(new["parent"]).environ()["NEW"] == "1"
        await eventually(lambda: not alive(old["parent"]), "the old template has ended with its last executor")

    async def test_is_started_ahead_if_that_is_asked_for(self, connection: flame.Connection, register: Any) -> None:
        app = await register("ahead", "takes its time", warm_instances=1)
        loaded = await eventually(lambda: started_ahead("takes its time"), "the template was started")
        async with await connection.create_session(app) as session:
            who = await ask(session, "who")
            assert (await executor_of(connection, session)).started == FORKED
        assert who["parent"] in loaded
        await connection.unregister_application(app)
        await eventually(lambda: not alive(who["parent"]), "the template has ended")


def connected(pid: int) -> bool:
    """Whether a process has a connection, which a service makes to its broker when it has started."""
    try:
        return any(one.status == psutil.CONN_ESTABLISHED for one in psutil.Process(pid).net_connections("tcp"))
    except psutil.Error:
        return False


def started_ahead(mode: str) -> list[int]:
    """Return the processes of services in a mode whose executor is a stand-in."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            variables = process.environ()
            if variables.get("MODE") == mode and variables.get("FLAME_EXECUTOR", "").startswith("w"):
                found.append(process.pid)
    return found


class TestProcessesStartedAhead:
    async def test_serve_the_next_sessions_and_are_replaced(
        self, connection: flame.Connection, cluster: Cluster, register: Any
    ) -> None:
        app = await register("warm", "is warm", fresh_process=True, warm_instances=2)
        ahead = await eventually(
            lambda: len(found := started_ahead("is warm")) == 2 and all(map(connected, found)) and found,
            "two are started and have connected",
        )
        async with (
            await connection.create_session(app) as first,
            await connection.create_session(app, b"x" * 200_000) as second,
        ):
            everyone = [await ask(session, "who") for session in (first, second)]
            assert {who["pid"] for who in everyone} == set(ahead)
            for session, who in zip((first, second), everyone, strict=True):
                record = await executor_of(connection, session)
                assert record.started == "warm: its application asks for it"
                assert who["executor"] == record.id
                assert Path(who["folder"]).name == session.id
            task = await first.invoke(call("print", "who writes"))
            assert task.executor == everyone[0]["executor"]
            await eventually(
                lambda: len(set(started_ahead("is warm")) - set(ahead)) == 2, "two others were started in their stead"
            )
        await eventually(lambda: not set(started_ahead("is warm")) & set(ahead), "they end with their sessions")
        await connection.unregister_application(app)
        await eventually(lambda: not started_ahead("is warm"), "those that nobody needs have ended")

    async def test_is_the_one_that_turned_out_not_to_be_a_template(
        self, connection: flame.Connection, register: Any
    ) -> None:
        app = await register("turned", "starts a thread", warm_instances=1)
        [ahead] = await eventually(lambda: started_ahead("starts a thread"), "one is started")
        async with await connection.create_session(app) as session:
            assert (await ask(session, "who"))["pid"] == ahead
            assert (await executor_of(connection, session)).started == "warm: 1 other thread (ticker)"

    async def test_can_be_of_another_language(self, connection: flame.Connection, register: Any) -> None:
        app = await register("foreign", "is foreign", service="plain", warm_instances=1)
        [ahead] = await eventually(lambda: started_ahead("is foreign"), "one is started")
        async with await connection.create_session(app) as session:
            assert (await session.invoke(b"word", timeout_s=60)).output == b"WORD"
            record = await executor_of(connection, session)
        assert (record.pid, record.started) == (ahead, "warm: its service knows of no templates")


class TestAnExecutorThatIsForkedAhead:
    async def test_is_the_next_one(self, connection: flame.Connection, register: Any) -> None:
        app = await register("next")
        async with await connection.create_session(app) as first:
            who = await ask(first, "who")
            template = psutil.Process(who["parent"])
            await eventually(lambda: len(template.children()) == 2, "another one is ready")
            [ready] = {child.pid for child in template.children()} - {who["pid"]}
            async with await connection.create_session(app) as second:
                who = await ask(second, "who")
        assert who["pid"] == who["forked_in"] == ready
        assert Path(who["folder"]).name == second.id

    async def test_is_not_missed_when_it_is_killed(self, connection: flame.Connection, register: Any) -> None:
        app = await register("missed")
        async with await connection.create_session(app) as first:
            who = await ask(first, "who")
            template = psutil.Process(who["parent"])
            await eventually(lambda: len(template.children()) == 2, "another one is ready")
            [ready] = {child.pid for child in template.children()} - {who["pid"]}
            kill(ready)
            async with await connection.create_session(app) as second:
                assert (await ask(second, "who"))["parent"] == template.pid
        assert not psutil.pid_exists(ready)

    async def test_ends_with_its_template(self, connection: flame.Connection, register: Any) -> None:
        app = await register("orphans")
        async with await connection.create_session(app) as session:
            who = await ask(session, "who")
        template = psutil.Process(who["parent"])
        await eventually(lambda: [child for child in template.children() if child.pid != who["pid"]], "one is ready")
        [ready] = [child.pid for child in template.children() if child.pid != who["pid"]]
        template.kill()
        await eventually(lambda: not psutil.pid_exists(ready), "it has ended")

    async def test_is_kept_for_a_while_only(self, control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flame_services.executor_manager.stock.AHEAD_S", 0.5)
        await control.manager()
        await control.application(**nursery())
        record = await serve(control, "e1")
        template = psutil.Process(psutil.Process(record.pid).ppid())
        await eventually(lambda: len(template.children()) == 2, "another one is ready")
        await eventually(lambda: len(template.children()) == 1, "nobody needed it")
        assert (await serve(control, "e2")).started == FORKED


class TestManyForks:
    async def test_leak_nothing(self, connection: flame.Connection, cluster: Cluster, register: Any) -> None:
        app = await register("many", warm_instances=1)

        async def one() -> dict[str, Any]:
            session = await connection.create_session(app)
            who: dict[str, Any] = await ask(session, "who")
            await connection.close_session(session.id)
            return who

        async def forks(count: int) -> list[dict[str, Any]]:
            found = []
            for begin in range(0, count, 10):
                found += await asyncio.gather(*(one() for _ in range(begin, min(count, begin + 10))))
            return found

        async def at_rest() -> bool:
            """All have ended, but for the one that is ready for the next session."""
            return not await connection.list_executors() and len(template.children()) == 1

        template = psutil.Process((await one())["parent"])
        manager = manager_of(cluster)
        await forks(50)
        await eventually(at_rest, "all have ended")
        before = (template.num_fds(), manager.num_fds())
        memory = (template.memory_info().rss, manager.memory_info().rss)

        everyone = await forks(500)
        assert len({who["pid"] for who in everyone}) == 500
        assert {who["parent"] for who in everyone} == {template.pid}
        assert len({who["descriptors"] for who in everyone}) <= 3, "none inherits what is its siblings'"
        await eventually(at_rest, "all have ended")
        await eventually(lambda: (template.num_fds(), manager.num_fds()) <= before, "no descriptor is left")
        zombies = [child for child in manager.children(recursive=True) if child.status() == psutil.STATUS_ZOMBIE]
        assert zombies == []
        assert template.memory_info().rss - memory[0] < 2 * 1024**2
        assert manager.memory_info().rss - memory[1] < 8 * 1024**2


def nursery(mode: str = "") -> dict[str, Any]:
    """Return the fields of an application for `Control`."""
    return {"mode": mode, "command": sys.executable, "arguments": (str(SERVICES / "nursery.py"),)}


async def serve(control: Control, executor: str, mode: str = "") -> ExecutorRecord:
    """Bind an executor of a session of its own, and return its record when it takes tasks."""
    session = f"session-{executor}"
    await control.session(session)
    await control.broker.create_consumer(topology.session_consumer(APP, session, 1, 8))
    await control.bind(executor, session)
    return await control.reaches(ExecutorState.BOUND, executor)


class TestWhatAClientDoesNotSee:
    async def test_a_killed_executor_ends_for_a_reason(self, control: Control) -> None:
        await control.manager()
        await control.application(**nursery())
        record = await serve(control, "e1")
        assert record.started == FORKED
        template = psutil.Process(record.pid).ppid()
        kill(record.pid)
        record = await control.released("e1", limit_s=5)
        assert (record.reason, record.clean) == ("killed by signal SIGKILL while bound", False)
        assert alive(template)
        assert record.pid not in {child.pid for child in psutil.Process(template).children()}

    async def test_a_forked_executor_leaves_in_order(self, control: Control) -> None:
        await control.manager()
        await control.application(**nursery())
        await serve(control, "e1")
        await control.bind("e1", "session-e1", leave=True)
        record = await control.released("e1", limit_s=5)
        assert (record.reason, record.clean, record.entered) == ("", True, True)

    async def test_a_template_that_does_not_answer_is_ended(
        self,
        control: Control,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("flame_services.executor_manager.template.FORK_S", 0.5)
        await control.manager()
        await control.application(**nursery())
        first = await serve(control, "e1")
        template = psutil.Process(first.pid).ppid()
        os.kill(template, signal.SIGSTOP)
        second = await serve(control, "e2")
        assert second.started == "fresh: the template did not answer within 0.5 s"
        await eventually(lambda: not alive(template), "the template was ended")
        assert alive(first.pid)

    async def test_an_executor_whose_template_tells_nothing_is_given_up(self, control: Control) -> None:
        await control.manager()
        await control.application(**nursery())
        record = await serve(control, "e1")
        os.kill(psutil.Process(record.pid).ppid(), signal.SIGSTOP)
        kill(record.pid)
        record = await control.released("e1", limit_s=5)
        assert record.reason == "ended while bound; how is not known, its template being gone"

    async def test_a_template_that_is_not_ready_in_time(self, control: Control) -> None:
        await control.manager(ready_timeout_s=0.5)
        await control.application(**nursery("takes its time"))
        for executor in ("e1", "e2"):
            session = f"session-{executor}"
            await control.session(session)
            await control.bind(executor, session)
        for executor in ("e1", "e2"):
            record = await control.released(executor, limit_s=8)
            assert record.reason.startswith("not ready within 0.5 s")

    async def test_a_stop_leaves_nothing(self, control: Control) -> None:
        manager = await control.manager()
        await control.application(**nursery())
        record = await serve(control, "e1")
        assert record.started == FORKED
        await manager.stop()
        assert left_of(control.endpoint) == []
        assert list((control.folder / "node" / "templates").glob("*.*")) == [
            control.folder / "node" / "templates" / f"{APP}.log"
        ]

    async def test_the_end_of_the_cluster_is_a_templates_end(self, control: Control) -> None:
        lifetime, owner = os.pipe()
        try:
            async with control.program("--lifetime-fd", str(lifetime), pass_fds=(lifetime,)) as program:
                await control.application(**nursery())
                record = await serve(control, "e1")
                template = psutil.Process(record.pid).ppid()
                program.kill()
                await asyncio.to_thread(program.wait)
        finally:
            os.close(lifetime)
        assert alive(record.pid)
        assert alive(template)
        os.close(owner)
        await eventually(lambda: left_of(control.endpoint) == [], "template and executor have ended")

    async def test_a_managers_successor_ends_template_and_executors(self, control: Control) -> None:
        async with control.program() as program:
            await control.application(**nursery())
            record = await serve(control, "e1")
            template = psutil.Process(record.pid).ppid()
            program.kill()
            await asyncio.to_thread(program.wait)
        await control.manager()
        assert not alive(template)
        assert not alive(record.pid)
        found = await control.record("e1")
        assert found is not None
        assert found.reason == "the executor manager was restarted"
        await serve(control, "e2")

    async def test_orphans_of_a_service_are_asked_for_their_status(self, control: Control) -> None:
        async with control.program() as program:
            await control.application("has children")
            await control.session()
            await control.bind()
            record = await control.reaches(ExecutorState.BOUND)
            [[child]] = control.notes("child")
            kill(record.pid)
            await control.released()
            await eventually(lambda: not psutil.pid_exists(child), "the child is no zombie")
            assert psutil.Process(program.pid).children() == []
