"""The manager's folder on disk: who uses it, folders of sessions, captured output, notes of processes.

    work_dir/
      manager.lock            held while a manager lives; says which
      sessions/<session>/     where the session's services start, if their application names no folder
      output/                 what executors write, until it has been read
      executors/<executor>    a note of each process, for a manager that comes after a crash
      templates/              where templates listen, and what they write

Nothing here awaits but the removal of a session's folder, which may hold anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flame.errors import ConfigurationError

_PRIVATE = 0o700
_REMOVE_S: Final = 0.2
"""How long a folder that nobody uses any more may stay."""


@dataclass(frozen=True, slots=True)
class ProcessNote:
    """Which process an executor is, to be recognised by a later manager."""

    executor: str
    """Or another name that begins with ``~``: a template's."""
    pid: int
    """Of the leader of its group."""
    identity: str
    """See `flame_services.executor_manager.process.identity`."""

    @property
    def is_template(self) -> bool:
        """Whether it is of a template, whose children are executors."""
        return self.executor.startswith("~")


class WorkFolder:
    """One manager's folder. Use `claim` first."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is touched."""
        self.path = path
        self._lock = -1
        self._sessions: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._refuse: list[Path] = []
        """Folders of sessions that are to be removed."""
        self._removal: asyncio.Task[None] | None = None

    def claim(self) -> None:
        """Create the folder and take it for this process; raise `ConfigurationError` if that can't be."""
        try:
            self.path.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            lock = os.open(self.path / "manager.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigurationError(f"work_dir {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _read_json(self.path / "manager.lock")
            os.close(lock)
            who = f" (process {holder['pid']}, node {holder['node']})" if {"pid", "node"} <= holder.keys() else ""
            raise ConfigurationError(
                f"work_dir {self.path} is used by another executor manager{who}: "
                f"stop that one, or give this one a folder of its own with --work-dir"
            ) from None
        self._lock = lock
        for name in ("sessions", "output", "executors", "templates"):
            (self.path / name).mkdir(mode=_PRIVATE, exist_ok=True)

    def clear(self) -> None:
        """Remove what a manager that was killed left here, its processes being gone."""
        for remains in (self.path / "sessions").iterdir():
            shutil.rmtree(remains, ignore_errors=True)
        for remains in (*(self.path / "output").iterdir(), *self.templates.iterdir()):
            remains.unlink(missing_ok=True)

    def release(self) -> None:
        """Let another manager have the folder. Safe before `claim`, and again."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def last_user(self) -> dict[str, Any]:
        """Return what the last manager `sign` ed with: it is gone, since the folder is ours now."""
        return _read_json(self.path / "manager.lock")

    def sign(self, node: str, started: float) -> None:
        """Say who uses the folder."""
        text = json.dumps({"pid": os.getpid(), "node": node, "started": started})
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, text.encode(), 0)

    # ---- sessions

    def enter_session(self, session: str) -> Path:
        """Return the folder of a session; it stays until each who entered has left."""
        folder = self.path / "sessions" / session
        folder.mkdir(mode=_PRIVATE, exist_ok=True)
        self._sessions[session] += 1
        return folder

    def leave_session(self, session: str) -> None:
        """Say that one who entered is gone; the last one's folder is removed with all it holds."""
        self._sessions[session] -= 1
        if self._sessions[session] > 0:
            return
        del self._sessions[session]
        # Renamed, since the session may come back before its old folder is emptied. That takes a disk its time.
        refuse = self.path / "sessions" / f".{next(self._numbers)}"
        with contextlib.suppress(OSError):
            (self.path / "sessions" / session).rename(refuse)
            self._refuse.append(refuse)
            if self._removal is None or self._removal.done():
                self._removal = asyncio.create_task(self._remove_later(), name="removal of folders")

    async def _remove_later(self) -> None:
        """Remove what is left behind, much at once where many sessions end."""
        await asyncio.sleep(_REMOVE_S)
        while self._refuse:
            await asyncio.to_thread(_remove_trees, self._take_refuse())

    async def removals(self) -> None:
        """Return when what was to be removed is."""
        await asyncio.to_thread(_remove_trees, self._take_refuse())
        if self._removal is not None:
            await asyncio.wait([self._removal])

    def _take_refuse(self) -> list[Path]:
        refuse, self._refuse = self._refuse, []
        return refuse

    # ---- output

    def open_output(self, session: str, executor: str) -> tuple[tuple[Path, int], tuple[Path, int]]:
        """Create the files for standard output and error; return paths and descriptors, which the caller closes.

        Appending, so that a manager that frees what was read never moves the writer.
        """
        folder = self.path / "output"
        stdout, stderr = folder / f"{session}.{executor}.stdout", folder / f"{session}.{executor}.stderr"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC
        descriptor = os.open(stdout, flags, 0o600)
        try:
            return (stdout, descriptor), (stderr, os.open(stderr, flags, 0o600))
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def templates(self) -> Path:
        """The folder in which templates listen and work."""
        return self.path / "templates"

    def open_template_output(self, application: str) -> int:
        """Empty the file for what an application's template writes; return a descriptor, which the caller closes."""
        return os.open(
            self.templates / f"{application}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC, 0o600
        )

    # ---- notes of processes

    def note_process(self, note: ProcessNote) -> None:
        """Keep a note of a process that was started, before anything else can happen to this one."""
        file = self.path / "executors" / note.executor
        text = f"{note.pid} {note.identity}"
        try:
            file.symlink_to(text)  # a link to nowhere is there at once and as a whole, which no file is
        except FileExistsError:
            file.unlink()
            file.symlink_to(text)

    def forget_process(self, executor: str) -> None:
        """Drop the note of a process that is gone."""
        with contextlib.suppress(OSError):
            (self.path / "executors" / executor).unlink(missing_ok=True)

    def process_notes(self) -> list[ProcessNote]:
        """Return the notes that were not dropped; one that can't be read is none."""
        notes = []
        for file in sorted((self.path / "executors").iterdir()):
            try:
                pid, _, identity = str(file.readlink()).partition(" ")
                notes.append(ProcessNote(file.name, int(pid), identity))
            except (OSError, ValueError):
                file.unlink(missing_ok=True)
        return notes


def _remove_trees(paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def _read_json(file: Path) -> dict[str, Any]:
    """Return the map that a file holds; an empty one if it can't be read or holds something else."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
