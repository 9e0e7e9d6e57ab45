"""A template's side of the conversation with its manager, which the tests play."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flame.protocol.forking import (
    Adopt,
    Ended,
    Finish,
    Forked,
    ForkOrder,
    NotForked,
    ToManager,
    decode_for_manager,
)
from flame.service import sockets

SCRIPT = Path(__file__).parents[1] / "support" / "template_script.py"
PATIENCE_S = 20.0


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
    return answer


class Manager:
    """Plays the manager of one template."""

    def __init__(self, folder: Path, *settings: str, environment: dict[str, str] | None = None, **popen: Any) -> None:
        self.folder = folder
        self.path = folder / "socket"
        self.output = folder / "template.log"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(self.path), *settings],
                stdout=output,
                stderr=output,
                env=os.environ | {"TAKEN": "taken", "KEPT": "kept"} | (environment or {}),
                start_new_session=True,
                **popen,
            )
        self.connection: socket.socket | None = None
        self.connect()

    def connect(self) -> None:
        """Connect, instead of before if there was a connection."""
        self.disconnect()

        def connected() -> socket.socket | None:
            try:
                return sockets.connect(str(self.path))
            except OSError:
                assert self.process.poll() is None, self.output.read_text()
                return None

        self.connection = until(connected, "it listens")

    def disconnect(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def say(self, message: Any, *descriptors: int) -> None:
        assert self.connection is not None
        socket.send_fds(self.connection, [message if isinstance(message, bytes) else message.encode()], descriptors)

    def order(self, executor: str, limits: dict[int, tuple[int, int]] | None = None, **environment: str | None) -> Path:
        """Order an executor and return the file that it writes to."""
        file = self.folder / f"{executor}.out"
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            self.say(ForkOrder(executor, str(self.folder), environment, limits or {}), descriptor, descriptor)
        finally:
            os.close(descriptor)
        return file

    def hear(self) -> tuple[ToManager, list[int]]:
        """Return what the template says next, with the descriptors that came with it."""
        assert self.connection is not None
        assert select.select([self.connection], [], [], PATIENCE_S)[0], "it says something"
        data, descriptors = sockets.receive(self.connection)
        message = decode_for_manager(data)
        assert message is not None
        return message, descriptors

    def forked(self) -> tuple[int, int]:
        """Return process id and descriptor of an executor that was forked."""
        message, descriptors = self.hear()
        assert isinstance(message, Forked)
        [descriptor] = descriptors
        return message.pid, descriptor

    def ended(self) -> Ended:
        message, _ = self.hear()
        assert isinstance(message, Ended)
        return message


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Manager]]:
    managers: list[Manager] = []

    def started(*settings: str, **options: Any) -> Manager:
        folder = tmp_path / f"{'long' * 30}" / f"{len(managers)}"  # longer than the system's limit
        folder.mkdir(parents=True)
        managers.append(Manager(folder, *settings, **options))
        return managers[-1]

    yield started
    for manager in managers:
        manager.disconnect()
        for child in psutil.Process(manager.process.pid).children() if manager.process.poll() is None else ():
            child.kill()
        manager.process.kill()
        manager.process.wait()


def test_an_executor_is_a_process_of_its_own(start: Callable[..., Manager]) -> None:
    manager = start()
    file = manager.order("e1", {7: (100, 100)}, GIVEN="given", TAKEN=None)
    pid, descriptor = manager.forked()
    assert manager.ended() == Ended("e1", pid, 0)
    assert select.select([descriptor], [], [], 0)[0], "the descriptor is of the process"
    os.close(descriptor)
    assert file.read_text().splitlines() == [
        "executor e1",
        f"folder {manager.folder}",
        "set given None kept",
        "leads True",
        "files 100",
        "descriptors 0",
        "default handlers True",
    ]


@pytest.mark.parametrize(
    ("environment", "status"),
    [({"EXIT": "3"}, 3), ({"SIGNAL": "9"}, -9), ({"SIGNAL": "15"}, -15), ({"EXIT": "0"}, 0)],
)
def test_how_an_executor_ended_is_told(start: Callable[..., Manager], environment: Any, status: int) -> None:
    manager = start()
    manager.order("e1", **environment)
    pid, _ = manager.forked()
    assert manager.ended() == Ended("e1", pid, status)
    assert psutil.Process(manager.process.pid).children() == []


def test_what_the_template_had_not_written_is_written_once(start: Callable[..., Manager]) -> None:
    manager = start()
    files = [manager.order(f"e{number}") for number in range(3)]
    for _ in range(6):
        manager.hear()
    assert "not written yet" not in "".join(file.read_text() for file in files)
    assert manager.output.read_text() == "not written yet; "


def test_it_works_and_writes_where_it_is_told(start: Callable[..., Manager], tmp_path: Path) -> None:
    manager = start()
    file = tmp_path / "adopted"
    with file.open("w") as output:
        manager.say(Adopt(str(tmp_path)), output.fileno(), output.fileno())
    manager.say(b"rubbish")
    until(lambda: "order ignored" in file.read_text(), "it complains to its new file")
    assert psutil.Process(manager.process.pid).cwd() == str(tmp_path)


def test_what_it_had_to_say_waits_for_the_next_manager(start: Callable[..., Manager]) -> None:
    manager = start()
    manager.order("e1", SLEEP="60")
    manager.order("e2", SLEEP="60")
    (first, _), (second, descriptor) = manager.forked(), manager.forked()
    manager.disconnect()
    os.kill(first, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(first), "it is reaped although nobody listens")
    manager.connect()
    assert manager.ended() == Ended("e1", first, -9)
    os.kill(second, signal.SIGTERM)
    assert manager.ended() == Ended("e2", second, -15)
    os.close(descriptor)


def test_the_group_of_an_executor_ends_with_it(start: Callable[..., Manager]) -> None:
    manager = start()
    manager.order("e1", SLEEP="60")
    pid, _ = manager.forked()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], process_group=0)
    try:
        os.kill(pid, signal.SIGKILL)
        manager.ended()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_fork_that_the_system_refuses_is_told(start: Callable[..., Manager]) -> None:
    manager = start("REFUSE=1")
    manager.order("e1")
    assert manager.hear()[0] == NotForked("e1", "fork: Resource temporarily unavailable")


def test_it_finishes_with_its_last_executor(start: Callable[..., Manager]) -> None:
    manager = start()
    manager.order("e1", SLEEP="60")
    pid, _ = manager.forked()
    manager.say(Finish())
    manager.order("e2")
    manager.forked()
    manager.ended()  # by now it has heard that it is to finish
    assert manager.process.poll() is None
    os.kill(pid, signal.SIGKILL)
    assert manager.process.wait(PATIENCE_S) == 0
    assert not manager.path.exists()


def test_it_ends_when_nobody_comes_for_it(start: Callable[..., Manager]) -> None:
    manager = start("ORPHAN_S=0.3")
    manager.order("e1", SLEEP="60")
    pid, _ = manager.forked()
    manager.disconnect()
    with pytest.raises(subprocess.TimeoutExpired):
        manager.process.wait(1)  # not while it has an executor
    os.kill(pid, signal.SIGKILL)
    assert manager.process.wait(PATIENCE_S) == 0


def test_it_ends_with_the_cluster(start: Callable[..., Manager]) -> None:
    lifetime, owner = os.pipe()
    manager = start("_LIFETIME_GRACE_S=0.3", environment={"LIFETIME": str(lifetime)}, pass_fds=(lifetime,))
    os.close(lifetime)
    manager.order("e1", SLEEP="60")
    manager.forked()
    os.close(owner)
    assert manager.process.wait(PATIENCE_S) == -signal.SIGKILL


def test_sigterm_ends_it_whatever_the_service_does_with_that(start: Callable[..., Manager]) -> None:
    manager = start()
    manager.process.terminate()
    assert manager.process.wait(PATIENCE_S) == -signal.SIGTERM


class TestAhead:
    def adopt(self, manager: Manager, ahead: int, ahead_s: float) -> None:
        with manager.output.open("a") as output:
            manager.say(Adopt(str(manager.folder), ahead, ahead_s), output.fileno(), output.fileno())

    def waiting(self, manager: Manager) -> list[int]:
        return [child.pid for child in psutil.Process(manager.process.pid).children()]

    def test_as_many_as_are_wished_wait_for_their_orders(self, start: Callable[..., Manager]) -> None:
        manager = start()
        self.adopt(manager, 2, 0)
        ready = until(lambda: len(found := self.waiting(manager)) == 2 and found, "two wait")
        file = manager.order("e1", GIVEN="given", TAKEN=None)
        pid, _ = manager.forked()
        assert pid in ready
        assert manager.ended() == Ended("e1", pid, 0)
        assert "descriptors 0\n" in file.read_text()
        assert "set given None kept" in file.read_text()
        until(lambda: len(self.waiting(manager)) == 2, "another one waits in its stead")

    def test_one_that_dies_is_not_told_of_and_not_replaced_before_the_next_order(
        self, start: Callable[..., Manager]
    ) -> None:
        manager = start()
        self.adopt(manager, 1, 0)
        [ready] = until(lambda: self.waiting(manager), "one waits")
        os.kill(ready, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(ready), "it is reaped")
        manager.order("e1")
        pid, _ = manager.forked()
        assert manager.ended() == Ended("e1", pid, 0)
        until(lambda: self.waiting(manager), "another one waits")

    def test_they_are_dismissed_when_no_order_comes(self, start: Callable[..., Manager]) -> None:
        manager = start()
        self.adopt(manager, 1, 0.3)
        until(lambda: self.waiting(manager), "one waits")
        until(lambda: not self.waiting(manager), "nobody needed it")
        manager.order("e1")
        pid, _ = manager.forked()
        assert manager.ended() == Ended("e1", pid, 0)

    def test_they_don_t_keep_a_template_from_finishing(self, start: Callable[..., Manager]) -> None:
        manager = start()
        self.adopt(manager, 1, 0)
        [ready] = until(lambda: self.waiting(manager), "one waits")
        manager.say(Finish())
        assert manager.process.wait(PATIENCE_S) == 0
        assert not psutil.pid_exists(ready)
