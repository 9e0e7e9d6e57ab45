"""`flmctl up`: a cluster that starts, serves and ends as its user expects, as processes."""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import flame
import flame.sync
from tests.integration.test_cli import FLMCTL, LIMIT_S, SPEC, call, ends, eventually, run


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
        line = self.line()
        assert re.fullmatch(r"Flame is ready at nats://127\.0\.0\.1:\d+\n", line), (line, self.said())
        self.endpoint = line.split()[-1]
        return self

    def line(self) -> str:
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


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data of the cluster"


# ---- what keeps it from starting


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
    assert up.line() == ""
    eventually(lambda: none_alive(family), "no process of the cluster is left")
    assert up.process.stdout is not None
    up.process.stdout.close()


def test_a_signal_is_a_clean_stop_and_what_a_cluster_keeps_is_there_at_the_next_start(data_dir: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with running(data_dir) as up:
            if number is signal.SIGINT:
                ends(call("register", "-f", "-", endpoint=up.endpoint, text=SPEC), 0)
                ends(call("ping", "-t", "3", endpoint=up.endpoint), 0)
            assert "\na " in call("list", "-a", endpoint=up.endpoint).stdout
            family = up.family()
            assert up.end(number) == 0
            assert none_alive(family)
            assert up.line() == ""
            assert up.said().splitlines()[-2:] == ["stopping…", "stopped"]
    names = {path.name for path in data_dir.iterdir()}
    assert {"scheduler.log", "scheduler.log.1", "executor-manager.log", "executor-manager.log.1"} <= names


def test_nothing_outlives_a_kill(data_dir: Path) -> None:
    with running(data_dir) as up:
        ends(call("ping", "-t", "3", endpoint=up.endpoint), 0)
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
        ends(call("ping", "-t", "3", endpoint=up.endpoint), 0)
        family = up.family()
        up.part(module).kill()
        assert up.process.wait(LIMIT_S) == 1
        assert f"flmctl: error: {name} ended by itself with" in up.said()
        eventually(lambda: none_alive(family), "no process of the cluster is left")


def test_verbose_shows_the_logs_and_no_client_code_leaves_out_what_runs_that(data_dir: Path) -> None:
    with running(data_dir, "--verbose", "--no-client-code") as up:
        assert not list(data_dir.glob("*manager.log"))
        eventually(lambda: "flame-scheduler" in up.said(), "the scheduler's log is shown")
        with flame.sync.connect(up.endpoint) as connection:
            assert [each.name for each in connection.list_applications()] == ["flmping", "flmtest"]
            with pytest.raises(flame.ApplicationNotFound, match="--no-client-code"):
                connection.functions().open()
        flame.sync.close()
