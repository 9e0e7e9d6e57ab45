"""The wheel, installed into an empty environment and used outside the repository."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True)
    [built] = folder.glob("*.whl")
    return built


def install(folder: Path, wheel: Path, extras: str) -> Path:
    """Make an environment with nothing but the wheel; return where its programs are."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    command = [
        str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "-c", str(REPOSITORY / "constraints.txt"), f"{wheel}{extras}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return programs


def clean_environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLAME", "PYTHON", "VIRTUAL"))}
    return kept | {"HOME": str(home)}


def test_the_wheel_holds_three_packages_and_the_brokers_configuration(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flame", "flame_services", "flame_cli"}
    assert any(name.startswith("flame_services/broker_config/") for name in names)
    assert "flame/py.typed" in names
    [points] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    assert "[pytest11]\nflame = flame.testing.plugin" in zipfile.ZipFile(wheel).read(points).decode()


def test_a_cluster_comes_up_from_the_wheel_and_flmping_measures_it(wheel: Path, tmp_path: Path) -> None:
    programs = install(tmp_path / "env", wheel, "[server,cli]")
    environment = clean_environment(tmp_path)
    up = subprocess.Popen(
        [str(programs / "flmctl"), "up", "--port", "0", "--data-dir", str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    try:
        assert up.stdout is not None
        ready = up.stdout.readline()
        assert ready.startswith("Flame is ready at nats://127.0.0.1:"), up.communicate(timeout=30)
        ping = subprocess.run(
            [str(programs / "flmping"), "-t", "1000", "-p"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment | {"FLAME_ENDPOINT": ready.split()[-1]},
            timeout=60,
            check=False,
        )
        assert ping.returncode == 0, ping.stderr
        lines = dict(line.split(":", 1) for line in ping.stdout.splitlines() if ":" in line)
        assert lines["succeeded"].strip() == "1000"
        assert lines["failed"].strip() == "0"
        assert float(lines["throughput"].split()[0].replace(",", "")) > 0
        assert {"duration", "latency p50", "latency p99"} <= set(lines)
    finally:
        up.send_signal(signal.SIGINT)
        _, errors = up.communicate(timeout=60)
    assert up.returncode == 0, errors


def test_without_the_extras_flmctl_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    programs = install(tmp_path / "env", wheel, "")
    told = subprocess.run(
        [str(programs / "flmctl"), "list", "-a"],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
        timeout=30,
        check=False,
    )
    assert told.returncode == 2
    assert "pip install 'flame-engine[cli]'" in told.stderr
    assert "Traceback" not in told.stderr
    imported = subprocess.run([str(programs / "python"), "-c", "import flame"], check=False, capture_output=True)
    assert imported.returncode == 0
