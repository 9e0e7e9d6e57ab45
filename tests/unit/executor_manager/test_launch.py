"""How a service is started: command, environment, folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from flame.protocol.records import ApplicationSpec
from flame_services.executor_manager.launch import (
    Launch,
    LaunchRefused,
    base_environment,
    executor_variables,
    plan_launch,
)


def plan(folder: Path, base: dict[str, str] | None = None, **spec: Any) -> Launch:
    identity = executor_variables("nats://host:1", "n1", "e1", None)
    return plan_launch(ApplicationSpec(**spec), "n1", folder, base or {"PATH": "/bin"}, identity)


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_base_environment_is_small_and_finds_our_own_programs_first() -> None:
    variables = {"HOME": "/h", "PATH": "/usr/bin", "TZ": "UTC", "AWS_SECRET": "x", "FLAME_NODE": "outer"}
    assert base_environment(variables, "/venv/bin/python") == {
        "HOME": "/h",
        "TZ": "UTC",
        "PATH": "/venv/bin:/usr/bin",
        "PYTHONUNBUFFERED": "1",
    }
    assert base_environment({"PYTHONPATH": "/p"}, "/venv/bin/python")["PYTHONPATH"] == "/p"
    assert base_environment({}, "/venv/bin/python")["PATH"].endswith(":/usr/bin:/bin")


def test_an_executor_that_starts_elsewhere_finds_the_files_that_its_manager_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = base_environment({"FLAME_TLS_CA": "ca.pem", "FLAME_CREDENTIALS": "/me.creds", "FLAME_TLS_KEY": ""})
    assert {name: value for name, value in base.items() if name.startswith("FLAME_")} == {
        "FLAME_TLS_CA": str(tmp_path / "ca.pem"),
        "FLAME_CREDENTIALS": "/me.creds",
    }


def test_an_application_adds_variables_but_can_not_take_another_identity(tmp_path: Path) -> None:
    launch = plan(
        tmp_path,
        {"PATH": "/bin", "TZ": "UTC"},
        command="sh",
        environments={"TZ": "CET", "KEY": "k", "FLAME_NODE": "other"},
    )
    assert launch.environment == {
        "PATH": "/bin",
        "TZ": "CET",
        "KEY": "k",
        "FLAME_ENDPOINT": "nats://host:1",
        "FLAME_NODE": "n1",
        "FLAME_EXECUTOR": "e1",
    }


def test_the_lifetime_pipe_is_named_if_there_is_one() -> None:
    assert executor_variables("nats://h", "n", "e", 7)["FLAME_LIFETIME_FD"] == "7"


def test_a_bare_command_is_found_on_the_path_of_the_application(tmp_path: Path) -> None:
    found = program(tmp_path / "bin" / "service")
    launch = plan(tmp_path, command="service", arguments=("-v",), environments={"PATH": str(found.parent)})
    assert launch.command == (str(found), "-v")
    assert launch.folder == tmp_path


def test_a_command_with_a_slash_is_a_path_from_where_it_starts(tmp_path: Path) -> None:
    found = program(tmp_path / "agent" / "main")
    launch = plan(tmp_path / "else", command="./main", working_directory=str(found.parent))
    assert launch.command == (str(found),)
    assert launch.folder == found.parent


def test_the_log_shim_runs_in_our_own_interpreter(tmp_path: Path) -> None:
    assert plan(tmp_path, shim="Log").command == (sys.executable, "-m", "flame_services.builtin.log_shim")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"command": "nothing"}, "command 'nothing' is not on the PATH of node n1 (/bin)"),
        ({"command": "./nothing"}, "command './nothing' does not exist in {folder} on node n1"),
        ({"command": "/nothing"}, "command '/nothing' does not exist on node n1"),
        (
            {"command": "/bin/sh", "working_directory": "/bin/sh"},
            "working_directory '/bin/sh' is not a folder on node n1",
        ),
        ({"command": "/bin/sh", "working_directory": "~"}, "working_directory '~' is not absolute"),
    ],
)
def test_a_refusal_names_the_thing_and_the_place(tmp_path: Path, spec: dict[str, Any], text: str) -> None:
    with pytest.raises(LaunchRefused) as refusal:
        plan(tmp_path, **spec)
    assert str(refusal.value) == text.format(folder=tmp_path)
