"""`flmctl` and `flmping` as their users run them: processes, with a cluster that ``flmctl up`` runs."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

FLMCTL = [sys.executable, "-m", "flame_cli.main"]
FLMPING = [sys.executable, "-c", "from flame_cli.main import flmping; flmping()"]
LIMIT_S = 60.0
"""What no command of these tests comes near."""
DEAD_ENDPOINT = "nats://127.0.0.1:1"

Finished = subprocess.CompletedProcess[str]


def run(
    *arguments: str, program: list[str] = FLMCTL, endpoint: str = DEAD_ENDPOINT, text: str = "", **environment: str
) -> Finished:
    """Run a program to its end. Nothing of it ever shows a traceback, and an error is one line."""
    done = subprocess.run(
        [*program, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=os.environ | {"FLAME_ENDPOINT": endpoint} | environment,
        check=False,
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done


def ends(done: Finished, status: int, *texts: str) -> None:
    """Check how a command ended: its status, and what it says."""
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    for text in texts:
        assert text in said
    if status not in (0, 2):
        assert len(done.stderr.splitlines()) == 1, said


def eventually(condition: Callable[[], Any], what: str, limit_s: float = 30.0) -> None:
    """Wait for something that has to happen, asking again and again."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {limit_s:g} s: {what}"
        time.sleep(0.02)


# ---- a cluster


