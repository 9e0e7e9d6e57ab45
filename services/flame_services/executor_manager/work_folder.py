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
import json
import os
import shutil
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import ConfigurationError

_PRIVATE = 0o700


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
        self._removals: set[asyncio.Task[None]] = set()

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
        # Renamed first: the session may come back while its old folder is still being emptied.
        refuse = self.path / "sessions" / f".{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            (self.path / "sessions" / session).rename(refuse)
            removal = asyncio.create_task(asyncio.to_thread(shutil.rmtree, refuse, ignore_errors=True))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)

    async def removals(self) -> None:
        """Wait until what was to be removed is."""
        await asyncio.gather(*self._removals, return_exceptions=True)

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
        draft = file.with_suffix(".new")  # no executor's name has a dot
        draft.write_text(json.dumps({"pid": note.pid, "identity": note.identity}), encoding="utf-8")
        draft.rename(file)

    def forget_process(self, executor: str) -> None:
        """Drop the note of a process that is gone."""
        with contextlib.suppress(OSError):
            (self.path / "executors" / executor).unlink(missing_ok=True)

    def process_notes(self) -> list[ProcessNote]:
        """Return the notes that were not dropped; one that can't be read is none."""
        notes = []
        for file in sorted((self.path / "executors").iterdir()):
            fields = {} if file.suffix else _read_json(file)
            try:
                notes.append(ProcessNote(file.name, int(fields["pid"]), str(fields["identity"])))
            except (KeyError, TypeError, ValueError):
                file.unlink(missing_ok=True)
        return notes


def _read_json(file: Path) -> dict[str, Any]:
    """Return the map that a file holds; an empty one if it can't be read or holds something else."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
