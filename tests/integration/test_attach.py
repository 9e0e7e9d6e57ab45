"""Services that are started by hand, in processes of their own on a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest

import flame
from flame.client import asking
from flame.protocol.states import SessionState
from flame.service import attach
from flame_cli import nodes
from tests.support.cluster import SERVICES, Cluster, alive, eventually, processes_of, started_executors

ACK_WAIT_S = 1.5
SCHEDULER_OPTIONS = ("--ack-wait-s", str(ACK_WAIT_S))


class ByHand:
    """A service that is started as somebody would in a terminal."""

    def __init__(self, endpoint: str, folder: Path, *command: str, typed: bool = False, **variables: str) -> None:
        self._said = folder / f"said-{len(list(folder.iterdir()))}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        with self._said.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                env={**environment, "FLAME_ENDPOINT": endpoint, **variables},
                stdin=subprocess.PIPE if typed else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                start_new_session=True,  # otherwise what is wrongly sent to its group would hit the tests
            )
        self.pid = self.process.pid

    def said(self) -> str:
        return self._said.read_text(errors="replace")

    async def says(self, text: str) -> None:
        await eventually(lambda: text in self.said() or self.process.poll() is not None, f"{text!r} is said")
        assert text in self.said(), self.said()

    async def ends(self) -> int:
        await eventually(lambda: self.process.poll() is not None, "it ends")
        status: int = self.process.returncode
        return status

    def types(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    @property
    def last_words(self) -> str:
        return self.said().splitlines()[-1]

    @property
    def node(self) -> str:
        """The name of the node that it is."""
        found = re.search(r"as node (\S+):", self.said())
        assert found is not None
        return found[1]

    def manager(self) -> psutil.Process:
        """Return the process that looks after it."""
        (child,) = psutil.Process(self.pid).children()
        return child


Start = Callable[..., ByHand]


@pytest.fixture
def by_hand(cluster: Cluster, tmp_path: Path) -> Iterator[Start]:
    """Starts a service by hand; afterwards it is gone."""
    started: list[ByHand] = []

    def start(*command: str, typed: bool = False, **variables: str) -> ByHand:
        started.append(ByHand(cluster.broker.endpoint, tmp_path, *command, typed=typed, **variables))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.wait()
        if each.process.stdin is not None:
            each.process.stdin.close()
        print(each.said())  # noqa: T201  # pytest shows it with a failure


@pytest.fixture
async def attached(cluster: Cluster, connection: flame.Connection, lab: str, by_hand: Start) -> AsyncIterator[ByHand]:
    """A process that waits for a session of the lab; afterwards nothing of it is alive, or known."""
    process = by_hand(str(SERVICES / "lab.py"), FLAME_APPLICATION=lab)
    await process.says("waiting for a session")
    await known(connection, process.node)
    yield process
    if process.process.poll() is None:
        process.process.kill()
        process.process.wait()
    await nothing_is_left(cluster, connection, process.node)


async def known(connection: flame.Connection, node: str, *, there: bool = True) -> None:
    async def is_known() -> bool:
        return (node in {info.name for info in await connection.list_nodes()}) == there

    await eventually(is_known, f"node {node} is {'known' if there else 'gone'}")


async def nothing_is_left(cluster: Cluster, connection: flame.Connection, node: str) -> None:
    await known(connection, node, there=False)
    await eventually(lambda: not [p for p in processes_of(cluster.broker.endpoint) if "attaching" in p], "it is gone")


def do(*call: object) -> bytes:
    return json.dumps(call).encode()


async def pid_of(session: flame.Session) -> int:
    return int(json.loads((await session.invoke(do("who"))).output)["pid"])


# ---- what it serves


async def test_it_serves_one_session_before_any_other_node_and_ends_with_it(
    cluster: Cluster, connection: flame.Connection, attached: ByHand
) -> None:
    info = await connection.get_node(attached.node)
    assert nodes.row(info)[-1] == nodes.document(info)["serves"] == "attached, for lab"
    await connection.register_application("other-lab", cluster.service("lab"))
    async with await connection.create_session("other-lab") as foreign:
        assert await pid_of(foreign) != attached.pid
    session = await connection.create_session("lab")
    assert await pid_of(session) == attached.pid
    await attached.says(f"flame: serving session {session.id}")
    (executor,) = await started_executors(connection, session.id)
    assert (executor.started, executor.pid, executor.node) == ("attached", attached.pid, attached.node)
    async with await connection.create_session("lab") as other:
        assert await pid_of(other) != attached.pid
    await session.close()
    assert await attached.ends() == 0
    assert attached.last_words == f"flame: session {session.id} has ended"


async def test_a_program_may_name_the_application_and_is_silent_otherwise(
    cluster: Cluster, connection: flame.Connection, lab: str, by_hand: Start, tmp_path: Path
) -> None:
    """Also with Python's own warnings switched on, and with threads in the process."""
    program = tmp_path / "program.py"
    program.write_text(
        "import asyncio, sys, threading, flame\n"
        f"sys.path.insert(0, {str(SERVICES)!r})\n"
        "from lab import Lab\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        f"asyncio.run(flame.run(Lab(), application={lab!r}))\n"
        "print('and goes on')\n"
    )
    process = by_hand("-X", "dev", str(program), FLAME_APPLICATION="another")
    await process.says("waiting for a session")
    await known(connection, process.node)
    async with await connection.create_session(lab) as session:
        assert await pid_of(session) == process.pid
    assert await process.ends() == 0
    lines = process.said().splitlines()
    assert lines[0].startswith(f"flame: attached to lab at {cluster.broker.endpoint}, as node attached-")
    assert lines[1:] == [
        f"flame: serving session {session.id} (Ctrl-C leaves)",
        f"flame: session {session.id} has ended",
        "and goes on",
    ]
    await nothing_is_left(cluster, connection, process.node)


