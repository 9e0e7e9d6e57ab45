"""What an executor manager is told, and its folder."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from flame.errors import ConfigurationError
from flame.protocol.resources import Resources
from flame.protocol.subjects import to_token
from flame_services.executor_manager.settings import ManagerSettings, node_record
from flame_services.executor_manager.work_folder import ProcessNote, WorkFolder
from flame_services.program import read_settings


def read(*argv: str) -> ManagerSettings:
    return read_settings("flame-executor-manager", "", ManagerSettings, argv)


def test_what_is_not_given_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = read()
    assert settings.node_name == to_token(socket.gethostname())
    assert settings.work_dir == Path("/home/somebody/.flame/node")
    assert settings.capacity().memory == psutil.virtual_memory().total
    assert settings.capacity().cpu >= 1
    record = node_record(settings, 5.0)
    assert (record.name, record.started, record.beat) == (settings.node_name, 5.0, 0)


def test_what_is_given_counts() -> None:
    settings = read("--node", "n1", "--cpu", "1.5", "--memory", "512m", "--gpu", "2", "--work-dir", "/w")
    assert settings.capacity() == Resources(1.5, 512 * 1024**2, 2)
    assert (settings.node_name, settings.work_dir) == ("n1", Path("/w"))


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--node", "a.b"], "node: node 'a.b' is not a legal name"),
        (["--memory", "much"], "memory: 'much' is no amount of memory: expected bytes, such as 512m or 16g"),
        (["--cpu", "0"], "cpu: Input should be greater than 0"),
        (["--stop-timeout-s", "900"], "stop_timeout_s: Input should be less than or equal to 40"),
        (["--ready-timeout-s", "nan"], "ready_timeout_s: "),
    ],
)
def test_what_is_wrong_is_named(argv: list[str], text: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        read(*argv)
    assert text in str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> WorkFolder:
    folder = WorkFolder(tmp_path / "work")
    folder.claim()
    return folder


def test_a_folder_has_one_user_at_a_time(folder: WorkFolder) -> None:
    folder.sign("n1", 7.0)
    other = WorkFolder(folder.path)
    with pytest.raises(ConfigurationError, match=r"is used by another executor manager \(process \d+, node n1\)"):
        other.claim()
    folder.release()
    folder.release()
    other.claim()
    assert other.last_user()["started"] == 7.0
    other.release()


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"work_dir .*/file/w: Not a directory"):
        WorkFolder(tmp_path / "file" / "w").claim()


async def test_a_sessions_folder_stays_until_the_last_has_left(folder: WorkFolder) -> None:
    path = folder.enter_session("s0")
    folder.leave_session("s0")
    assert not path.exists()
    path = folder.enter_session("s1")
    assert folder.enter_session("s1") == path
    (path / "file").touch()
    folder.leave_session("s1")
    assert path.is_dir()
    folder.leave_session("s1")
    assert not path.exists()
    again = folder.enter_session("s1")
    assert not (again / "file").exists()
    await folder.removals()
    assert again.is_dir()
    assert len(list(path.parent.iterdir())) == 1
    folder.release()


def test_notes_of_processes_survive_their_writer(folder: WorkFolder) -> None:
    notes = [ProcessNote("e1", 1, "boot 5"), ProcessNote("e2", 2, "boot 6")]
    for note in notes:
        folder.note_process(note)
    folder.note_process(ProcessNote("e2", 3, "boot 7"))
    folder.note_process(notes[1])
    (folder.path / "executors" / "e3").write_text("{")
    (folder.path / "executors" / "e4").symlink_to("elsewhere")
    folder.release()
    later = WorkFolder(folder.path)
    later.claim()
    assert later.process_notes() == notes
    later.forget_process("e1")
    later.forget_process("e1")
    assert later.process_notes() == notes[1:]
    later.release()


def test_what_a_killed_manager_left_can_be_cleared(folder: WorkFolder) -> None:
    (folder.enter_session("s1") / "file").touch()
    for _, descriptor in folder.open_output("s1", "e1"):
        os.close(descriptor)
    folder.clear()
    assert list((folder.path / "sessions").iterdir()) == []
    assert list((folder.path / "output").iterdir()) == []
    folder.release()
