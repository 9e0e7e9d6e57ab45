"""Which processes a manager may reach with a signal: those of its executors, and never anybody else's."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flame.protocol.attaching import ATTACHED
from flame.protocol.records import ExecutorRecord
from flame.protocol.states import ExecutorState
from flame_services.executor_manager import leftovers
from flame_services.executor_manager.launch import Launch
from flame_services.executor_manager.process import ExecutorProcess, group_is_alive, signal_group, started_at
from tests.support.cluster import alive, eventually

Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that only wait; returns their numbers."""
    started: list[subprocess.Popen[bytes]] = []

    def make(**how: object) -> int:
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        started.append(subprocess.Popen(sleeper, **how))  # type: ignore[call-overload]
        return started[-1].pid

    yield make
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The signals that were sent to groups, which none got."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: found.append((group, number)))
    return found


@pytest.mark.parametrize(
    "leader", [1, 0, -1, -7, os.getpgrp(), os.getpid()], ids=["1", "0", "-1", "-7", "my group", "me"]
)
def test_nobody_elses_group_and_not_its_own_is_signalled(leader: int, sent: list[tuple[int, int]]) -> None:
    assert not signal_group(leader, signal.SIGKILL)
    assert sent == []


@pytest.mark.parametrize("group", [1, 0, -1])
def test_what_is_many_processes_to_the_system_is_no_group_of_an_executor(group: int) -> None:
    assert not group_is_alive(group)


def test_a_process_that_leads_no_group_has_none_that_is_signalled(start: Start, sent: list[tuple[int, int]]) -> None:
    assert not signal_group(start(), signal.SIGKILL)
    assert sent == []


def test_a_process_that_is_gone_leads_none(start: Start, sent: list[tuple[int, int]]) -> None:
    pid = start(start_new_session=True)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not signal_group(pid, signal.SIGKILL)
    assert sent == []


def test_the_group_that_a_process_leads_is(start: Start, sent: list[tuple[int, int]]) -> None:
    pid = start(start_new_session=True)
    assert signal_group(pid, signal.SIGTERM)
    assert sent == [(pid, signal.SIGTERM)]


def record(pid: int, **fields: object) -> ExecutorRecord:
    fields = {"started": "forked", "state": ExecutorState.BOUND, "pid": pid, **fields}
    if "process_started" not in fields:
        fields["process_started"] = started_at(pid)
    named = {"id": "x", "node": "n", "application": "a", "session": "s", "epoch": 1, "created": 1.0, "updated": 1.0}
    return ExecutorRecord.model_validate({**named, **fields})


def test_of_what_an_earlier_manager_has_left_only_executors_in_sessions_of_their_own_are_ended(start: Start) -> None:
    own = start(start_new_session=True)
    assert leftovers._group_of(record(own)) == own
    job = start(process_group=0)  # as a shell starts what somebody types
    assert leftovers._group_of(record(job)) is None
    assert leftovers._group_of(record(start())) is None
    assert leftovers._group_of(record(own, started=ATTACHED)) is None
    assert leftovers._group_of(record(own, state=ExecutorState.RELEASED)) is None
    assert leftovers._group_of(record(own, process_started=time.time() - 3600)) is None


@pytest.mark.parametrize("pid", [0, 1, -1, os.getpid()], ids=["0", "1", "-1", "me"])
def test_a_record_of_no_executor_names_no_group(pid: int) -> None:
    assert leftovers._group_of(record(pid, process_started=started_at(pid) if pid > 0 else 0.0)) is None


async def test_what_a_service_has_started_ends_with_it_where_the_system_tells_of_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_pid: int, _flags: int = 0) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    mark = tmp_path / "child"
    launch = Launch(("/bin/sh", "-c", f"sleep 1000 & echo $! > {mark}"), tmp_path, dict(os.environ))
    with (tmp_path / "output").open("wb") as output:
        process = ExecutorProcess(launch, output.fileno(), output.fileno(), ())
    assert await process.ended == 0
    await eventually(lambda: not alive(int(mark.read_text())), "its child is gone")