class Up:
    """A running ``flmctl up``."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.data_dir = data_dir
        self.errors = data_dir.with_name(f"{data_dir.name}.stderr")
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*FLMCTL, "up", "--data-dir", str(data_dir), "--port", "0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self.endpoint = ""

    def wait_ready(self) -> Up:
        line = self._line()
        assert re.fullmatch(r"Flame is ready at nats://127\.0\.0\.1:\d+\n", line), (line, self.said())
        self.endpoint = line.split()[-1]
        return self

    def _line(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT_S)
        return self.process.stdout.readline().decode() if ready else "(nothing)"

    def said(self) -> str:
        return self.errors.read_text()

    def family(self) -> list[psutil.Process]:
        """Every process of the cluster, the program itself first."""
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def part(self, module: str) -> psutil.Process:
        return next(process for process in self.family()[1:] if any(module in word for word in process.cmdline()))

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(LIMIT_S)


def none_alive(processes: list[psutil.Process]) -> bool:
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def running(data_dir: Path, *arguments: str) -> Iterator[Up]:
    """Run a cluster, ready; end it in the end and check that nothing of it is left."""
    up = Up(data_dir, *arguments)
    family: list[psutil.Process] = []
    try:
        up.wait_ready()
        family = up.family()
        yield up
    finally:
        if up.process.poll() is None:
            family += up.family()
            if up.end(signal.SIGINT) != 0:
                pytest.fail(f"flmctl up ended with {up.process.returncode}: {up.said()}")
        assert up.process.stdout is not None
        up.process.stdout.close()
        eventually(lambda: none_alive(family), "no process of the cluster is left")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("cluster") / "data") as up:
        yield up


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data of the cluster"


# ---- without a cluster


@pytest.mark.parametrize("program", [FLMCTL, FLMPING])
def test_the_version_is_shown(program: list[str]) -> None:
    from flame import __version__

    done = run("--version", program=program)
    assert done.stdout.split() == ["flmctl" if program is FLMCTL else "flmping", __version__]
    ends(done, 0)


@pytest.mark.parametrize("command", ["", "up", "list", "register", "unregister", "close", "ping"])
def test_help_has_examples_and_fits_80_columns(command: str) -> None:
    done = run(*command.split(), "--help", COLUMNS="80")
    ends(done, 0, "Example", f"flmctl {command}")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_help_of_flmping_tells_the_exit_codes() -> None:
    ends(run("--help", program=FLMPING), 0, "flmping -t 1000 -p", "130")


SPEC = "metadata: {name: a}\nspec: {command: c}\n"


@pytest.mark.parametrize(
    ("arguments", "text", "status", "expected"),
    [
        ("frobnicate", "", 2, "No such command 'frobnicate'"),
        ("list", "", 2, "exactly one of -a, -s, -e and -n"),
        ("list -a -s", "", 2, "exactly one of -a, -s, -e and -n"),
        ("list -x", "", 2, "No such option: -x"),
        ("register", "", 2, "Missing option"),
        ("register -f /nowhere/agent.yaml", "", 2, "/nowhere/agent.yaml: No such file or directory"),
        ("register -f /", "", 2, "/: Is a directory"),
        ("register -f -", "", 2, "standard input: expected an application"),
        ("register -f -", "metadata: {name: a", 2, "standard input, line 1, column 19: not YAML"),
        ("register -f -", f"{SPEC}{{", 2, "standard input, line 3"),
        (
            "register -f -",
            "metadata: {name: a}\nspec:\n  comand: x",
            2,
            "line 3: spec.comand: unknown field, did you mean",
        ),
        ("register -f -", SPEC.replace("c}", "[c]}"), 2, "spec.command: expected text, got a list"),
        ("register -f -", SPEC.replace("a}", "a.b}"), 2, "metadata.name: application 'a.b' is not a legal name"),
        ("register -f -", SPEC, 3, "no NATS server answers at nats://127.0.0.1:1"),
        ("close -s a.b", "", 3, "no NATS server answers"),
        ("unregister -a a", "", 3, "no NATS server answers"),
        ("list -a", "", 3, "no NATS server answers"),
        ("list -s --endpoint nonsense", "", 2, "endpoint 'nonsense': expected nats://HOST:PORT"),
        ("--endpoint nonsense list -n", "", 2, "endpoint 'nonsense': expected nats://HOST:PORT"),
        ("ping -t 0", "", 2, "greater than or equal to 1"),
        ("ping", "", 3, "no NATS server answers"),
        ("up --port 70000", "", 2, "less than or equal to 65535"),
        ("--endpoint nats://127.0.0.1:1 up", "", 2, "starts a broker of its own"),
    ],
)
def test_bad_input_ends_with_its_status_and_a_reason(arguments: str, text: str, status: int, expected: str) -> None:
    begin = time.monotonic()
    ends(run(*arguments.split(), text=text), status, expected)
    assert time.monotonic() - begin < 10


def test_what_is_no_nats_server_is_said_to_be_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ends(
            run("list", "-a", endpoint=f"nats://127.0.0.1:{silent.getsockname()[1]}"),
            3,
            "flmctl: error: no NATS server",
        )


@pytest.mark.parametrize("module", ["typer", "yaml"])
def test_without_the_command_line_extra_it_says_what_to_install(module: str) -> None:
    blocked = f"import sys; sys.modules[{module!r}] = None; from flame_cli.main import main; main()"
    done = run("register", "-f", "-", program=[sys.executable, "-c", blocked], text=SPEC)
    ends(done, 2)
    assert done.stderr == "flmctl needs the command line extra: pip install 'flame-engine[cli]'\n"


@pytest.mark.parametrize("module", ["flame_services", "psutil"])
def test_without_the_server_extra_up_says_what_to_install(module: str, data_dir: Path) -> None:
    blocked = f"import sys; sys.modules[{module!r}] = None; from flame_cli.main import main; main()"
    done = run("up", "--data-dir", str(data_dir), program=[sys.executable, "-c", blocked])
    ends(done, 2)
    assert done.stderr == "flmctl up needs the server extra: pip install 'flame-engine[server]'\n"


def test_a_fault_of_the_program_itself_is_one_line_too() -> None:
    broken = "import flame_cli.nodes as n; n.show_list = lambda e: 1 / 0; from flame_cli.main import main; main()"
    done = run("list", "-n", program=[sys.executable, "-c", broken])
    ends(done, 1, "flmctl: internal error: ZeroDivisionError: division by zero (FLAME_DEBUG=1 shows where)")


# ---- up


def test_a_port_in_use_is_named(data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ends(run("up", "--data-dir", str(data_dir), "--port", port), 2, f"port {port} on 127.0.0.1 is in use", "--port")


def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ends(
        run("up", "--data-dir", str(tmp_path / "file"), "--port", "0"),
        2,
        f"data folder {tmp_path / 'file'} can't be used",
    )


def test_a_missing_broker_is_named(data_dir: Path) -> None:
    done = run("up", "--data-dir", str(data_dir), "--port", "0", FLAME_NATS_SERVER="/nowhere/nats-server")
    ends(done, 2, "FLAME_NATS_SERVER is '/nowhere/nats-server'")


def test_a_broker_that_does_not_start_is_quoted(data_dir: Path) -> None:
    done = run("up", "--data-dir", str(data_dir), "--port", "0", FLAME_NATS_SERVER="/bin/false")
    assert done.returncode == 1
    assert "nats-server ended with status 1" in done.stderr


def test_a_service_that_does_not_start_is_quoted(data_dir: Path) -> None:
    done = run("up", "--data-dir", str(data_dir), "--port", "0", FLAME_LOG_LEVEL="loud")
    assert done.returncode == 1
    assert re.search(r"flmctl: error: the (scheduler|executor manager) ended by itself with status 2, see", done.stderr)
    assert "  | flame-" in done.stderr
    assert "log_level" in done.stderr


def test_a_cluster_can_be_stopped_before_it_is_ready(data_dir: Path) -> None:
    up = Up(data_dir)
    eventually(lambda: "starting the executor manager" in up.said(), "the executor manager is starting")
    family = up.family()
    assert up.end(signal.SIGINT) == 0
    assert up._line() == ""
    eventually(lambda: none_alive(family), "no process of the cluster is left")
    assert up.process.stdout is not None
    up.process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_a_clean_stop(data_dir: Path, number: signal.Signals) -> None:
    with running(data_dir) as up:
        ends(run("-t", "3", program=FLMPING, endpoint=up.endpoint), 0)
        family = up.family()
        assert up.end(number) == 0
        assert none_alive(family)
        assert up._line() == ""
        assert up.said().splitlines()[-2:] == ["stopping…", "stopped"]


def test_nothing_outlives_a_kill(data_dir: Path) -> None:
    with running(data_dir) as up:
        ends(run("-t", "3", program=FLMPING, endpoint=up.endpoint), 0)
        family = up.family()
        assert up.end(signal.SIGKILL) == -signal.SIGKILL
        eventually(lambda: none_alive(family), "no process of the cluster is left")


def test_a_second_ctrl_c_ends_it_at_once(data_dir: Path) -> None:
    with running(data_dir) as up:
        family = up.family()
        manager = up.part("flame_services.executor_manager")
        manager.suspend()  # it can't stop by itself now
        begin = time.monotonic()
        up.process.send_signal(signal.SIGINT)

        def ended_by_another() -> bool:
            up.process.send_signal(signal.SIGINT)  # one Ctrl-C may come twice: a second is one that comes later
            return up.process.poll() is not None

        eventually(ended_by_another, "it ended")
        assert up.process.returncode == 0
        assert time.monotonic() - begin < 5
        assert none_alive(family)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("flame_services.scheduler", "the scheduler"),
        ("flame_services.executor_manager", "the executor manager"),
        ("nats-server.conf", "the broker"),
    ],
)
def test_a_part_that_dies_ends_the_cluster(data_dir: Path, module: str, name: str) -> None:
    with running(data_dir) as up:
        ends(run("-t", "3", program=FLMPING, endpoint=up.endpoint), 0)
        family = up.family()
        up.part(module).kill()
        assert up.process.wait(LIMIT_S) == 1
        assert f"flmctl: error: {name} ended by itself with" in up.said()
        eventually(lambda: none_alive(family), "no process of the cluster is left")


def test_what_a_cluster_keeps_is_there_at_the_next_start(data_dir: Path) -> None:
    for start in (1, 2):
        with running(data_dir) as up:
            if start == 1:
                ends(run("register", "-f", "-", endpoint=up.endpoint, text=SPEC), 0)
            assert "\na " in run("list", "-a", endpoint=up.endpoint).stdout
    names = {path.name for path in data_dir.iterdir()}
    assert {"scheduler.log", "scheduler.log.1", "executor-manager.log", "executor-manager.log.1"} <= names


def test_verbose_shows_the_logs_instead_of_keeping_them(data_dir: Path) -> None:
    with running(data_dir, "--verbose") as up:
        assert not list(data_dir.glob("*manager.log"))
        eventually(lambda: "flame-scheduler" in up.said(), "the scheduler's log is shown")


# ---- in a cluster


def test_a_data_folder_in_use_is_named(cluster: Up) -> None:
    done = run("up", "--data-dir", str(cluster.data_dir), "--port", "0")
    ends(done, 2, f"data folder {cluster.data_dir} is used by process {cluster.process.pid}", "--data-dir")


def test_built_in_applications_are_listed(cluster: Up) -> None:
    done = run("list", "-a", endpoint=cluster.endpoint)
    ends(done, 0)
    title, *lines = done.stdout.splitlines()
    assert title.split() == ["Name", "Shim", "State", "Created", "Command"]
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["flmtest"][1:3] == ["Log", "Enabled"]
    assert rows["flmtest"][4] == "-"
    assert rows["flmping"][1:3] == ["Nats", "Enabled"]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d|\d{4}-\d\d-\d\d", row[3]) for row in rows.values())


def test_applications_come_and_go(cluster: Up, tmp_path: Path) -> None:
    file = tmp_path / "two agents.yaml"
    file.write_text("metadata: {name: one}\nspec: {command: /bin/one}\n---\nmetadata: {name: two}\nspec: {shim: Log}\n")
    ends(
        run("register", "-f", str(file), endpoint=cluster.endpoint),
        0,
        "application one registered\napplication two registered\n",
    )
    listed = run("--endpoint", cluster.endpoint, "list", "-a").stdout
    assert re.search(r"^one +Nats +Enabled +\S+ +/bin/one$", listed, re.MULTILINE)
    ends(run("register", "-f", str(file), endpoint=cluster.endpoint), 1, "application one is registered already")
    for name in ("one", "two"):
        ends(run("unregister", "-a", name, endpoint=cluster.endpoint), 0, f"application {name} unregistered\n")
    ends(run("unregister", "-a", "one", endpoint=cluster.endpoint), 1, "application 'one' is not registered")
    assert "\none " not in run("list", "-a", endpoint=cluster.endpoint).stdout


def test_flmping_shows_each_task(cluster: Up) -> None:
    done = run("-t", "5", program=FLMPING, endpoint=cluster.endpoint)
    ends(done, 0)
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r"task \w+  executor \S+  \d+\.\d\d ms", line) for line in lines)
    assert len({line.split()[3] for line in lines}) == 1  # one at a time: one executor
    assert done.stderr == ""


def test_flmping_sums_up(cluster: Up) -> None:
    done = run("-t", "500", "-c", "2", "-m", "100", "-p", program=FLMPING, endpoint=cluster.endpoint)
    ends(done, 0)
    figures = dict(line.split(": ") for line in done.stdout.splitlines())
    assert figures["tasks"] == "1000 in 2 sessions, 100 bytes each"
    assert figures["succeeded"] == "1000"
    assert figures["failed"] == "0"
    assert float(figures["duration"].removesuffix(" s")) > 0
    assert float(figures["throughput"].removesuffix(" tasks/s")) > 0
    median, slow = (float(figures[f"latency {name}"].removesuffix(" ms")) for name in ("p50", "p99"))
    assert 0 < median <= slow
    assert done.stderr == ""


def test_a_payload_over_the_limit_is_refused(cluster: Up) -> None:
    ends(run("-m", "300000", program=FLMPING, endpoint=cluster.endpoint), 2, "flmping: error: input of 300000 bytes")


def test_ctrl_c_ends_flmping_and_its_session(cluster: Up) -> None:
    ping = subprocess.Popen(
        [*FLMPING, "-t", "1000000", "--endpoint", cluster.endpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert ping.stdout is not None
    assert ping.stdout.readline().startswith("task ")
    session = next(line.split()[0] for line in _sessions(cluster) if " Open " in line)
    ping.send_signal(signal.SIGINT)
    _, errors = ping.communicate(timeout=LIMIT_S)
    assert ping.returncode == 130
    assert errors == ""
    eventually(
        lambda: any(line.split()[:2] == [session, "Closed"] for line in _sessions(cluster)), "the session is closed"
    )


def test_the_end_of_a_pipe_is_no_error(cluster: Up) -> None:
    command = f"{' '.join(FLMCTL)} ping -t 1000000 --endpoint {cluster.endpoint} | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.stdout.startswith("task ")
    assert done.stderr == ""


def test_sessions_are_listed_and_closed(cluster: Up) -> None:
    ping = subprocess.Popen([*FLMPING, "-t", "1000000", "--endpoint", cluster.endpoint], stdout=subprocess.PIPE)
    assert ping.stdout is not None
    assert ping.stdout.readline().startswith(b"task ")
    title, *lines = run("list", "-s", endpoint=cluster.endpoint).stdout.splitlines()
    assert title.split() == [
        *["ID", "State", "App", "Resources", "Priority"],
        *["Pending", "Running", "Succeed", "Failed", "Created"],
    ]
    row = next(line for line in lines if " Open " in line).split()
    assert row[2:5] == ["flmping", "cpu=0.1,mem=128m,gpu=0", "0"]
    executor_title, *executors = run("list", "-e", endpoint=cluster.endpoint).stdout.splitlines()
    assert executor_title.split() == ["ID", "State", "Session", "Node"]
    assert any(executor.split()[1:3] == ["Bound", row[0]] for executor in executors)
    ends(run("close", "-s", row[0], endpoint=cluster.endpoint), 0, f"session {row[0]} closing\n")
    ping.communicate(timeout=LIMIT_S)
    assert ping.returncode == 1
    ends(run("close", "-s", "nobody-123456", endpoint=cluster.endpoint), 1, "session nobody-123456 is not known")
    ends(run("close", "-s", "a.b", endpoint=cluster.endpoint), 2, "session 'a.b' is not a legal name")


def test_nodes_are_listed(cluster: Up) -> None:
    title, *lines = run("list", "-n", endpoint=cluster.endpoint).stdout.splitlines()
    assert title.split() == ["Name", "Hostname", "Status", "CPU", "Memory", "Arch", "OS"]
    assert [line.split()[2] for line in lines] == ["Ready"]


def test_a_terminal_gets_what_fits_it(cluster: Up) -> None:
    ends(run("-t", "1", program=FLMPING, endpoint=cluster.endpoint), 0)
    output = in_terminal(["list", "-s", "--endpoint", cluster.endpoint], columns=80, NO_COLOR="1")
    lines = output.splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("("))
    assert "Pending" in lines[0]
    assert "Resources" not in lines[0]
    assert lines[-1].startswith("(Resources, Priority: no room in 80 columns")
    assert "\x1b" not in output
    assert "\x1b[1mID" in in_terminal(["list", "-s", "--endpoint", cluster.endpoint], columns=200, TERM="xterm")


def _sessions(cluster: Up) -> list[str]:
    return run("list", "-s", endpoint=cluster.endpoint).stdout.splitlines()[1:]


def in_terminal(arguments: list[str], *, columns: int, **environment: str) -> str:
    """Run `flmctl` in a terminal of that width and return what it shows."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        process = subprocess.Popen([*FLMCTL, *arguments], stdout=theirs, stderr=theirs, env=kept | environment)
    finally:
        os.close(theirs)
    shown = b""
    try:
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the last one who could write has gone
                break
            if not part:
                break
            shown += part
    finally:
        os.close(ours)
    assert process.wait(LIMIT_S) == 0, shown
    return shown.decode().replace("\r\n", "\n")
