"""What a program is told by its file, the environment and its flags."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from flame.config import DEFAULT_ENDPOINT
from flame.errors import ConfigurationError
from flame.version import __version__
from flame_services.program import Settings, read_settings


class MySettings(Settings):
    """Those of a program of its own."""

    name: str = Field(default="", description="its name")
    replicas: int = Field(default=1, ge=1, le=5, description="copies")
    delay_s: float = Field(default=0.5, description="seconds")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FLAME_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Write a settings file and return its path."""

    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def _read(*argv: str) -> MySettings:
    return read_settings("prog", "Does something.", MySettings, argv)


def test_without_anything_the_defaults_hold() -> None:
    assert _read() == MySettings(endpoint=DEFAULT_ENDPOINT, log_level="info", log_json=False, lifetime_fd=None)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file("endpoint: nats://file:1\nname: file\nreplicas: 2\ndelay_s: 3\n")
    monkeypatch.setenv("FLAME_ENDPOINT", "nats://environment:1")
    monkeypatch.setenv("FLAME_NAME", "environment")
    monkeypatch.setenv("FLAME_REPLICAS", "4")
    settings = _read("--config", path, "--endpoint", "nats://flag:1", "--replicas=5")
    assert settings.endpoint == "nats://flag:1"
    assert settings.replicas == 5
    assert settings.name == "environment"
    assert settings.delay_s == 3.0


def test_the_file_may_be_named_by_the_environment(
    file: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAME_CONFIG_FILE", file("name: file"))
    assert _read().name == "file"
    other = tmp_path / "other.yaml"
    other.write_text("name: other")
    assert _read("--config", str(other)).name == "other"


@pytest.mark.parametrize(("value", "means"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_a_switch_can_be_set_by_the_environment(value: str, means: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAME_LOG_JSON", value)
    assert _read().log_json is means
    assert _read("--log-json").log_json is True
    assert _read("--no-log-json").log_json is False


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}"])
def test_an_empty_file_sets_nothing(text: str, file: Callable[[str], str]) -> None:
    assert _read("--config", file(text)) == _read()


WRONG_FILES: dict[str, tuple[str | bytes, str]] = {
    "an unknown key": ("endpont: nats://h:1", "endpont: unknown field"),
    "a wrong type": ("replicas: many", "replicas: .*integer.*'many'"),
    "a map for a number": ("replicas: {a: 1}", "replicas: "),
    "a value out of range": ("replicas: 6", "replicas: .*less than or equal to 5, got '6'"),
    "an unknown level": ("log_level: loud", "log_level: .*'loud'"),
    "a key that is no text": ("1: 2", "1"),
    "a list": ("- a\n- b", "expected settings as name: value, got a list"),
    "a text": ("just a text", "expected settings as name: value, got a str"),
    "not YAML": ("a: [1, 2", "not YAML: "),
    "two documents": ("a: 1\n---\nb: 2\n", "not YAML: "),
    "an object of Python": ("name: !!python/object/apply:os.getcwd []", "not YAML: "),
    "not UTF-8": (b"\xff\xfe\xfa", "not YAML: "),
    "a NUL": (b"name: a\0b", "not YAML: "),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_refused_by_name_in_one_line(case: str, tmp_path: Path) -> None:
    content, text = WRONG_FILES[case]
    path = tmp_path / "settings.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError, match=text) as refusal:
        _read("--config", str(path))
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml: No such file"):
        _read("--config", str(tmp_path / "nowhere.yaml"))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{tmp_path}: Is a directory"):
        _read("--config", str(tmp_path))


def test_a_wrong_value_of_the_environment_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAME_REPLICAS", "many")
    with pytest.raises(ConfigurationError, match=r"^FLAME_REPLICAS: replicas: .*'many'"):
        _read()


def test_a_wrong_flag_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"^--replicas: replicas: .*'many'"):
        _read("--replicas", "many")


def test_every_wrong_value_is_named_at_once_with_who_said_it(
    file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file("log_level: loud")
    monkeypatch.setenv("FLAME_DELAY_S", "soon")
    with pytest.raises(ConfigurationError) as refusal:
        _read("--config", path, "--replicas", "9")
    for text in (path, "FLAME_DELAY_S", "--replicas", "replicas: ", "log_level: ", "delay_s: "):
        assert text in str(refusal.value)


def test_a_wrong_value_that_is_overruled_does_no_harm(
    file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file("replicas: many")
    monkeypatch.setenv("FLAME_REPLICAS", "more")
    assert _read("--config", path, "--replicas", "2").replicas == 2


@pytest.mark.parametrize("argv", [["--nonsense"], ["--replica", "2"], ["something"]])
def test_an_unknown_flag_ends_the_program_with_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _read(*argv)
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_help_tells_every_setting_its_variable_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _read("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag, variable, default in (
        ("--endpoint", "FLAME_ENDPOINT", "nats://127.0.0.1:4222"),
        ("--log-json", "FLAME_LOG_JSON", "False"),
        ("--replicas", "FLAME_REPLICAS", "1"),
        ("--delay-s", "FLAME_DELAY_S", "0.5"),
    ):
        assert flag in text
        assert f"(also {variable}; default: {default})" in text


def test_a_program_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _read("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == f"prog {__version__}"


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        _read().endpoint = "nats://other:1"  # type: ignore[misc]


# ---- as a process

PROGRAMS = ["flame_services.scheduler", "flame_services.executor_manager"]


def _run(module: str, *argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
    )


WRONG_STARTS: dict[str, tuple[list[str], str]] = {
    "a file that is missing": (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
    "a wrong value": (["--log-level", "loud"], "log_level: "),
    "an endpoint that is none": (["--endpoint", "http://h:1"], "endpoint 'http://h:1': expected nats://HOST:PORT"),
    "a descriptor that is not open": (["--lifetime-fd", "99"], "lifetime_fd 99: Bad file descriptor"),
}


@pytest.mark.parametrize("case", WRONG_STARTS)
@pytest.mark.parametrize("module", PROGRAMS)
def test_a_program_that_is_told_wrong_ends_with_status_2_and_one_line(module: str, case: str, tmp_path: Path) -> None:
    argv, text = WRONG_STARTS[case]
    done = _run(module, *argv, HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1
    assert text in lines[0]
    assert "Traceback" not in done.stderr
    if "--lifetime-fd" not in argv and "--endpoint" not in argv:
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_program_without_a_broker_ends_with_status_1_and_says_what_to_do(module: str, tmp_path: Path) -> None:
    done = _run(module, "--endpoint", "nats://127.0.0.1:1", HOME=str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert "no NATS server answers at nats://127.0.0.1:1" in line
    assert "`flmctl up` starts one here" in line


def _environment_of_settings() -> dict[str, Any]:
    return {name: info.default for name, info in Settings.model_fields.items()}


def test_every_setting_has_a_description() -> None:
    assert all(info.description for info in MySettings.model_fields.values())
    assert set(_environment_of_settings()) == {"endpoint", "log_level", "log_json", "lifetime_fd"}
