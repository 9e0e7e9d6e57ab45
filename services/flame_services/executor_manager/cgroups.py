"""Control groups of the system, version 1 or 2: a subtree that is this manager's, with one group for each executor.

Nothing is touched outside a group that was given to the manager: one that an administrator names, or its own if whoever
started it has delegated that (systemd's ``Delegate=``; a group that belongs to the manager's user).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flame.logs import get_logger
from flame.protocol.resources import Resources

log = get_logger("flame.manager.cgroups")

CONTROLLERS: Final = ("memory", "cpu")
_PROCESSES: Final = "cgroup.procs"
_CHILDREN: Final = "cgroup.subtree_control"
_PREFIX: Final = "flame-"
_DELEGATED: Final = ("user.delegate", "trusted.delegate")
"""Attributes that systemd sets on what it has delegated."""
_MOUNT: Final = re.compile(r"^(?:\S+ ){3}(?P<root>\S+) (?P<path>\S+) .* - (?P<type>cgroup2?) \S+ (?P<options>\S+)$")


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted tree of control groups."""

    version: int
    path: Path
    """Where it is mounted."""
    root: str
    """Which of its groups is there."""
    controllers: tuple[str, ...]
    """Of version 1; those of version 2 differ from group to group."""

    def own_group(self, membership: str) -> Path:
        """Return the folder of the group that a process is in, from its ``/proc/<pid>/cgroup``."""
        for line in membership.splitlines():
            _, names, group = line.split(":", 2)
            if (self.version == 2 and not names) or (set(names.split(",")) & set(self.controllers)):
                inside = group.removeprefix(self.root) if self.root != "/" else group
                return self.path / inside.strip("/")
        return self.path


def hierarchies(mounts: str) -> list[Hierarchy]:
    """Return the trees that are mounted, from ``/proc/self/mountinfo``."""
    found = []
    for line in mounts.splitlines():
        match = _MOUNT.match(line)
        if match is not None:
            version = 2 if match["type"] == "cgroup2" else 1
            names = tuple(set(match["options"].split(",")) & set(CONTROLLERS)) if version == 1 else ()
            found.append(Hierarchy(version, Path(match["path"]), match["root"], names))
    return found


@dataclass(frozen=True, slots=True)
class Given:
    """A group that is the manager's to make others in, for one controller or more."""

    version: int
    path: Path
    controllers: tuple[str, ...]


def find_given(named: str, mounts: str, membership: str) -> list[Given]:
    """Return the groups that are the manager's. ``named`` is one that an administrator names, or empty."""
    found = []
    for tree in hierarchies(mounts):
        path = tree.path / named.strip("/") if named else tree.own_group(membership)
        controllers = tree.controllers if tree.version == 1 else _offered(path)
        if controllers and os.access(path, os.W_OK) and (named or is_delegated(path)):
            found.append(Given(tree.version, path, controllers))
    return found


def is_delegated(path: Path) -> bool:
    """Whether a group was handed to this process's user: root may write all, which says nothing."""
    with contextlib.suppress(OSError):
        if any(os.getxattr(path, name) == b"1" for name in _DELEGATED if _has(path, name)):
            return True
        return os.getuid() != 0 and path.stat().st_uid == os.getuid()
    return False


def _has(path: Path, attribute: str) -> bool:
    return attribute in os.listxattr(path)


def _offered(path: Path) -> tuple[str, ...]:
    try:
        offered = _read(path / "cgroup.controllers").split()
    except OSError:
        return ()
    return tuple(name for name in CONTROLLERS if name in offered)


