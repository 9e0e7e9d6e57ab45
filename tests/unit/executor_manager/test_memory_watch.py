"""How much memory counts as an executor's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from flame_services.executor_manager.footprint import Footprint, footprint, members, resident
from flame_services.executor_manager.memory_watch import MemoryWatch, Watched

MEBIBYTE = 1024**2


@pytest.mark.parametrize(
    ("found", "inherited", "used"),
    [
        (Footprint(proportional=60, private=50, shared=20), 0, 60),
        (Footprint(proportional=110, private=10, shared=200), 200, 10),
        (Footprint(proportional=340, private=10, shared=660), 200, 140),
    ],
    ids=["a process of its own", "a fork", "a fork that shares what it has made with its own children"],
)
def test_what_was_inherited_does_not_count_while_it_is_shared(found: Footprint, inherited: int, used: int) -> None:
    assert found.used(inherited) == used


@pytest.fixture
def group() -> Iterator[int]:
    """Two processes of one group with 64 MiB each; only one of them is the leader's own session."""
    code = f"""
import os, sys, time
kept = os.urandom({MEBIBYTE}) * 64
if os.fork() == 0:
    kept = bytearray(kept)
    os.setpgid(0, 0)
    print("child", flush=True)
    time.sleep(60)
print("leader", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {b"child\n", b"leader\n"}
    yield process.pid
    for pid in members({process.pid})[process.pid]:
        os.kill(pid, 9)
    process.wait()
    process.stdout.close()


def test_everything_of_a_group_or_session_counts_once(group: int) -> None:
    pids = members({group})[group]
    assert len(pids) == 2
    used = footprint(pids).used(0)
    assert 128 * MEBIBYTE < used < 180 * MEBIBYTE
    assert resident(pids) >= used
    assert resident([2**22 + 1]) == 0
    assert footprint([2**22 + 1]) == Footprint()


async def test_who_uses_too_much_is_told_once(group: int) -> None:
    watch = MemoryWatch()
    told: list[int] = []
    enough = Watched(group, 512 * MEBIBYTE, False, told.append)
    little = Watched(group, 100 * MEBIBYTE, False, told.append)
    watch.add(enough)
    watch.add(little)
    await watch.look()
    await watch.look()
    [used] = told
    assert used > 128 * MEBIBYTE
    watch.remove(little)
    watch.remove(enough)
    await watch.look()


async def test_what_a_fork_has_in_common_at_first_is_not_its_own(group: int) -> None:
    watch = MemoryWatch()
    told: list[int] = []
    watched = Watched(group, 100 * MEBIBYTE, True, told.append)
    watch.add(watched)
    await watch.look()
    assert watched.inherited > 0
    assert len(told) == 1, "what is private counts all the same"
