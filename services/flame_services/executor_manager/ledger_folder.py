"""Where the ledgers of a node are: a folder in memory, which goes with its manager."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import Final

from flame.errors import FlameError
from flame.ledger import LedgerReader
from flame.logs import get_logger

log = get_logger("flame.manager.keeper")

SHARED_MEMORY: Final = Path("/dev/shm")
STALE_S: Final = 600.0
"""Ledgers that no manager has kept for this long are of no use to a successor: their leases are over."""
_LOCK: Final = "lock"


class LedgerFolder:
    """One manager's folder of ledgers. Use `claim` first, and `release` when no ledger is in use any more."""

    def __init__(self, node: str, work_folder: Path) -> None:
        """Name the folder; nothing is touched. ``work_folder`` is locked by its manager."""
        self._in_memory = SHARED_MEMORY.is_dir()
        # The work folder's inode tells two nodes of one name apart.
        name = f"flame-{work_folder.stat().st_ino}-{node}"
        self.path: Final = SHARED_MEMORY / name if self._in_memory else work_folder / "ledgers"
        self._lock = -1

    def claim(self) -> None:
        """Make the folder and take it, so that nobody removes it; what an earlier manager left there stays.

        Removes what managers of this user have left in memory long ago.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.utime(self.path)  # whoever looks whether it is stale sees that it is not
            with contextlib.suppress(BlockingIOError):  # somebody is looking
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            log.warning(
                "no folder for ledgers; executors keep their own leases", path=str(self.path), reason=str(error)
            )
        if self._in_memory:
            for other in SHARED_MEMORY.glob("flame-*-*"):
                if other != self.path and is_stale(other):
                    log.info("removing the ledgers of a manager that is gone", path=str(other))
                    remove(other)

    def release(self) -> None:
        """Remove the folder, with any ledger that is left: no executor lives. Safe to call again."""
        if self._lock >= 0:
            remove(self.path)
            os.close(self._lock)
            self._lock = -1


def is_stale(folder: Path) -> bool:
    """Whether a folder of ledgers is this user's, its manager gone, and none of them kept for long."""
    try:
        if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
            return False
        ledgers = list(folder.glob("*.ledger"))
        if {file.name for file in folder.iterdir()} - {file.name for file in ledgers} - {_LOCK}:
            return False  # not one of ours, whatever its name
        return _is_unlocked(folder / _LOCK) and all(_is_old(ledger) for ledger in (*ledgers, folder))
    except OSError:
        return False


def remove(folder: Path) -> None:
    """Remove a folder of ledgers."""
    with contextlib.suppress(OSError):
        for file in (*folder.glob("*.ledger"), folder / _LOCK):
            file.unlink(missing_ok=True)
        folder.rmdir()


def _is_unlocked(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_old(path: Path) -> bool:
    if path.is_dir():
        return time.time() - path.stat().st_mtime > STALE_S
    try:
        reader = LedgerReader(path)
    except FlameError:
        return time.time() - path.stat().st_mtime > STALE_S  # of another version
    try:
        return time.monotonic() - reader.manager_tick > STALE_S
    finally:
        reader.close(remove=False)
