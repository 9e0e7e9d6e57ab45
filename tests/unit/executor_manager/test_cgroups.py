"""Control groups, in folders that stand for the system's."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flame.protocol.resources import Resources
from flame_services.executor_manager import cgroups
from flame_services.executor_manager.cgroups import Cgroup, Cgroups, Given, find_given, hierarchies, limits_of

MEBIBYTE = 1024**2
HALF = Resources(cpu=0.5, memory=128 * MEBIBYTE)


@dataclass
class Kernel:
    """What is behind the files of groups."""

    root: Path
    files: dict[str, str] = field(default_factory=dict)
    written: list[tuple[str, str]] = field(default_factory=list)
    busy: set[str] = field(default_factory=set)
    """Groups that have processes, and so can't offer controllers."""
    missing: set[str] = field(default_factory=set)

    def name(self, file: Path) -> str:
        return str(file.relative_to(self.root))

    def read(self, file: Path) -> str:
        return self.files.get(self.name(file), "")

    def write(self, file: Path, value: str) -> None:
        name, group = self.name(file), self.name(file.parent)
        if file.name in self.missing:
            raise FileNotFoundError(errno.ENOENT, "no such file")
        if file.name == "cgroup.subtree_control" and group in self.busy:
            raise OSError(errno.EBUSY, "busy")
        if file.name == "cgroup.procs":
            self.busy.clear()
        self.written.append((name, value))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path)
    monkeypatch.setattr(cgroups, "_read", made.read)
    monkeypatch.setattr(cgroups, "_write", made.write)
    return made


def mountinfo(*lines: tuple[str, Path, str, str]) -> str:
    return "\n".join(
        f"30 20 0:26 {root} {path} rw,nosuid shared:9 - {kind} cgroup {options}" for root, path, kind, options in lines
    )


class TestWhatIsGiven:
    def test_trees_are_found(self, tmp_path: Path) -> None:
        text = mountinfo(
            ("/", tmp_path / "unified", "cgroup2", "rw,nsdelegate"),
            ("/docker/5", tmp_path / "memory", "cgroup", "rw,memory"),
            ("/", tmp_path / "cpu", "cgroup", "rw,cpu,cpuacct"),
            ("/", tmp_path / "pids", "cgroup", "rw,pids"),
            ("/", tmp_path / "disk", "ext4", "rw"),
        )
        found = [(tree.version, tree.path.name, tree.root, tree.controllers) for tree in hierarchies(text)]
        assert found == [
            (2, "unified", "/", ()),
            (1, "memory", "/docker/5", ("memory",)),
            (1, "cpu", "/", ("cpu",)),
            (1, "pids", "/", ()),
        ]
        assert hierarchies("") == []

    def test_a_process_is_in_one_group_of_each(self, tmp_path: Path) -> None:
        text = mountinfo(("/", tmp_path / "u", "cgroup2", "rw"), ("/docker/5", tmp_path / "m", "cgroup", "rw,memory"))
        unified, memory = hierarchies(text)
        membership = "4:memory:/docker/5/app\n1:cpu,cpuacct:/x\n0::/user.slice/a.service\n"
        assert unified.own_group(membership) == tmp_path / "u" / "user.slice" / "a.service"
        assert memory.own_group(membership) == tmp_path / "m" / "app"
        assert memory.own_group("") == tmp_path / "m"

    def test_a_named_group_counts_in_each_tree_that_has_it(self, kernel: Kernel) -> None:
        for name in ("memory/flame", "cpu/other", "u/flame"):
            (kernel.root / name).mkdir(parents=True)
        kernel.files["u/flame/cgroup.controllers"] = "cpuset cpu io"
        text = mountinfo(
            ("/", kernel.root / "memory", "cgroup", "rw,memory"),
            ("/", kernel.root / "cpu", "cgroup", "rw,cpu"),
            ("/", kernel.root / "u", "cgroup2", "rw"),
        )
        assert find_given("/flame", text, "0::/elsewhere") == [
            Given(1, kernel.root / "memory" / "flame", ("memory",)),
            Given(2, kernel.root / "u" / "flame", ("cpu",)),
        ]

    @pytest.mark.parametrize(("user", "given"), [(1000, True), (1001, False), (0, False)])
    def test_its_own_group_counts_if_it_was_delegated(
        self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, user: int, given: bool
    ) -> None:
        """That root may write it says nothing."""
        own = kernel.root / "a.service"
        own.mkdir()
        kernel.files["a.service/cgroup.controllers"] = "memory cpu"
        monkeypatch.setattr(os, "getuid", lambda: user)
        monkeypatch.setattr(Path, "stat", lambda self: os.stat_result((0, 0, 0, 0, 1000, 0, 0, 0, 0, 0)))
        text = mountinfo(("/", kernel.root, "cgroup2", "rw"))
        assert bool(find_given("", text, "0::/a.service")) is given

    def test_systemd_says_what_it_delegates(self, tmp_path: Path) -> None:
        try:
            os.setxattr(tmp_path, "user.delegate", b"1")
        except OSError:
            pytest.skip("no attributes here")
        assert cgroups.is_delegated(tmp_path)
        os.setxattr(tmp_path, "user.delegate", b"0")
        assert cgroups.is_delegated(tmp_path) is (os.getuid() != 0)


