"""`flmctl`, `flmping` and `flmexec` without a cluster; and how tests run them, as processes and in this one."""

from __future__ import annotations

import io
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from flame_cli.main import _run as run_program

FLMCTL = [sys.executable, "-m", "flame_cli.main"]
FLMPING = [sys.executable, "-c", "from flame_cli.main import flmping; flmping()"]
FLMEXEC = [sys.executable, "-c", "from flame_cli.main import flmexec; flmexec()"]
LIMIT_S = 60.0
"""What no command of these tests comes near."""
DEAD_ENDPOINT = "nats://127.0.0.1:1"

Finished = subprocess.CompletedProcess[str]


def run(
    *arguments: str, program: list[str] = FLMCTL, endpoint: str = DEAD_ENDPOINT, text: str = "", **environment: str
) -> Finished:
    """Run a program to its end. Nothing of it ever shows a traceback, and an error is one line."""
    done = subprocess.run(
        [*program, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=os.environ | {"FLAME_ENDPOINT": endpoint} | environment,
        check=False,
    )
    assert "Traceback" not in done.stderr + done.stdout
    return done


class Called(Finished):
    """How a command ended that was run in this process, with what it wrote as bytes, too."""

    output = b""


def call(
    *arguments: str,
    program: str = "flmctl",
    endpoint: str = DEAD_ENDPOINT,
    text: str | bytes = "",
    **environment: str,
) -> Called:
    """Run a program in this process, which saves the time that an interpreter takes to start."""
    given = io.TextIOWrapper(io.BytesIO(text.encode() if isinstance(text, str) else text))
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for _ in range(2))
    variables = {"FLAME_ENDPOINT": endpoint, **environment}
    with (
        patch.multiple(sys, argv=[program, *arguments], stdin=given, stdout=stdout, stderr=stderr),
        patch.dict(os.environ, variables),
        _log_levels_kept(),
        pytest.raises(SystemExit) as ended,
    ):
        run_program(program)
    stderr.flush()
    raw, said = (stream.buffer.getvalue() for stream in (stdout, stderr))
    done = Called([program, *arguments], int(ended.value.code or 0), raw.decode(errors="replace"), said.decode())
    done.output = raw
    assert not done.stderr.startswith("Traceback")
    return done


@contextmanager
def _log_levels_kept() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("flame", "nats", "asyncio")]
    levels = [logger.level for logger in loggers]
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def ends(done: Finished, status: int, *texts: str) -> None:
    """Check how a command ended: its status, and what it says."""
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    for text in texts:
        assert text in said
    if status not in (0, 2):
        assert len(done.stderr.splitlines()) == 1, said