async def test_a_session_that_can_not_be_entered_says_why(
    connection: flame.Connection, attached: ByHand, tmp_path: Path
) -> None:
    plan = {"enter_fails": str(tmp_path / "tries"), "times": 1}
    async with await connection.create_session("lab", json.dumps(plan).encode()) as session:
        assert await pid_of(session) != attached.pid
        assert await attached.ends() == 1
    assert f"flame: session {session.id} could not be entered: RuntimeError: not today (1)" in attached.said()
    assert 'raise RuntimeError(f"not today' in attached.said()


async def test_a_session_that_is_closed_by_force_ends_it(
    connection: flame.Connection, attached: ByHand, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    session = await connection.create_session("lab")
    task = await session.create_task(do("sleep", 600, str(mark)))
    await eventually(mark.exists, "the task runs")
    await session.close("force")
    with pytest.raises(flame.TaskCancelled):
        await task
    assert await attached.ends() == 0
    assert attached.last_words == f"flame: session {session.id} has ended"


# ---- Ctrl-C


async def test_ctrl_c_leaves_at_once_while_nothing_is_served(attached: ByHand) -> None:
    attached.process.send_signal(signal.SIGINT)
    assert await attached.ends() == 0
    assert attached.last_words == "flame: left lab"


async def test_a_task_that_runs_when_it_is_to_leave_may_finish_and_what_waits_is_run_elsewhere(
    connection: flame.Connection, attached: ByHand, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    async with await connection.create_session("lab", max_instances=1) as session:
        assert await pid_of(session) == attached.pid
        running = await session.create_task(do("sleep", 1, str(mark)))
        await eventually(mark.exists, "the task runs")
        attached.process.send_signal(signal.SIGTERM)
        await attached.says("leaving")
        after = await session.create_task(do("who"))
        assert (await running).output == str(attached.pid).encode()
        assert json.loads((await after).output)["pid"] != attached.pid
        assert await attached.ends() == 0
        assert attached.last_words == f"flame: left session {session.id}, which goes on without this process"
        record = (await connection.get_session(session.id)).session
        assert (record.bind_failures, record.state) == (0, SessionState.OPEN)


async def test_a_second_ctrl_c_ends_a_blocked_process_at_once(
    connection: flame.Connection, attached: ByHand, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    async with await connection.create_session("lab") as session:
        task = await session.create_task(do("block_once", 600, str(mark)))
        await eventually(mark.exists, "the task runs")
        attached.process.send_signal(signal.SIGINT)
        # Nothing is said while the loop is blocked; until the first has been taken the second would be the same.
        await eventually(lambda: not pending(attached.pid, signal.SIGINT), "the signal is taken")
        attached.process.send_signal(signal.SIGINT)
        assert await attached.ends() == -signal.SIGINT
        assert int((await task).output) != attached.pid


def pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process has not taken a signal yet."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool((int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)) & 1 << (number - 1))


# ---- debuggers, and worse


async def test_a_debugger_may_stop_it_for_longer_than_a_lease(
    connection: flame.Connection, attached: ByHand, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    async with await connection.create_session("lab", max_instances=1) as session:
        task = await session.create_task(do("sleep", 0.2, str(mark)))
        await eventually(mark.exists, "the task runs")
        attached.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2.25 * ACK_WAIT_S)  # that this passes is what it has to survive
        attached.process.send_signal(signal.SIGCONT)
        assert (await task).output == str(attached.pid).encode()
        assert len(mark.read_text().splitlines()) == 1
        assert await pid_of(session) == attached.pid


async def test_what_a_killed_process_ran_is_run_elsewhere(
    connection: flame.Connection, attached: ByHand, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    async with await connection.create_session("lab") as session:
        task = await session.create_task(do("block_once", 600, str(mark)))
        await eventually(mark.exists, "the task runs")
        manager = attached.manager()
        attached.process.kill()
        assert int((await task).output) != attached.pid
        await eventually(lambda: not alive(manager.pid), "its manager has ended")


async def test_it_ends_with_an_error_when_its_manager_is_gone(lab: str, by_hand: Start) -> None:
    process = by_hand(str(SERVICES / "lab.py"), FLAME_APPLICATION=lab)
    await process.says("waiting for a session")
    process.manager().kill()
    assert await process.ends() == 1
    assert "flame.errors.Unavailable: flame.run: process" in process.said()
    assert "which looked after this one in the cluster, has ended (status -9)" in process.said()


# ---- what can't be attached


class Service(flame.FlameService):
    async def on_task_invoke(self, context: flame.TaskContext) -> bytes:
        return b""


async def test_what_can_not_be_attached_is_told(
    cluster: Cluster, connection: flame.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_ENDPOINT", cluster.broker.endpoint)
    for name in ("FLAME_EXECUTOR", "FLAME_APPLICATION"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(flame.ConfigurationError, match="To attach this process, set FLAME_APPLICATION"):
        await flame.run(Service())
    with pytest.raises(flame.InvalidName, match=r"application 'a\.b' is not a legal name"):
        await flame.run(Service(), application="a.b")
    with pytest.raises(flame.ApplicationNotFound, match=r"no application nowhere at .*`flmctl register -f FILE`"):
        await flame.run(Service(), application="nowhere")
    await connection.register_application("disabled-lab", cluster.service("lab"))
    await connection.disable_application("disabled-lab")
    with pytest.raises(flame.ApplicationDisabled, match="flmctl enable -a disabled-lab"):
        await flame.run(Service(), application="disabled-lab")
    monkeypatch.setattr(attach, "_served", "s-1")
    with pytest.raises(flame.ConfigurationError, match="this process has served session s-1"):
        await flame.run(Service(), application="disabled-lab")


async def test_a_cluster_that_is_not_there_is_told(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAME_EXECUTOR", raising=False)
    monkeypatch.setenv("FLAME_ENDPOINT", "nats://127.0.0.1:9")
    with pytest.raises(flame.BrokerUnavailable):
        await flame.run(Service(), application="lab")
    monkeypatch.setenv("FLAME_ENDPOINT", "http://127.0.0.1")
    with pytest.raises(flame.ConfigurationError, match="endpoint 'http://127"):
        await flame.run(Service(), application="lab")
    monkeypatch.setenv("FLAME_ENDPOINT", cluster.broker.endpoint)
    monkeypatch.setattr(asking, "SCHEDULER_PATIENCE_S", 0.2)
    assert cluster.scheduler is not None
    cluster.scheduler.terminate()
    cluster.scheduler.wait()
    try:
        with pytest.raises(flame.SchedulerUnavailable, match="start flame-scheduler"):
            await flame.run(Service(), application="lab")
    finally:
        cluster.start_scheduler()


# ---- the example


EXAMPLE = Path(__file__).parents[2] / "examples" / "attach"
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


async def test_the_example_works_as_printed(cluster: Cluster, connection: flame.Connection, by_hand: Start) -> None:
    register, start, ask = "".join(CONSOLE.findall((EXAMPLE / "README.md").read_text())).splitlines()
    variable, python, script = start.split()
    assert (register.split()[:3], python) == (["flmctl", "register", "-f"], "python")
    root = EXAMPLE.parents[1]
    registered = by_hand("-m", "flame_cli.main", "register", "-f", str(root / register.split()[-1]))
    assert await registered.ends() == 0, registered.said()
    service = by_hand(str(root / script), **dict([variable.split("=")]))
    await service.says("waiting for a session")
    await known(connection, service.node)
    client = by_hand(str(root / ask.split()[-1]))
    assert await client.ends() == 0, client.said()
    assert client.said() == f"?doG ees eseeg oD from {service.node}\n"
    assert await service.ends() == 0
    await nothing_is_left(cluster, connection, service.node)


async def test_a_breakpoint_is_reached_and_gone_on_from(
    cluster: Cluster, connection: flame.Connection, tmp_path: Path, by_hand: Start
) -> None:
    await connection.register_application("debugged", cluster.service("lab"))
    script = tmp_path / "agent.py"
    line = "        question = context.input.decode()\n"
    text = (EXAMPLE / "agent.py").read_text()
    assert line in text
    script.write_text(text.replace(line, f"{line}        breakpoint()\n"))
    service = by_hand(str(script), typed=True, FLAME_APPLICATION="debugged")
    await service.says("waiting for a session")
    await known(connection, service.node)
    session = await connection.create_session("debugged")
    task = await session.create_task(b"stop")
    await service.says("-> return question[::-1]")
    service.types("question = 'go on'")
    service.types("continue")
    assert (await task).output == b"no og"
    await session.close()
    assert await service.ends() == 0
    await nothing_is_left(cluster, connection, service.node)
