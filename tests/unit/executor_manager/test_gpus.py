"""The GPUs of a node."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from flame.errors import InvalidArgument
from flame_services.executor_manager.gpus import Gpus, detect
from flame_services.executor_manager.launch import LaunchRefused
from flame_services.executor_manager.settings import ManagerSettings


def with_driver(folder: Path, text: str) -> dict[str, str]:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return {}


@pytest.fixture(autouse=True)
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_devices_are_counted_as_cuda_does(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia2", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert detect({}, tmp_path) == ("0", "1", "2")


def test_a_node_without_any_has_none(tmp_path: Path) -> None:
    assert detect({}, tmp_path) == ()


def test_a_manager_that_was_given_some_has_these(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert detect({"CUDA_VISIBLE_DEVICES": "3, GPU-5f"}, tmp_path) == ("3", "GPU-5f")
    assert detect({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ()


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'GPU 0: A100 (UUID: GPU-x)'; echo 'GPU 1: A100 (UUID: GPU-y)'", ("0", "1")),
        ("echo 'No devices'", ()),
        ("exit 9", ()),
    ],
)
def test_the_driver_is_asked(tmp_path: Path, script: str, found: tuple[str, ...]) -> None:
    with_driver(tmp_path, script)
    assert detect({}, tmp_path) == found


def test_a_driver_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flame_services.executor_manager.gpus._SMI_S", 0.2)
    with_driver(tmp_path, "exec /bin/sleep 60")
    assert detect({}, tmp_path) == ()


@pytest.mark.parametrize(
    ("given", "devices"),
    [("2", ("0", "1")), (3, ("0", "1", "2")), ("0", ()), ("0,2", ("0", "2")), ("5,", ("5",)), ("GPU-a,GPU-b",) * 2],
)
def test_what_is_given_counts(given: object, devices: object) -> None:
    expected = tuple(devices.split(",")) if isinstance(devices, str) else devices
    settings = ManagerSettings.model_validate({"gpu": given})
    assert settings.gpus == expected
    assert settings.capacity().gpu == len(settings.gpus)


@pytest.mark.parametrize("given", ["0,0", "-1", "a b", "1;2"])
def test_what_names_no_devices_is_refused(given: str) -> None:
    with pytest.raises((InvalidArgument, ValueError), match="names no GPUs"):
        ManagerSettings.model_validate({"gpu": given})


async def test_a_device_is_one_executors_until_it_is_given_back() -> None:
    gpus = Gpus(["0", "1", "2"])
    first = await gpus.take(2)
    second = await gpus.take(1)
    assert (first, second) == (("0", "1"), ("2",))
    waiting = asyncio.create_task(gpus.take(2))
    gpus.give_back(second)
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await gpus.take(0) == ()
    gpus.give_back(first)
    assert await waiting == ("0", "1")


async def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(LaunchRefused, match="its session needs gpu=2; this node has 1"):
        await Gpus(["0"]).take(2)


def test_a_process_is_told_what_it_has_if_there_are_any() -> None:
    assert Gpus(()).variables(()) == {}
    gpus = Gpus(["0", "1"])
    assert gpus.variables(()) == {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert gpus.variables(("0", "1"))["CUDA_VISIBLE_DEVICES"] == "0,1"
