"""compose.yaml: what it says is complete, and its services work together as it starts them."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import flame
from tests.support.cluster import processes_of
from tests.support.compose import Compose
from tests.support.servers import free_port

ROOT = Path(__file__).parents[2]
FILE = ROOT / "compose.yaml"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return loaded


@pytest.fixture
async def compose(tmp_path: Path) -> AsyncIterator[Compose]:
    # All that differs between a container and a process. Mounted folders and volumes follow from the file itself.
    rules = {
        "broker": "127.0.0.1",  # the engine's name for a container
        "0.0.0.0": "127.0.0.1",
        "4222": str(free_port()),
        "8222": str(free_port()),
        "/var/lib/flame-node": str(tmp_path / "node"),  # not a volume: it is the container's own
    }
    made = Compose(FILE, tmp_path, rules)
    try:
        yield made
    finally:
        await asyncio.to_thread(made.down)


async def test_its_services_make_a_cluster_that_can_be_started_again(compose: Compose) -> None:
    assert compose.order() == ["broker", "scheduler", "executor-manager"]
    assert (Path(compose.rules["/src/examples"]) / "agents/openai/openai-agent.yaml").is_file()
    environment = compose.services["executor-manager"].environment
    endpoint = environment["FLAME_ENDPOINT"]
    published = compose.spec["services"]["broker"]["ports"][0].split(":")[1]
    assert endpoint == f"nats://127.0.0.1:{compose.rules[published]}"

    await compose.up()
    async with await flame.connect(endpoint) as connection:
        session = await connection.create_session("flmping")
        task = await session.invoke(b"kept", timeout_s=20)
        assert task.executor
    output = await run(["flmping", "-t", "200", "-p"], environment)
    assert "succeeded: 200" in output
    assert await asyncio.to_thread(compose.down) == {"executor-manager": 0, "scheduler": 0, "broker": 0}
    assert processes_of(endpoint) == []

    await compose.up()
    async with await flame.connect(endpoint) as connection:
        session = await connection.open_session(session.id)
        assert (await session.get_task(task.id)).output == b"kept"
        assert (await session.invoke(b"again", timeout_s=20)).output == b"again"
        assert len(await connection.list_nodes()) == 1
    await asyncio.to_thread(compose.down)
    assert processes_of(endpoint) == []


async def run(command: list[str], environment: dict[str, str]) -> str:
    """Run a command as in a container and return what it said."""
    running = await asyncio.create_subprocess_exec(
        shutil.which(command[0], path=environment["PATH"]) or command[0],
        *command[1:],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(running.communicate(), 30)
    assert running.returncode == 0, output.decode()
    return output.decode()


def test_every_service_is_restarted_checked_and_reaped(spec: dict[str, Any]) -> None:
    for name, service in spec["services"].items():
        assert service["restart"] == "unless-stopped", name
        assert service["init"] is True, name
        assert service["pull_policy"] == "build", name
        assert set(service["healthcheck"]) == {"test", "interval", "timeout", "retries"}, name
        assert all(other in spec["services"] for other in service.get("depends_on", {})), name


def test_the_broker_is_published_on_this_machine_alone(spec: dict[str, Any]) -> None:
    assert [service.get("ports", []) for service in spec["services"].values()] == [["127.0.0.1:4222:4222"], [], []]


def test_the_image_is_made_of_what_the_checkout_has(spec: dict[str, Any]) -> None:
    recipes = {service["build"]["dockerfile_inline"] for service in spec["services"].values()}
    assert len(recipes) == 1
    recipe = recipes.pop()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = [word for line in re.findall(r"^COPY (.*)$", recipe, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    packages = {"flame", "services", "cli", "broker_config", "pyproject.toml", project["readme"], "LICENSE"}
    assert packages <= set(copied)

    (extras,) = re.findall(r'"\.\[(.*)\]"', recipe)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    commands = {service["command"][0] for service in spec["services"].values()}
    assert commands - {"nats-server"} <= set(project["scripts"])

    (version,) = re.findall(r"^FROM python:(\d+\.\d+)-slim$", recipe, re.MULTILINE)
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
