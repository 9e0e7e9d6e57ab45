"""The folder that an embedded broker keeps everything in, and who may use it.

Two locks guard it. ``lock`` belongs to the owner and says "this folder is taken". ``store.lock`` is inherited
by guard and server and held until both have ended, so it tells whether a server still writes to the store.
Both are advisory locks of the kernel (``flock``): they vanish with the processes that hold them, killed or
not.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

from flame.broker.embedded.errors import DataDirInUse
from flame.errors import ConfigurationError

_TAIL_BYTES = 16 * 1024
_TAIL_LINES = 20


class DataFolder:
    """One data folder: claimed by one owner at a time, released by `release` or the owner's death."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is touched before `claim`."""
        self.path = path.absolute()
        self.config_file = self.path / "nats-server.conf"
        self.log_file = self.path / "nats-server.log"
        self.ports_dir = self.path / "ports"
        self._owner_lock_file = self.path / "lock"
        self._store_lock_file = self.path / "store.lock"
        self._owner_lock: int | None = None

    def claim(self) -> None:
        """Create the folder if need be and take it for this process.

        Raises:
            DataDirInUse: another broker has it, of this process or another.
            ConfigurationError: it can't be created or written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.ports_dir.mkdir(mode=0o700, exist_ok=True)
            self._owner_lock = lock = _open_lock(self._owner_lock_file)
            taken = _try_lock(lock)
            if taken:
                _write_pid(lock, os.getpid())
        except OSError as error:
            self.release()
            raise ConfigurationError(
                f"data folder {self.path} can't be used, expected a folder that this process may create and "
                f"write: {error.strerror}"
            ) from error
        if not taken:
            holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
            self.release()
            raise DataDirInUse(f"data folder {self.path} is used by process {holder or 'unknown'}")

    def try_claim_store(self) -> int | None:
        """Return a descriptor that holds the store's lock, or None while an earlier server has it.

        The caller hands it to guard and server and closes its own.
        """
        lock = _open_lock(self._store_lock_file)
        if _try_lock(lock):
            return lock
        os.close(lock)
        return None

    def store_is_free(self) -> bool:
        """Whether no guard and no server is left, dying ones included."""
        try:
            lock = self.try_claim_store()
        except OSError:  # the folder was removed: nobody can have it
            return True
        if lock is not None:
            os.close(lock)
        return lock is not None

    def store_in_use(self) -> DataDirInUse:
        """Return the error that says which process still holds the store."""
        holder = self._store_lock_file.read_text("ascii", "replace").strip()
        return DataDirInUse(
            f"data folder {self.path} is still used by process {holder or 'unknown'}, which guards the "
            f"server of an owner that was killed"
        )

    @staticmethod
    def note_store_holder(store_lock: int, pid: int) -> None:
        """Write down who holds the store's lock, for `store_in_use`."""
        _write_pid(store_lock, pid)

    def prepare(self, configuration: str) -> None:
        """Write the server's configuration, put the last run's log aside and forget the last run's ports."""
        descriptor = os.open(self.config_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, 0o600)
            file.write(configuration)
        if self.log_file.exists():
            self.log_file.replace(self.log_file.with_name(f"{self.log_file.name}.1"))
        for stale in self.ports_dir.glob("*.ports"):
            stale.unlink(missing_ok=True)

    def port_of(self, pid: int) -> int | None:
        """Return the port that the server with this process id listens on; None until it has said so."""
        for file in self.ports_dir.glob(f"*_{pid}.ports"):
            try:
                url: str = json.loads(file.read_bytes())["nats"][0]
                return urlsplit(url).port
            except (FileNotFoundError, ValueError):
                return None  # the server is writing it
        return None

    def log_tail(self) -> str:
        """Return the last lines of the server's log; empty if there is none."""
        try:
            with self.log_file.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-_TAIL_LINES:])

    def release(self) -> None:
        """Let others claim the folder; safe to call when it is not claimed.

        Also right in a forked child: closing its copy leaves the parent's claim alone.
        """
        lock, self._owner_lock = self._owner_lock, None
        if lock is not None:
            os.close(lock)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_pid(descriptor: int, pid: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{pid}\n".encode("ascii"), 0)