class TestVersion2:
    def test_an_executor_gets_a_group_and_nothing_is_left(self, kernel: Kernel) -> None:
        groups = Cgroups([Given(2, kernel.root, ("memory", "cpu"))], "n1")
        groups.claim()
        assert groups.versions == {"memory": 2, "cpu": 2}
        group = groups.make("e1", HALF, memory=True, cpu=True)
        group.take([7, 8])
        assert kernel.written == [
            ("cgroup.subtree_control", "+cpu +memory"),
            ("flame-n1/cgroup.subtree_control", "+cpu +memory"),
            ("flame-n1/e1/memory.max", str(128 * MEBIBYTE)),
            ("flame-n1/e1/memory.swap.max", "0"),
            ("flame-n1/e1/memory.oom.group", "1"),
            ("flame-n1/e1/cpu.weight", "50"),
            ("flame-n1/e1/cgroup.procs", "7"),
            ("flame-n1/e1/cgroup.procs", "8"),
        ]
        assert (kernel.root / "flame-n1" / "e1").is_dir()
        group.remove()
        groups.release()
        groups.release()
        assert list(kernel.root.iterdir()) == []

    def test_who_is_in_the_way_is_moved_aside_and_back(self, kernel: Kernel) -> None:
        kernel.busy = {"."}
        kernel.files["cgroup.procs"] = kernel.files["flame-n1.manager/cgroup.procs"] = "41\n42\n"
        groups = Cgroups([Given(2, kernel.root, ("memory",))], "n1")
        groups.claim()
        assert kernel.written == [
            ("flame-n1.manager/cgroup.procs", "41"),
            ("flame-n1.manager/cgroup.procs", "42"),
            ("cgroup.subtree_control", "+memory"),
            ("flame-n1/cgroup.subtree_control", "+memory"),
        ]
        kernel.written.clear()
        groups.release()
        assert kernel.written == [
            ("cgroup.subtree_control", "-memory"),
            ("cgroup.procs", "41"),
            ("cgroup.procs", "42"),
        ]
        assert list(kernel.root.iterdir()) == []

    def test_what_the_system_refuses_is_not_used(self, kernel: Kernel) -> None:
        kernel.missing = {"cgroup.subtree_control"}
        groups = Cgroups([Given(2, kernel.root, ("memory",))], "n1")
        groups.claim()
        assert groups.versions == {}
        assert list(kernel.root.iterdir()) == []

    def test_an_older_kernel_lacks_some_files(self, kernel: Kernel) -> None:
        kernel.missing = {"memory.swap.max", "memory.oom.group"}
        groups = Cgroups([Given(2, kernel.root, ("memory",))], "n1")
        groups.claim()
        groups.make("e1", HALF, memory=True, cpu=False)
        kernel.missing = {"memory.max"}
        with pytest.raises(FileNotFoundError):
            groups.make("e2", HALF, memory=True, cpu=False)

    @pytest.mark.parametrize(("text", "killed"), [("low 0\noom 1\noom_kill 2\n", True), ("oom_kill 0\n", False)])
    def test_a_kill_is_noticed(self, kernel: Kernel, text: str, killed: bool) -> None:
        kernel.files["e1/memory.events"] = text
        assert Cgroup((kernel.root / "e1",)).has_killed() is killed


class TestVersion1:
    def test_each_controller_has_its_tree(self, kernel: Kernel) -> None:
        for name in ("memory", "cpu"):
            (kernel.root / name).mkdir()
        given = [Given(1, kernel.root / name, (name,)) for name in ("memory", "cpu")]
        left = kernel.root / "memory" / "flame-n1" / "left"
        left.mkdir(parents=True)
        groups = Cgroups(given, "n1")
        groups.claim()
        groups.clear()
        assert not left.exists()
        assert groups.versions == {"memory": 1, "cpu": 1}
        group = groups.make("e1", HALF, memory=True, cpu=True)
        group.take([7])
        assert kernel.written == [
            ("memory/flame-n1/e1/memory.limit_in_bytes", str(128 * MEBIBYTE)),
            ("cpu/flame-n1/e1/cpu.shares", "512"),
            ("memory/flame-n1/e1/cgroup.procs", "7"),
            ("cpu/flame-n1/e1/cgroup.procs", "7"),
        ]
        kernel.files["memory/flame-n1/e1/memory.oom_control"] = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"
        assert group.has_killed()
        group.remove()
        groups.release()
        assert sorted(path.name for path in kernel.root.rglob("*")) == ["cpu", "memory"]

    def test_one_that_is_held_otherwise_has_none(self, kernel: Kernel) -> None:
        (kernel.root / "memory").mkdir()
        groups = Cgroups([Given(1, kernel.root / "memory", ("memory",))], "n1")
        groups.claim()
        assert groups.make("e1", HALF, memory=False, cpu=True) == Cgroup(())


@pytest.mark.parametrize(
    ("version", "resources", "limits"),
    [
        (2, Resources(), {"cpu.weight": "1"}),
        (1, Resources(), {"cpu.shares": "2"}),
        (2, Resources(cpu=1000), {"cpu.weight": "10000"}),
        (1, Resources(cpu=1000), {"cpu.shares": "262144"}),
    ],
)
def test_amounts_are_within_what_the_system_takes(version: int, resources: Resources, limits: dict[str, str]) -> None:
    assert limits_of(version, ("memory", "cpu"), resources) == limits
