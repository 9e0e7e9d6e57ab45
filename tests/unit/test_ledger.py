"""The ledger: what one process writes, another reads rightly, whenever it looks and whatever it takes away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flame.errors import ConfigurationError
from flame.ledger import HELD, RUNNING, SLOTS, Ledger, LedgerReader, barrier, barrier_register

HANDLE = "$JS.ACK.flame-task-a.s-1.1.{0}.{0}.1795416449738572934.7"
TASK = "a.s.{0}"

EXECUTOR = """
import sys, time
from flame.ledger import Ledger

ledger, until = Ledger(sys.argv[1]), time.monotonic() + float(sys.argv[2])
burst = int(sys.argv[3])
number = 0
ran = []
while time.monotonic() < until:
    taken = []
    for _ in range(burst):
        number += 1
        handle = f"$JS.ACK.flame-task-a.s-1.1.{number}.{number}.1795416449738572934.7"
        taken.append((ledger.take(handle, f"a.s.{number}", time.monotonic()), number))
    for slot, mine in taken:
        if ledger.start(slot, time.monotonic()):
            ran.append(mine)
            ledger.clear(slot)
with open(sys.argv[1] + ".ran", "w") as file:
    print(number, file=file)
    print(*ran, file=file)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else tmp_path) / f"flame-test-{os.getpid()}-{time.monotonic_ns()}.ledger"


@pytest.fixture
def reader(path: Path) -> Iterator[LedgerReader]:
    made = LedgerReader.create(path, time.monotonic(), 15.0)
    yield made
    made.close(remove=True)
    assert not path.exists()
    _result(path).unlink(missing_ok=True)


def executor(path: Path, seconds: float, burst: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", EXECUTOR, str(path), str(seconds), str(burst)])


def _result(path: Path) -> Path:
    return path.with_name(path.name + ".ran")


def test_a_reader_sees_what_is_held_and_what_runs(reader: LedgerReader, path: Path) -> None:
    ledger = Ledger(str(path))
    one, two = (ledger.take(HANDLE.format(n), TASK.format(n), float(n)) for n in (1, 2))
    assert ledger.start(two, 5.0, deadline=65.0)
    held, running = sorted(reader.slots(), key=lambda slot: slot.task)
    assert (held.state, held.handle, held.task, held.taken_at) == (HELD, HANDLE.format(1), TASK.format(1), 1.0)
    assert (held.started_at, held.deadline) == (0.0, 0.0)
    assert (running.state, running.task, running.started_at, running.deadline) == (RUNNING, TASK.format(2), 5.0, 65.0)
    assert reader.pid == os.getpid()
    ledger.clear(one)
    ledger.clear(two)
    assert reader.slots() == []
    assert ledger.room == SLOTS


def test_a_slot_that_is_used_again_has_no_deadline_of_before(reader: LedgerReader, path: Path) -> None:
    ledger = Ledger(str(path))
    first = ledger.take(HANDLE.format(1), TASK.format(1), 0.0)
    assert ledger.start(first, 0.0, deadline=65.0)
    ledger.clear(first)
    assert ledger.take(HANDLE.format(2), TASK.format(2), 0.0) == first
    assert [slot.deadline for slot in reader.slots()] == [0.0]
    assert ledger.start(first, 1.0)
    assert [(slot.started_at, slot.deadline) for slot in reader.slots()] == [(1.0, 0.0)]


def test_what_does_not_fit_is_refused(reader: LedgerReader, path: Path) -> None:
    ledger = Ledger(str(path))
    assert ledger.take("x" * 600, "t", 0.0) == -1
    assert all(ledger.take("h", "t", 0.0) >= 0 for _ in range(SLOTS))
    assert ledger.take("h", "t", 0.0) == -1


def test_what_is_stolen_does_not_start(reader: LedgerReader, path: Path) -> None:
    ledger = Ledger(str(path))
    first, second = (ledger.take(HANDLE.format(n), TASK.format(n), 0.0) for n in (1, 2))
    assert ledger.start(first, 0.0)
    if not barrier_register() or not barrier():
        assert reader.steal() == []
        pytest.skip("this system has no membarrier: nothing is stolen, which is what was checked")
    assert [slot.task for slot in reader.steal()] == [TASK.format(2)]
    assert reader.steal() == []
    assert ledger.stolen(second)
    assert not ledger.start(second, 0.0)
    assert ledger.room == SLOTS - 1


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(b"something else")
    for name in ("foreign", "missing"):
        with pytest.raises(ConfigurationError, match=name):
            Ledger(str(tmp_path / name))


def test_leases_are_kept_without_a_gap_until_there_is_one(reader: LedgerReader, path: Path) -> None:
    ledger = Ledger(str(path))
    began = ledger.kept_since()
    now = time.monotonic()
    reader.keep(now, 12.0)
    assert ledger.kept_by_manager(now + 1.0, 2.0)
    assert not ledger.kept_by_manager(now + 2.5, 2.0)
    assert ledger.kept_since() == began
    reader.keep(now + 13.0, 12.0)
    assert ledger.kept_since() == now + 13.0


def test_no_read_is_torn_while_the_executor_writes(reader: LedgerReader, path: Path) -> None:
    seen = 0
    with executor(path, 1.5, 8) as process:
        while process.poll() is None:
            for slot in reader.slots():
                number = slot.task.rpartition(".")[2]
                assert slot.handle == HANDLE.format(number), slot
                seen += 1
    assert process.returncode == 0
    assert seen > 100


@pytest.mark.parametrize("burst", [1, 16, 256])
def test_each_delivery_is_run_or_stolen_and_never_both(reader: LedgerReader, path: Path, burst: int) -> None:
    if not barrier_register() or not barrier():
        pytest.skip("this system has no membarrier: nothing is ever stolen")
    stolen: list[int] = []
    process = executor(path, 1.5, burst)
    while process.poll() is None:
        stolen.extend(int(slot.task.rpartition(".")[2]) for slot in reader.steal())
    total, ran_line = _result(path).read_text().splitlines()
    ran = [int(number) for number in ran_line.split()]
    assert process.returncode == 0
    assert len(ran) == len(set(ran))
    assert len(stolen) == len(set(stolen))
    assert not set(ran) & set(stolen)
    assert len(ran) + len(stolen) == int(total)
    assert stolen


def test_a_killed_executors_ledger_can_be_read(reader: LedgerReader, path: Path) -> None:
    for _ in range(10):
        process = executor(path, 60.0, 32)
        deadline = time.monotonic() + 10
        while not reader.slots() and time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        for slot in reader.slots():
            assert slot.handle == HANDLE.format(slot.task.rpartition(".")[2])
        assert len(reader.slots()) <= 32
        # The next executor of the test begins with an empty ledger.
        left = Ledger(str(path))
        for slot in reader.slots():
            left.clear(slot.number)
        left.close()
