"""The pytest plugin as its users have it: a run of pytest of its own, over their files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import flame.testing
from tests.support.cluster import eventually, processes_of

pytest_plugins = ["pytester"]
for name in flame.testing.__all__:
    getattr(flame.testing, name)  # loaded here, once: pytester forgets what a run in this process has loaded

SCOPE = "asyncio_default_fixture_loop_scope = function\n"
"""What pytest-asyncio warns about if nobody says it."""
EXAMPLE = Path(__file__).parents[2] / "examples" / "testing"

AGENT = """\
import asyncio
import pytest
import flame


class Agent(flame.FlameService):
    async def on_session_enter(self, context):
        self.prompt = context.common_data.decode()

    async def on_task_invoke(self, context):
        if context.input == b"sleep":
            await asyncio.sleep(3600)
        return f"{self.prompt} {context.input.decode()}"
"""


def options(*more: str) -> list[str]:
    """Those of a run of pytest that treats every warning as an error."""
    known = any(point.value == "flame.testing.plugin" for point in entry_points(group="pytest11"))
    plugin = () if known else ("-p", "flame.testing.plugin")  # an environment that was made before there was one
    strict = ("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", "-p", "no:xdist")
    return ["-ra", *strict, *plugin, *more]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a folder's tests in a process of their own."""
    (folder / "pytest.ini").write_text(f"[pytest]\nasyncio_mode = auto\n{SCOPE}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "FLAME"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options(*arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def write(folder: Path, tests: str) -> None:
    (folder / "test_agent.py").write_text(AGENT + "\n\n" + tests)


def run_here(pytester: pytest.Pytester, tests: str, *arguments: str, mode: str = "auto") -> pytest.RunResult:
    """Run tests in this process, which is faster."""
    pytester.makeini(f"[pytest]\nasyncio_mode = {mode}\n{SCOPE}")
    write(pytester.path, tests)
    return pytester.runpytest_inprocess(*options(*arguments))


def outcome(ran: subprocess.CompletedProcess[str]) -> str:
    """The last line of what pytest says, without the time that it took."""
    return ran.stdout.strip().splitlines()[-1].strip("= ").partition(" in ")[0] if ran.stdout else ran.stderr


def test_the_example_passes(tmp_path: Path) -> None:
    for file in EXAMPLE.glob("*.py"):
        shutil.copy(file, tmp_path)
    ran = run(tmp_path)
    assert outcome(ran) == "7 passed", ran.stdout + ran.stderr


def test_in_strict_mode_a_test_only_needs_its_mark(pytester: pytest.Pytester) -> None:
    ran = run_here(
        pytester,
        """
@pytest.mark.asyncio
async def test_answers(flame_service, flame_clock, flame_events):
    session = await flame_service(Agent, b"You said:")
    task = await session.invoke(b"hello")
    assert task.output == b"You said: hello"
    await flame_events.expect(task=task, state="succeed")
    other = await flame_service(Agent, b"Again:")
    assert (await other.invoke(b"hello")).output == b"Again: hello"


@pytest.mark.asyncio
@pytest.mark.flame_memory(nodes=2)
async def test_has_two_nodes(flame_memory):
    assert [node.name for node in await flame_memory.connection.list_nodes()] == ["node1", "node2"]
""",
        mode="strict",
    )
    ran.assert_outcomes(passed=2)


def test_a_missing_event_is_a_failure_that_shows_what_was_seen(pytester: pytest.Pytester) -> None:
    ran = run_here(
        pytester,
        """
async def test_fails(flame_service, flame_clock, flame_events):
    session = await flame_service(Agent)
    await session.invoke(b"x")
    await flame_events.expect(session=session, state="failed", within_s=5)


async def test_goes_on(flame_service, flame_clock):
    session = await flame_service(Agent)
    assert await session.invoke(b"x")
""",
    )
    ran.assert_outcomes(failed=1, passed=1)
    assert "AssertionError: did not happen within 5 s: state=failed, noun=session" in ran.stdout.str()
    assert ": open" in ran.stdout.str()
    assert ": succeed" in ran.stdout.str()


def test_a_test_that_waits_for_ever_ends_and_the_next_one_runs(pytester: pytest.Pytester) -> None:
    ran = run_here(
        pytester,
        """
async def test_waits(flame_service, flame_clock):
    await flame_service(Agent)
    await asyncio.Event().wait()


async def test_goes_on(flame_service, flame_clock):
    session = await flame_service(Agent)
    assert await session.invoke(b"x")
""",
    )
    ran.assert_outcomes(failed=1, passed=1)
    assert "Stuck: 3600 s of virtual time have passed without an end" in ran.stdout.str()


def test_loading_the_plugin_loads_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text("""
import sys

def test_is_light():
    heavy = {"nats", "pydantic", "structlog", "msgpack", "psutil", "flame_services", "flame.testing.clock"}
    assert "flame.testing.plugin" in sys.modules
    assert heavy.isdisjoint(sys.modules)
""")
    ran = run(tmp_path)
    assert outcome(ran) == "1 passed", ran.stdout + ran.stderr


def test_without_pytest_asyncio_a_fixture_says_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, "def test_needs_it(flame_service):\n    pass\n")
    (tmp_path / "pytest_asyncio.py").write_text("raise ImportError\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "-m", "pytest", *options("-p", "no:asyncio")]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome(ran) == "1 error", ran.stdout + ran.stderr
    assert "the fixture flame_memory needs pytest-asyncio: pip install pytest-asyncio" in ran.stdout


CLUSTER = """
import json, os, pathlib, sys

SERVICE = '''
import asyncio, flame

class Echo(flame.FlameService):
    async def on_task_invoke(self, context):
        return context.input

asyncio.run(flame.run(Echo()))
'''


@pytest.fixture(scope="session")
def flame_cluster_options():
    return {"nodes": 2}


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "echo.py"
    path.write_text(SERVICE)
    return path


async def test_runs_a_program(flame_cluster, script):
    pathlib.Path("endpoint").write_text(flame_cluster.endpoint)
    await flame_cluster.register(script)
    async with await flame_cluster.connect() as client:
        async with flame_cluster.events(client) as events:
            async with await client.create_session("echo") as session:
                assert (await session.invoke(b"x")).output == b"x"
                await events.expect(noun="executor", session=session, state="bound")
        assert len(await client.list_nodes()) == 2


async def test_finds_nothing_of_the_test_before(flame_cluster, script):
    with pytest.raises(flame.ApplicationNotFound):
        await flame.create_session("echo")
    await flame_cluster.register(script)
    async with await flame.create_session("echo") as session:
        assert (await session.invoke(b"y")).output == b"y"
"""


def test_a_real_cluster_is_shared_and_gone_afterwards(tmp_path: Path) -> None:
    write(tmp_path, CLUSTER)
    ran = run(tmp_path)
    assert outcome(ran) == "2 passed", ran.stdout + ran.stderr
    assert processes_of((tmp_path / "endpoint").read_text()) == []


async def test_a_real_cluster_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    kill = "\nasync def test_dies(flame_cluster):\n    os.kill(os.getpid(), 9)\n"
    write(tmp_path, CLUSTER + kill)
    ran = run(tmp_path)
    assert ran.returncode == -signal.SIGKILL
    endpoint = (tmp_path / "endpoint").read_text()
    await eventually(lambda: not processes_of(endpoint), "nothing of it is left")


@pytest.mark.parametrize("scope", ["module", "session"])
def test_a_loop_that_tests_share_needs_one_setting(pytester: pytest.Pytester, scope: str) -> None:
    tests = f"""
pytestmark = pytest.mark.asyncio(loop_scope="{scope}")

async def test_one(flame_service, flame_clock):
    session = await flame_service(Agent)
    assert await session.invoke(b"x")
    assert await (await flame.create_session("Agent")).invoke(b"x")

async def test_two(flame_service):
    await flame_service(Agent)
    assert await (await flame.create_session("Agent")).invoke(b"x")
"""
    ran = run_here(pytester, tests)
    assert "asyncio_default_fixture_loop_scope must be the loop_scope of the test" in ran.stdout.str()
    ran = run_here(pytester, tests, "-o", f"asyncio_default_fixture_loop_scope={scope}")
    ran.assert_outcomes(passed=2)
