"""The README's five minutes, block by block as they are printed."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import flame
from tests.support.cluster import Cluster

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, heading: str = "") -> list[str]:
    """Return the code blocks of one language, in one section or everywhere."""
    text = README.read_text(encoding="utf-8")
    if heading:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [code for kind, code in BLOCK.findall(text) if kind == language]


def commands() -> list[str]:
    """Return the tour's commands, without those that install Flame and start the cluster."""
    lines = [line for block in blocks("console", "Five minutes") for line in block.splitlines() if line.strip()]
    assert lines[:2] == ["pip install 'flame-engine[server,cli]'", "flmctl up"]
    return lines[2:]


async def test_the_tour_works_as_printed(cluster: Cluster, connection: flame.Connection, tmp_path: Path) -> None:
    """The cluster stands for `flmctl up`, and this environment for the installation: both have tests of their own."""
    [service, client, plain] = [block for block in blocks("python") if "import flame" in block]
    [deployment] = blocks("yaml")
    (tmp_path / "agent.py").write_text(service)
    (tmp_path / "agent.yaml").write_text(deployment)
    (tmp_path / "client.py").write_text(client)
    (tmp_path / "plain.py").write_text(plain)
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "FLAME_ENDPOINT": cluster.broker.endpoint,
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    outputs = {line: await asyncio.to_thread(run, *shlex.split(line)) for line in commands()}
    assert "flmping" in outputs["flmctl list -a"]
    assert "succeeded: 1000" in " ".join(outputs["flmping -t 1000 -p"].split())
    assert "my-agent" in outputs["flmctl register -f agent.yaml"]
    answer = await asyncio.to_thread(run, sys.executable, "client.py")
    assert answer.startswith("You said: hello from x")
    answer = await asyncio.to_thread(run, sys.executable, "plain.py")
    assert answer.splitlines() == [f"You said: {word}" for word in ("hello", "one", "two", "three")]
    assert "my-agent" in await asyncio.to_thread(run, "flmctl", "list", "-s")
    await asyncio.to_thread(run, "flmctl", "unregister", "-a", "my-agent")
    assert "my-agent" not in {application.name for application in await connection.list_applications()}


async def test_what_is_shown_of_tasks_and_sessions_works_as_printed(connection: flame.Connection) -> None:
    [shown] = blocks("python", "Tasks and sessions on your terms")
    names: dict[str, Any] = {"flame": flame}
    exec(f"async def block(session):\n{textwrap.indent(shown, '    ')}", names)
    session = await connection.create_session("flmping")
    async with asyncio.timeout(30):
        await names["block"](session)
    assert session.state is flame.SessionState.CLOSED


def test_what_is_shown_of_functions_works_as_printed(cluster: Cluster, tmp_path: Path) -> None:
    [shown] = blocks("python", "More than bytes")
    body = textwrap.indent(shown, "    ")
    program = tmp_path / "functions.py"
    program.write_text(f"import asyncio, collections, flame\nasync def main():\n{body}asyncio.run(main())\n")
    environment = {**os.environ, "FLAME_ENDPOINT": cluster.broker.endpoint}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "81\n[('a', 1)]\n", "")


def test_commands_that_are_shown_are_complete() -> None:
    [shown] = blocks("console", "Tasks and sessions on your terms")
    for line in shown.splitlines():
        words = shlex.split(line, comments=True)
        done = subprocess.run(
            [sys.executable, "-m", "flame_cli.main", *words[1:], "--endpoint", "nats://127.0.0.1:1"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 3, (line, done.stderr)
