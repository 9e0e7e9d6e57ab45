"""The OpenAI agent and its client, as the introduction prints them, against a model on this machine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import flame
from tests.support.cluster import Cluster
from tests.support.complaints import complaints

EXAMPLE = Path(__file__).parents[2] / "examples" / "agents" / "openai"


@pytest.fixture(scope="module")
def model() -> Iterator[str]:
    """The address of a language model's server."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLE / "model_server.py")], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
        server.terminate()
        server.wait(20)


def tokens_written(model: str) -> float:
    """How much the model has said since it started."""
    with urllib.request.urlopen(model.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("llamacpp:tokens_predicted_total"):
                return float(line.split()[-1])
    raise AssertionError("the model's server has no count of tokens")


@pytest.fixture
async def agent(cluster: Cluster, connection: flame.Connection, model: str) -> str:
    """The agent, registered."""
    name = "openai-agent"
    if name not in {application.name for application in await connection.list_applications()}:
        await connection.register_application(
            name,
            {
                "command": sys.executable,
                "arguments": [str(EXAMPLE / "main.py")],
                "environments": {"DEEPSEEK_API_KEY": "local", "DEEPSEEK_BASE_URL": model},
            },
        )
    return name


@pytest.mark.parametrize("options", [(), ("-X", "dev")], ids=["plain", "dev"])
async def test_the_client_prints_an_answer_and_ends_at_once_and_in_silence(
    cluster: Cluster, agent: str, model: str, options: tuple[str, ...]
) -> None:
    await asyncio.to_thread(run_client, cluster, model, options)


def run_client(cluster: Cluster, model: str, options: tuple[str, ...]) -> None:
    before = tokens_written(model)
    client = subprocess.Popen(
        [sys.executable, "-u", *options, str(EXAMPLE / "client.py")],
        env={"FLAME_ENDPOINT": cluster.broker.endpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    assert client.stderr is not None
    first = client.stdout.readline()
    printed = time.monotonic()
    rest, errors = client.communicate(timeout=60)
    assert time.monotonic() - printed < 5.0, "it waits for nothing"
    assert (client.returncode, complaints(errors)) == (0, "")
    assert len(first + rest) > 20
    assert tokens_written(model) > before


async def test_answers_differ_with_the_sessions_system_prompts(connection: flame.Connection, agent: str) -> None:
    answers = []
    for prompt in (b"You are a weather forecaster.", b"You are a French chef."):
        async with await connection.create_session(agent, prompt) as session:
            answers.append((await session.invoke(b"Who are you?", timeout_s=60)).output)
    assert answers[0] != answers[1]