class Cgroups:
    """The subtree of one manager."""

    def __init__(self, given: Iterable[Given], node: str) -> None:
        """Name the groups; nothing is touched before `claim`."""
        self.versions: dict[str, int] = {}
        """Of each controller that is there, once claimed."""
        self._given: Final = tuple(given)
        self._node: Final = node
        self._trees: list[tuple[Given, Path]] = []

    def claim(self) -> None:
        """Make the subtree, as far as the system lets us."""
        for given in self._given:
            folder = given.path / f"{_PREFIX}{self._node}"
            try:
                folder.mkdir(exist_ok=True)
                if given.version == 2:
                    self._offer(given)
                    _enable(folder, given.controllers)
            except OSError as error:
                log.info("a control group can't be used", path=str(given.path), reason=error.strerror)
                with contextlib.suppress(OSError):
                    folder.rmdir()
                self._move_back(given)
                continue
            self._trees.append((given, folder))
            self.versions |= dict.fromkeys(given.controllers, given.version)

    def clear(self) -> None:
        """Remove the groups of executors; they are gone."""
        for _, folder in self._trees:
            for group in folder.glob("*/"):
                with contextlib.suppress(OSError):
                    group.rmdir()

    def _offer(self, given: Given) -> None:
        """Let groups below have controllers, for which no process may be in the group itself: this one is, mostly."""
        try:
            _enable(given.path, given.controllers)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            aside = self._aside(given)
            aside.mkdir(exist_ok=True)
            _move(given.path, aside)
            _enable(given.path, given.controllers)

    def _aside(self, given: Given) -> Path:
        return given.path / f"{_PREFIX}{self._node}.manager"

    def _move_back(self, given: Given) -> None:
        """Undo `_offer`, as far as that goes."""
        aside = self._aside(given)
        if aside.is_dir():
            with contextlib.suppress(OSError):
                _write(given.path / _CHILDREN, " ".join(f"-{name}" for name in given.controllers))
                _move(aside, given.path)
                aside.rmdir()

    def make(self, executor: str, resources: Resources, *, memory: bool, cpu: bool) -> Cgroup:
        """Make a group for an executor that is held to some of its resources; raise `OSError`."""
        folders = []
        for given, tree in self._trees:
            wanted = {"memory": memory, "cpu": cpu}
            limits = limits_of(given.version, [name for name in given.controllers if wanted[name]], resources)
            if not limits:
                continue
            folder = tree / executor
            folder.mkdir(exist_ok=True)
            folders.append(folder)
            for file, value in limits.items():
                _set(folder / file, value)
        return Cgroup(tuple(folders))

    def release(self) -> None:
        """Remove the subtree; no executor lives. Safe to call again."""
        self.clear()
        for given, folder in self._trees:
            with contextlib.suppress(OSError):
                folder.rmdir()
            self._move_back(given)
        self._trees.clear()


def limits_of(version: int, controllers: Iterable[str], resources: Resources) -> Mapping[str, str]:
    """Return what is written to which file of a group to hold an executor to its resources.

    Memory is a limit. Processors are a share: what others don't use is there for whoever wants it.
    """
    limits: dict[str, str] = {}
    if "memory" in controllers and resources.memory:
        if version == 2:
            limits |= {"memory.max": str(resources.memory), "memory.swap.max": "0", "memory.oom.group": "1"}
        else:
            limits |= {"memory.limit_in_bytes": str(resources.memory)}
    if "cpu" in controllers:
        if version == 2:
            limits |= {"cpu.weight": str(min(10_000, max(1, round(resources.cpu * 100))))}
        else:
            limits |= {"cpu.shares": str(min(262_144, max(2, round(resources.cpu * 1024))))}
    return limits


_OPTIONAL: Final = ("memory.swap.max", "memory.oom.group")
"""What not every kernel has."""


def _set(file: Path, value: str) -> None:
    try:
        _write(file, value)
    except OSError:
        if file.name not in _OPTIONAL:
            raise


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One executor's group: a folder in each tree."""

    folders: tuple[Path, ...]

    def take(self, pids: Iterable[int]) -> None:
        """Put processes into it; what they start later is in it too. Raises `OSError` if that can't be."""
        for folder in self.folders:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    _write(folder / _PROCESSES, str(pid))

    def has_killed(self) -> bool:
        """Whether the system has ended something in it that wanted more memory."""
        for folder in self.folders:
            for file in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError):
                    fields = dict(line.split()[:2] for line in _read(folder / file).splitlines())
                    if fields.get("oom_kill", "0") != "0":
                        return True
        return False

    def remove(self) -> None:
        """Remove it; its processes are gone."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _enable(folder: Path, controllers: Iterable[str]) -> None:
    """Let groups below have controllers."""
    file = folder / _CHILDREN
    missing = set(controllers) - set(_read(file).split())
    if missing:
        _write(file, " ".join(f"+{name}" for name in sorted(missing)))


def _move(source: Path, target: Path) -> None:
    """Put the processes of one group into another."""
    for pid in _read(source / _PROCESSES).split():
        with contextlib.suppress(ProcessLookupError):
            _write(target / _PROCESSES, pid)


def _read(file: Path) -> str:
    return file.read_text(encoding="ascii")


def _write(file: Path, value: str) -> None:
    descriptor = os.open(file, os.O_WRONLY)
    try:
        os.write(descriptor, value.encode("ascii"))
    finally:
        os.close(descriptor)
