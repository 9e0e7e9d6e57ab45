"""The folder that a manager has in memory for its executors' ledgers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from flame.ledger import LedgerReader
from flame_services.executor_manager import ledger_folder
from flame_services.executor_manager.ledger_folder import STALE_S, LedgerFolder, is_stale


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(ledger_folder, "SHARED_MEMORY", folder)
    return folder


def make(tmp_path: Path, name: str) -> LedgerFolder:
    work = tmp_path / name
    work.mkdir()
    return LedgerFolder(name, work)


def ledger(folder: Path, kept_at: float) -> Path:
    path = folder / "e1.ledger"
    LedgerReader.create(path, kept_at, 15.0).close(remove=False)
    return path


def age(folder: Path) -> None:
    then = time.time() - STALE_S - 60
    os.utime(folder, (then, then))


def test_it_goes_with_its_manager(tmp_path: Path, memory: Path) -> None:
    folder = make(tmp_path, "n1")
    folder.claim()
    assert folder.path.parent == memory
    assert folder.path.stat().st_mode & 0o777 == 0o700
    ledger(folder.path, time.monotonic())
    folder.release()
    assert list(memory.iterdir()) == []
    folder.release()


def test_what_a_predecessor_left_in_it_stays(tmp_path: Path) -> None:
    folder = make(tmp_path, "n1")
    folder.path.mkdir()
    left = ledger(folder.path, time.monotonic() - 2 * STALE_S)
    age(folder.path)
    folder.claim()
    assert left.exists()
    folder.release()


def test_what_dead_managers_left_long_ago_is_removed(tmp_path: Path, memory: Path) -> None:
    dead = make(tmp_path, "dead")
    dead.claim()
    ledger(dead.path, time.monotonic() - 2 * STALE_S)
    os.close(dead._lock)
    empty = memory / "flame-17-of-an-older-version"
    empty.mkdir()
    for folder in (dead.path, empty):
        age(folder)
    living = make(tmp_path, "living")
    living.claim()
    assert list(memory.iterdir()) == [living.path]
    living.release()


def test_whatever_is_in_doubt_stays(tmp_path: Path, memory: Path) -> None:
    alive = make(tmp_path, "alive")
    alive.claim()
    recent, kept, foreign = memory / "flame-1-recent", memory / "flame-2-kept", memory / "flame-3-foreign"
    for folder in (recent, kept, foreign):
        folder.mkdir()
    ledger(kept, time.monotonic())
    (foreign / "letters").touch()
    link = memory / "flame-4-link"
    link.symlink_to(tmp_path, target_is_directory=True)
    for folder in (alive.path, kept, foreign):
        age(folder)
    found = {folder.name: is_stale(folder) for folder in (alive.path, recent, kept, foreign, link, memory / "none")}
    assert not any(found.values()), found
    alive.release()
