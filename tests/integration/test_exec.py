"""``flmexec`` on a real cluster: what scripts get, what comes back, and that nothing of them is left."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import flame
from flame import scripts
from tests.support.cluster import alive, eventually, kill, started_executors


@pytest.fixture
async def session(connection: flame.Connection) -> flame.Session:
    return await connection.open_session("scripts", flame.SessionSpec(application=scripts.APPLICATION))


async def run(session: flame.Session, code: str, **options: object) -> scripts.ScriptResult:
    task = await session.invoke(scripts.encode(code, **options), timeout_s=30)  # type: ignore[arg-type]
    return scripts.decode(task.output)


async def fail(session: flame.Session, code: str, **options: object) -> tuple[str, scripts.ScriptResult]:
    with pytest.raises(flame.TaskFailed) as caught:
        await run(session, code, **options)
    fault = caught.value.task.error
    assert fault is not None
    return fault.message, scripts.decode(fault.details)


async def test_a_shell_script_gets_its_input_and_returns_both_outputs(session: flame.Session) -> None:
    result = await run(session, "cat; echo oops >&2", input=b"one\0two")
    assert (result.status, result.stdout, result.stderr, result.cut) == (0, b"one\0two", b"oops\n", 0)


async def test_a_python_script_gets_its_input(session: flame.Session) -> None:
    result = await run(session, "import sys\nprint(sum(map(int, sys.stdin)))", language="python", input="1\n2\n3\n")
    assert (result.status, result.stdout) == (0, b"6\n")


async def test_who_asks_in_json_is_answered_in_json(session: flame.Session) -> None:
    asked = json.dumps({"language": "shell", "code": "tr a-z A-Z", "input": "grüße"})
    answer = json.loads((await session.invoke(asked, timeout_s=30)).output)
    assert answer["status"] == 0
    assert answer["stdout"].startswith("GR")
    assert scripts.decode(json.dumps(answer).encode()).status == 0


async def test_a_script_that_fails_is_a_failed_task_with_all_that_it_wrote(session: flame.Session) -> None:
    message, result = await fail(session, "echo partly; echo no such luck >&2; exit 7")
    assert "exit status 7" in message
    assert "no such luck" in message
    assert (result.status, result.stdout, result.stderr) == (7, b"partly\n", b"no such luck\n")
    message, result = await fail(session, "raise ValueError('in python')", language="python")
    assert "ValueError: in python" in message
    assert result.status == 1
    message, result = await fail(session, "kill -SEGV $$")
    assert "signal 11" in message
    assert result.status == -11


async def test_too_much_output_is_cut_and_says_so(session: flame.Session) -> None:
    code = "import sys\nsys.stdout.write('a' * 10_000_000 + 'z')\nsys.stderr.write('b' * 10_000_000)"
    result = await run(session, code, language="python")
    kept = len(result.stdout) + len(result.stderr) - 2 * len(scripts.NOTE)
    assert result.cut == 20_000_001 - kept
    assert kept > 16_000_000
    assert result.stdout.startswith(b"aaa")
    assert result.stdout.endswith(b"az")
    assert scripts.NOTE in result.stdout
    assert scripts.NOTE in result.stderr
    asked = json.dumps({"language": "python", "code": "print('\\x01' * 500_000)"})
    assert "left out" in json.loads((await session.invoke(asked, timeout_s=30)).output)["stdout"]
    _, failed = await fail(session, code + "\nsys.exit(3)", language="python")
    assert (failed.status, failed.stdout[:3], failed.stderr[-3:]) == (3, b"aaa", b"bbb")
    assert 200_000 < len(failed.stdout) + len(failed.stderr) < 256 * 1024


async def test_much_input_and_output_go_through_whole(session: flame.Session) -> None:
    result = await run(session, "tr a b", input=b"a" * 3_000_000)
    assert (result.stdout, result.cut) == (b"b" * 3_000_000, 0)


async def test_its_children_and_its_folder_end_with_a_script(session: flame.Session, tmp_path: Path) -> None:
    code = f"ls -A; pwd > {tmp_path}/folder; sleep 1000 & echo $! > {tmp_path}/child; touch file"
    assert (await run(session, code)).stdout == b""
    folder = (tmp_path / "folder").read_text().strip()
    await eventually(lambda: not Path(folder).exists(), "the folder is gone")
    await eventually(lambda: not alive(int((tmp_path / "child").read_text())), "the child is gone")


async def test_a_child_that_left_and_holds_the_output_open_keeps_nobody_waiting(session: flame.Session) -> None:
    code = "import os, subprocess\nchild = subprocess.Popen(['sleep', '30'], start_new_session=True)\nprint(child.pid)"
    async with asyncio.timeout(10):
        result = await run(session, code, language="python")
    kill(int(result.stdout))


async def test_a_script_that_takes_too_long_is_ended_with_its_children(session: flame.Session, tmp_path: Path) -> None:
    message, result = await fail(session, f"echo begun; sleep 1000 & echo $! > {tmp_path}/child; wait", timeout_s=0.5)
    assert "took longer than 0.5 s" in message
    assert result.timed_out
    assert result.stdout == b"begun\n"
    await eventually(lambda: not alive(int((tmp_path / "child").read_text())), "the child is gone")


async def test_a_script_ends_with_its_executor(connection: flame.Connection, tmp_path: Path) -> None:
    session = await connection.create_session(scripts.APPLICATION, max_instances=1)
    await run(session, "true")
    mark = tmp_path / "child"
    handle = await session.create_task(scripts.encode(f"echo $$ >> {mark}; sleep 1000"))
    await eventually(lambda: mark.exists() and mark.read_text(), "the script runs")
    [executor] = await started_executors(connection, session.id)
    kill(executor.pid)
    first = int(mark.read_text().split()[0])
    await eventually(lambda: not alive(first), "the script is gone")
    await eventually(lambda: len(mark.read_text().split()) == 2, "it runs again elsewhere")
    [executor] = await started_executors(connection, session.id)
    kill(executor.pid)
    await eventually(lambda: len(mark.read_text().split()) == 3, "it runs again, once more")
    [executor] = await started_executors(connection, session.id)
    kill(executor.pid)
    with pytest.raises(flame.TaskFailed, match="given up"):
        await asyncio.wait_for(handle, 30)
    await session.close()


async def test_a_script_learns_nothing_of_its_executor(session: flame.Session) -> None:
    result = await run(session, "env")
    assert b"FLAME_" not in result.stdout
    assert b"PATH=" in result.stdout


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (b"not a map", "expected a MessagePack or JSON map"),
        (b"{", "not JSON"),
        (b"{}", "code: missing"),
        (b'{"code": 1}', "code: expected text, got int"),
        (b'{"code": "", "language": "perl"}', "language: expected one of shell, python, got 'perl'"),
        (b'{"code": "", "timeout_s": -1}', "timeout_s: expected a number of seconds above 0, got -1"),
        (b'{"code": "", "input": 1}', "input: expected bytes or text, got int"),
        (b'{"code": "", "lang": "shell"}', "lang: unknown; a script has code, input, language, timeout_s"),
    ],
)
async def test_what_is_no_script_is_refused(session: flame.Session, given: bytes, says: str) -> None:
    with pytest.raises(flame.TaskFailed) as caught:
        await session.invoke(given, timeout_s=30)
    assert says in str(caught.value)