def eventually(condition: Callable[[], Any], what: str, limit_s: float = 30.0) -> None:
    """Wait for something that has to happen, asking again and again."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {limit_s:g} s: {what}"
        time.sleep(0.02)


# ---- without a cluster


@pytest.mark.parametrize("program", [FLMCTL, FLMPING, FLMEXEC])
def test_the_version_is_shown(program: list[str]) -> None:
    from flame import __version__

    done = run("--version", program=program)
    name, version = done.stdout.split()
    assert name == {0: "flmctl", 1: "flmping", 2: "flmexec"}[[FLMCTL, FLMPING, FLMEXEC].index(program)]
    assert version == __version__
    ends(done, 0)


VERBS = (
    *("up", "register", "update", "disable", "enable", "unregister", "create", "invoke", "cancel", "close"),
    *("list", "view", "logs", "events", "ping", "completion"),
)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_has_examples_and_fits_80_columns(verb: str) -> None:
    done = call(*verb.split(), "--help", COLUMNS="80")
    ends(done, 0, "Example", f"flmctl {verb}")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_help_lists_every_verb_in_a_line() -> None:
    lines = call("--help", COLUMNS="80").stdout.splitlines()
    first = lines.index("Commands:") + 1
    assert [line.split()[0] for line in lines[first : first + len(VERBS)]] == list(VERBS)
    assert not [line for line in lines[first:] if line.endswith("...")]


@pytest.mark.parametrize(("program", "example"), [("flmping", "flmping -t 1000 -p"), ("flmexec", "flmexec -c")])
def test_help_of_the_other_programs_tells_the_exit_codes(program: str, example: str) -> None:
    done = call("--help", program=program, COLUMNS="80")
    ends(done, 0, example, "Exit status", "130")
    assert max(map(len, done.stdout.splitlines())) <= 80


SPEC = "metadata: {name: a}\nspec: {command: c}\n"


@pytest.mark.parametrize(
    ("arguments", "text", "status", "expected"),
    [
        ("frobnicate", "", 2, "No such command 'frobnicate'"),
        ("list", "", 2, "exactly one of -a, -s, -e and -n"),
        ("list -a -s", "", 2, "exactly one of -a, -s, -e and -n"),
        ("list -x", "", 2, "No such option: -x"),
        ("register", "", 2, "Missing option"),
        ("register -f /nowhere/agent.yaml", "", 2, "/nowhere/agent.yaml: No such file or directory"),
        ("register -f /", "", 2, "/: Is a directory"),
        ("register -f -", "", 2, "standard input: expected an application"),
        ("register -f -", "metadata: {name: a", 2, "standard input, line 1, column 19: not YAML"),
        ("register -f -", f"{SPEC}{{", 2, "standard input, line 3"),
        (
            "register -f -",
            "metadata: {name: a}\nspec:\n  comand: x",
            2,
            "line 3: spec.comand: unknown field, did you mean",
        ),
        ("register -f -", SPEC.replace("c}", "[c]}"), 2, "spec.command: expected text, got a list"),
        ("register -f -", SPEC.replace("a}", "a.b}"), 2, "metadata.name: application 'a.b' is not a legal name"),
        ("register -f -", SPEC, 3, "no NATS server answers at nats://127.0.0.1:1"),
        ("close -s a.b", "", 3, "no NATS server answers"),
        ("close -s s --mode now", "", 2, "No such option: --mode"),
        ("close -s s --drain --force", "", 2, "--drain lets tasks run, --force stops them: expected one of both"),
        ("close -s s --timeout 1", "", 2, "--timeout goes with --wait"),
        ("close -s s --wait --timeout 0", "", 2, "greater than or equal to 0.001"),
        ("close -s s --wait", "", 3, "no NATS server answers"),
        ("cancel", "", 2, "Missing option"),
        ("cancel -s s", "", 2, "expected either tasks (-t TASK...) or --all"),
        ("cancel -s s -t", "", 2, "expected either tasks (-t TASK...) or --all"),
        ("cancel -s s -t a --all", "", 2, "expected either tasks (-t TASK...) or --all"),
        ("cancel -s s -t a b -t c", "", 3, "no NATS server answers"),
        ("events x", "", 2, "unexpected extra argument"),
        ("events -o xml", "", 2, "'xml' is not one of 'table', 'json', 'yaml'"),
        ("events -s a.b", "", 3, "no NATS server answers"),
        ("create -a a --weight 0", "", 2, "--weight"),
        ("create -a a --idle-timeout -1", "", 2, "--idle-timeout"),
        ("unregister -a a", "", 3, "no NATS server answers"),
        ("disable -a a", "", 3, "no NATS server answers"),
        ("enable", "", 2, "Missing option"),
        ("list -a", "", 3, "no NATS server answers"),
        ("list -s --endpoint nonsense", "", 2, "endpoint 'nonsense': expected nats://HOST:PORT"),
        ("--endpoint nonsense list -n", "", 2, "endpoint 'nonsense': expected nats://HOST:PORT"),
        ("list -a --state open", "", 2, "--application, --state and --label go with -s"),
        ("list -s --node n", "", 2, "--session and --node go with -e"),
        ("list -s --state gone", "", 2, "'gone' is not one of 'open', 'closing', 'closed', 'failed'"),
        ("list -s --label x", "", 2, "label 'x': expected NAME=VALUE"),
        ("list -a -o xml", "", 2, "'xml' is not one of 'table', 'json', 'yaml'"),
        ("list -s --watch", "", 3, "no NATS server answers"),
        ("view", "", 2, "exactly one of -a, -s, -e and -n"),
        ("view -a a -n b", "", 2, "exactly one of -a, -s, -e and -n"),
        ("view -a a -t", "", 2, "-t goes with -s"),
        ("view -s s task", "", 2, "'task' is one too many: a task's ID comes after -t"),
        ("view -s s -t task", "", 3, "no NATS server answers"),
        (
            "update -f -",
            SPEC.replace("c}", 'c, environments: {A: "${UNSET}"}}'),
            2,
            "standard input, line 2: spec.environments.A: variable UNSET is not set",
        ),
        ("update -f -", SPEC, 3, "no NATS server answers"),
        ("create", "", 2, "Missing option"),
        ("create -a a --label =x", "", 2, "label '=x': expected NAME=VALUE"),
        ("create -a a --min -1", "", 2, "greater than or equal to 0"),
        ("create -a a --common-data @/nowhere", "", 2, "--common-data @/nowhere: No such file or directory"),
        ("create -a a -r cpu=lots", "", 3, "no NATS server answers"),
        ("invoke a", "", 2, "Missing argument 'INPUT'"),
        ("invoke a @/nowhere", "", 2, "INPUT @/nowhere: No such file or directory"),
        ("invoke a x --session s --common-data y", "", 2, "an open session has its common data already"),
        ("invoke a x", "", 3, "no NATS server answers"),
        ("logs", "", 2, "exactly one of -s and -e"),
        ("logs -s s --tail -1", "", 2, "greater than or equal to 0"),
        ("logs -s s", "", 3, "no NATS server answers"),
        ("completion", "", 2, "Missing argument 'SHELL'"),
        ("completion tcsh", "", 2, "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        ("ping -t 0", "", 2, "greater than or equal to 1"),
        ("ping", "", 3, "no NATS server answers"),
        ("up --port 70000", "", 2, "less than or equal to 65535"),
        ("--endpoint nats://127.0.0.1:1 up", "", 2, "starts a broker of its own"),
    ],
)
def test_bad_input_ends_with_its_status_and_a_reason(arguments: str, text: str, status: int, expected: str) -> None:
    begin = time.monotonic()
    ends(call(*arguments.split(), text=text, COLUMNS="300"), status, expected)
    assert time.monotonic() - begin < 10


def test_what_is_no_nats_server_is_said_to_be_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ends(
            call("list", "-a", endpoint=f"nats://127.0.0.1:{silent.getsockname()[1]}"),
            3,
            "flmctl: error: no NATS server",
        )


@pytest.mark.parametrize("module", ["typer", "yaml"])
def test_without_the_command_line_extra_it_says_what_to_install(module: str) -> None:
    blocked = f"import sys; sys.modules[{module!r}] = None; from flame_cli.main import main; main()"
    done = run("register", "-f", "-", program=[sys.executable, "-c", blocked], text=SPEC)
    ends(done, 2)
    assert done.stderr == "flmctl needs the command line extra: pip install 'flame-engine[cli]'\n"


@pytest.mark.parametrize("module", ["flame_services", "psutil"])
def test_without_the_server_extra_up_says_what_to_install(module: str, tmp_path: Path) -> None:
    blocked = f"import sys; sys.modules[{module!r}] = None; from flame_cli.main import main; main()"
    done = run("up", "--data-dir", str(tmp_path), program=[sys.executable, "-c", blocked])
    ends(done, 2)
    assert done.stderr == "flmctl up needs the server extra: pip install 'flame-engine[server]'\n"


def test_a_fault_of_the_program_itself_is_one_line_too() -> None:
    broken = "import flame_cli.nodes as n; n.list_all = lambda *a: 1 / 0; from flame_cli.main import main; main()"
    done = run("list", "-n", program=[sys.executable, "-c", broken])
    ends(done, 1, "flmctl: internal error: ZeroDivisionError: division by zero (FLAME_DEBUG=1 shows where)")


# ---- completion


def test_a_shell_gets_a_script_for_every_program() -> None:
    for shell in ("bash", "zsh", "fish"):
        done = call("completion", shell)
        ends(done, 0, "__complete", "flmctl flmping flmexec")
        assert "@COMPLETE@" not in done.stdout
        assert "@PROGRAMS@" not in done.stdout


@pytest.mark.parametrize("endpoint", [DEAD_ENDPOINT, "nats://192.0.2.1:4222", "nonsense"])
def test_completion_is_silent_when_the_cluster_can_not_be_asked(endpoint: str) -> None:
    begin = time.monotonic()
    done = run("__complete", "view", "-a", "", endpoint=endpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - begin < 10
