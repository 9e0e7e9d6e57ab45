"""The verbs of `flmctl`, with `flmping` and `flmexec`, as their users run them in a cluster of ``flmctl up``."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flame_cli.documents import FIELDS
from tests.integration.test_cli import FLMCTL, FLMEXEC, FLMPING, LIMIT_S, Called, call, ends, eventually, run
from tests.integration.test_cli_up import Up, running

LAB = Path(__file__).parents[1] / "services" / "lab.py"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running(tmp_path_factory.mktemp("cluster") / "data") as up:
        yield up


@pytest.fixture(scope="module")
def lab(cluster: Up) -> str:
    """The application of tests/services/lab.py, which does what its input says."""
    text = f"metadata: {{name: lab}}\nspec: {{command: {sys.executable}, arguments: [{LAB}], delay_release: 30}}"
    ends(call("register", "-f", "-", endpoint=cluster.endpoint, text=text), 0)
    return "lab"


def ask(cluster: Up, *arguments: str) -> Any:
    """Run a command that succeeds with ``-o json`` and return what it shows."""
    done = call(*arguments, "-o", "json", endpoint=cluster.endpoint)
    ends(done, 0)
    return json.loads(done.stdout)


def create(cluster: Up, *arguments: str) -> str:
    done = call("create", *arguments, endpoint=cluster.endpoint)
    ends(done, 0)
    return done.stdout.removesuffix("\n")


def invoke(cluster: Up, *arguments: str, text: str | bytes = "") -> Called:
    return call("invoke", *arguments, endpoint=cluster.endpoint, text=text)


def view_of(done: Called) -> dict[str, str]:
    """Read ``Field: value`` lines; values below the first are joined to it."""
    fields: dict[str, str] = {}
    name = ""
    for line in done.stdout.splitlines():
        if line.startswith(" "):
            fields[name] += f" {line.strip()}"
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


# ---- applications


def test_a_data_folder_in_use_is_named(cluster: Up) -> None:
    done = run("up", "--data-dir", str(cluster.data_dir), "--port", "0")
    ends(done, 2, f"data folder {cluster.data_dir} is used by process {cluster.process.pid}", "--data-dir")


def test_built_in_applications_are_listed(cluster: Up) -> None:
    done = call("list", "-a", endpoint=cluster.endpoint)
    ends(done, 0)
    title, *lines = done.stdout.splitlines()
    assert title.split() == ["Name", "Shim", "State", "Created", "Command"]
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["flmtest"][1:3] == ["Log", "Enabled"]
    assert rows["flmtest"][4] == "-"
    assert rows["flmping"][1:3] == ["Nats", "Enabled"]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d|\d{4}-\d\d-\d\d", row[3]) for row in rows.values())


def test_applications_come_change_and_go(cluster: Up, tmp_path: Path) -> None:
    file = tmp_path / "two agents.yaml"
    file.write_text("metadata: {name: one}\nspec: {command: ./one}\n---\nmetadata: {name: two}\nspec: {shim: Log}\n")
    done = call("register", "-f", str(file), endpoint=cluster.endpoint)
    ends(done, 0, "application one registered\napplication two registered\n")
    listed = call("--endpoint", cluster.endpoint, "list", "-a").stdout
    assert re.search(rf"^one +Nats +Enabled +\S+ +{re.escape(str(tmp_path / 'one'))}$", listed, re.MULTILINE)
    ends(call("register", "-f", str(file), endpoint=cluster.endpoint), 1, "application one is registered already")
    file.write_text("metadata: {name: one}\nspec: {command: other, max_instances: 3}\n")
    ends(call("update", "-f", str(file), endpoint=cluster.endpoint), 0, "application one updated\n")
    shown = ask(cluster, "view", "-a", "one")
    assert (shown["command"], shown["max_instances"]) == ("other", 3)
    assert shown["updated"] > shown["created"]
    for _ in range(2):
        ends(call("disable", "-a", "two", endpoint=cluster.endpoint), 0, "application two disabled\n")
    assert ask(cluster, "view", "-a", "two")["state"] == "disabled"
    ends(call("create", "-a", "two", endpoint=cluster.endpoint), 1, "application two is disabled")
    ends(call("enable", "-a", "two", endpoint=cluster.endpoint), 0, "application two enabled\n")
    ends(call("close", "-s", create(cluster, "-a", "two"), "--wait", endpoint=cluster.endpoint), 0)
    for name in ("one", "two"):
        ends(call("unregister", "-a", name, endpoint=cluster.endpoint), 0, f"application {name} unregistered\n")
    ends(call("unregister", "-a", "one", endpoint=cluster.endpoint), 1, "application 'one' is not registered")
    ends(call("update", "-f", str(file), endpoint=cluster.endpoint), 1, "application 'one' is not registered")
    ends(call("disable", "-a", "one", endpoint=cluster.endpoint), 1, "application 'one' is not registered")
    assert "\none " not in call("list", "-a", endpoint=cluster.endpoint).stdout


def test_environments_are_expanded_here_and_secrets_are_never_shown(cluster: Up) -> None:
    text = (
        "metadata: {name: vault}\nspec:\n  command: c\n  environments:\n"
        "    API_KEY: ${VAULT_KEY}\n    MODE: ${VAULT_MODE:-careful}\n    URL: https://me:hunter2@example.com/\n"
    )
    ends(call("register", "-f", "-", endpoint=cluster.endpoint, text=text), 2, "line 5", "VAULT_KEY is not set")
    ends(call("register", "-f", "-", endpoint=cluster.endpoint, text=text, VAULT_KEY="sk-123"), 0)
    for output in ("table", "json", "yaml"):
        for command in (("view", "-a", "vault"), ("list", "-a")):
            done = call(*command, "-o", output, endpoint=cluster.endpoint)
            ends(done, 0, "vault")
            assert "sk-123" not in done.stdout
            assert "hunter2" not in done.stdout
    shown = ask(cluster, "view", "-a", "vault")["environments"]
    assert shown == {"API_KEY": "********", "MODE": "careful", "URL": "https://me:********@example.com/"}
    ends(call("unregister", "-a", "vault", endpoint=cluster.endpoint), 0)


# ---- sessions and tasks


def test_sessions_are_created_found_viewed_and_closed(cluster: Up) -> None:
    options = ["-p", "7", "-r", "cpu=0.2", "--min", "0", "--max", "2", "--label", "team=search", "--label", "tier=gold"]
    session = create(cluster, "-a", "flmping", "--id", "mine", *options, "--common-data", "hello")
    assert session == "mine"
    other = create(cluster, "-a", "flmtest", "--label", "team=search")
    assert re.fullmatch(r"flmtest-\w{6}", other)
    ends(call("create", "-a", "flmping", "--id", "mine", endpoint=cluster.endpoint), 1, "mine")
    ends(call("create", "-a", "nobody", endpoint=cluster.endpoint), 1, "application 'nobody' is not registered")
    ends(call("create", "-a", "flmping", "-r", "cpu=lots", endpoint=cluster.endpoint), 2, "'lots' is no amount of cpu")
    for wanted, filters in (
        ({session, other}, ["--label", "team=search"]),
        ({session}, ["--label", "team=search", "--label", "tier=gold"]),
        ({other}, ["--label", "team=search", "--application", "flmtest"]),
        (set(), ["--label", "team=search", "--state", "Closed"]),
    ):
        assert {found["id"] for found in ask(cluster, "list", "-s", *filters)} == wanted
    shown = ask(cluster, "view", "-s", session)
    assert tuple(shown) == FIELDS["session"]
    assert shown["labels"] == {"team": "search", "tier": "gold"}
    assert shown["resources"] == {"cpu": 0.2, "memory": 128 * 2**20, "gpu": 0}
    assert (shown["priority"], shown["max_instances"], shown["common_data"]) == (7, 2, True)
    fields = view_of(call("view", "-s", session, endpoint=cluster.endpoint))
    assert (fields["State"], fields["Labels"], fields["Ended"]) == ("Open", "team=search tier=gold", "-")
    for each in (session, other):
        ends(call("close", "-s", each, endpoint=cluster.endpoint), 0, f"session {each} closing\n")
    eventually(
        lambda: len(ask(cluster, "list", "-s", "--label", "team=search", "--state", "closed")) == 2, "both are closed"
    )
    ends(call("view", "-s", "nobody-123456", endpoint=cluster.endpoint), 1, "session nobody-123456 is not known")


def test_a_session_that_is_closed_ends_what_runs_in_it(cluster: Up) -> None:
    ping = subprocess.Popen([*FLMPING, "-t", "1000000", "--endpoint", cluster.endpoint], stdout=subprocess.PIPE)
    assert ping.stdout is not None
    assert ping.stdout.readline().startswith(b"task ")
    title, *lines = call("list", "-s", endpoint=cluster.endpoint).stdout.splitlines()
    assert title.split() == [
        *["ID", "State", "App", "Resources", "Priority"],
        *["Pending", "Running", "Succeed", "Failed", "Created"],
    ]
    row = next(line for line in lines if " Open " in line).split()
    assert row[2:5] == ["flmping", "cpu=0.1,mem=128m,gpu=0", "0"]
    executor_title, *executors = call("list", "-e", endpoint=cluster.endpoint).stdout.splitlines()
    assert executor_title.split() == ["ID", "State", "Session", "Node", "Reason"]
    assert any(executor.split()[1:3] == ["Bound", row[0]] for executor in executors)
    ends(call("close", "-s", row[0], endpoint=cluster.endpoint), 0, f"session {row[0]} closing\n")
    ping.communicate(timeout=LIMIT_S)
    assert ping.returncode == 1
    ends(call("close", "-s", "nobody-123456", endpoint=cluster.endpoint), 1, "session nobody-123456 is not known")
    ends(call("close", "-s", "a.b", endpoint=cluster.endpoint), 2, "session 'a.b' is not a legal name")


def test_a_session_says_what_it_was_created_with_and_what_it_waits_for(cluster: Up) -> None:
    options = ["-r", "gpu=1000", "--weight", "2.5", "--idle-timeout", "3600"]
    session = create(cluster, "-a", "flmping", *options)
    waiting = subprocess.Popen([*FLMCTL, "invoke", "flmping", "x", "-s", session, "--endpoint", cluster.endpoint])
    eventually(lambda: ask(cluster, "view", "-s", session)["waits_for"], "it is known what it waits for")
    fields = view_of(call("view", "-s", session, endpoint=cluster.endpoint))
    assert "gpu=1000" in fields["Waits for"]
    assert (fields["Weight"], fields["Idle timeout"], fields["Close mode"]) == ("2.5", "1 h", "-")
    ends(call("close", "-s", session, "--force", endpoint=cluster.endpoint), 0, f"session {session} closing\n")
    assert waiting.wait(LIMIT_S) == 1
    eventually(lambda: ask(cluster, "view", "-s", session)["state"] == "closed", "it is closed")
    assert view_of(call("view", "-s", session, endpoint=cluster.endpoint))["Close mode"] == "force"


def test_tasks_are_cancelled_by_their_ids_or_all(cluster: Up, lab: str) -> None:
    session = create(cluster, "-a", lab, "--max", "1")
    command = [*FLMCTL, "invoke", lab, '["sleep", 60]', "-s", session, "--endpoint", cluster.endpoint]
    invoking = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]

    def tasks() -> list[str]:
        return [task["id"] for task in ask(cluster, "view", "-s", session, "-t")]

    eventually(lambda: len(tasks()) == 4, "all are stored")
    first, second, *_ = tasks()
    done = call("cancel", "-s", session, "-t", first, second, "--reason", "no use", endpoint=cluster.endpoint)
    ends(done, 0)
    assert done.stdout == f"task {first} cancelled\ntask {second} cancelled\n"
    done = call("cancel", "-s", session, first, "nope", endpoint=cluster.endpoint)
    ends(done, 1, f"session {session} has no task 'nope'")
    assert done.stdout == f"task {first} cancelled\n"
    ends(
        call("cancel", "-s", session, "--all", endpoint=cluster.endpoint), 0, f"session {session}: 2 tasks cancelled\n"
    )
    ends(
        call("cancel", "-s", session, "--all", endpoint=cluster.endpoint), 0, f"session {session}: 0 tasks cancelled\n"
    )
    errors = [process.communicate(timeout=LIMIT_S)[1] for process in invoking]
    assert [process.returncode for process in invoking] == [1] * 4
    assert sum("was cancelled: no use" in error for error in errors) == 2
    assert {task["error"]["code"] for task in ask(cluster, "view", "-s", session, "-t")} == {"task_cancelled"}
    ends(
        call("close", "-s", session, "--wait", endpoint=cluster.endpoint),
        0,
        "closed: 0 succeeded, 0 failed, 4 cancelled",
    )
    ends(call("cancel", "-s", session, endpoint=cluster.endpoint), 2, "expected either tasks (-t TASK...) or --all")
    ends(call("cancel", "-s", session, "--all", "t", endpoint=cluster.endpoint), 2, "expected either tasks")
    ends(call("cancel", "-s", "nobody-123456", "t", endpoint=cluster.endpoint), 1, "nobody-123456 is not known")
    ends(call("cancel", "-s", session, "-t", "a.b", endpoint=cluster.endpoint), 2, "task 'a.b' is not a legal name")


def test_who_waits_for_a_close_is_told_how_far_it_is(cluster: Up, lab: str) -> None:
    session = create(cluster, "-a", lab, "--max", "1")
    command = [*FLMCTL, "invoke", lab, '["sleep", 1.5]', "-s", session, "--endpoint", cluster.endpoint]
    invoking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    eventually(lambda: len(ask(cluster, "view", "-s", session, "-t")) == 2, "both are stored")
    done = call("close", "-s", session, "--wait", "--drain", "--timeout", "0.2", endpoint=cluster.endpoint)
    assert done.returncode == 1
    assert done.stderr.endswith(f"flmctl: error: session {session} is still closing after 0.2 s; it goes on\n")
    ends(call("invoke", lab, "1", "-s", session, endpoint=cluster.endpoint), 1, "closing")
    done = call("close", "-s", session, "--wait", "--drain", endpoint=cluster.endpoint)
    ends(done, 0)
    assert done.stdout == f"session {session} closed: 2 succeeded, 0 failed, 0 cancelled\n"
    assert re.search(rf"^\(session {session} closing: \d pending, 1 running\)$", done.stderr, re.MULTILINE)
    for process in invoking:
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0
    ends(call("close", "-s", session, "--wait", endpoint=cluster.endpoint), 0, f"session {session} closed\n")
    ends(call("close", "-s", session, "--drain", "--force", endpoint=cluster.endpoint), 2, "expected one of both")
    ends(call("close", "-s", session, "--timeout", "1", endpoint=cluster.endpoint), 2, "--timeout goes with --wait")


def test_events_are_shown_as_they_happen(cluster: Up) -> None:
    followed = [*FLMCTL, "events", "-a", "flmping", "--endpoint", cluster.endpoint]
    lines = subprocess.Popen(followed, stdout=subprocess.PIPE, text=True)
    objects = subprocess.Popen([*followed, "-t", "-o", "json"], stdout=subprocess.PIPE, text=True)
    assert lines.stdout is not None
    assert objects.stdout is not None
    while True:  # what happened before they listened is not told
        ends(invoke(cluster, "flmping", "x"), 0)
        if all(select.select([stream], [], [], 1.0)[0] for stream in (lines.stdout, objects.stdout)):
            break
    told = [json.loads(objects.stdout.readline())]
    while (told[-1]["noun"], told[-1]["event"]) != ("session", "closed"):
        told.append(json.loads(objects.stdout.readline()))
    assert all(tuple(event) == FIELDS["event"] for event in told)
    assert {event["application"] for event in told} == {"flmping"}
    assert {"executor", "session", "task"} <= {event["noun"] for event in told}
    assert re.fullmatch(r"[\d:]{8}  (session|executor) +\S+  [A-Z]\w+.*\n", lines.stdout.readline())
    for process in (lines, objects):
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130
    ends(call("events", "-s", "nobody-123456", endpoint=cluster.endpoint), 1, "session nobody-123456 is not known")
    ends(call("events", "-a", "nobody", endpoint=cluster.endpoint), 1, "application 'nobody' is not registered")
    ends(call("events", "-a", "a b", endpoint=cluster.endpoint), 2, "application 'a b' is not a legal name")


def test_an_answer_is_all_that_is_on_standard_output(cluster: Up, tmp_path: Path) -> None:
    done = invoke(cluster, "flmping", "héllo")
    assert (done.returncode, done.stdout, done.stderr) == (0, "héllo", "")
    assert invoke(cluster, "flmping", "-", text=b"\x00\xff\n").output == b"\x00\xff\n"
    (tmp_path / "input").write_bytes(b"from a file\n")
    assert invoke(cluster, "flmping", f"@{tmp_path / 'input'}").output == b"from a file\n"
    assert {found["state"] for found in ask(cluster, "list", "-s", "--application", "flmping")} <= {"closing", "closed"}


def test_who_asks_is_told_every_change_of_state(cluster: Up, lab: str) -> None:
    done = invoke(cluster, lab, '["sleep", 0.3]', "-v")
    assert done.returncode == 0
    session, *states = [line.split(" s  ", 1)[1] for line in done.stderr.splitlines()]
    assert re.fullmatch(r"session lab-\w{6} open", session)
    assert [line.split()[2] for line in states] == ["pending", "running", "succeed"]
    assert re.search(r"on executor \S+$", states[-1])


def test_a_task_that_fails_is_an_error_with_its_reason(cluster: Up, lab: str) -> None:
    done = invoke(cluster, lab, '["fail", "no such luck"]')
    ends(done, 1, "flmctl: error: task", "ValueError: no such luck")
    assert done.stdout == ""
    done = invoke(cluster, lab, '["fail", "no such luck"]', "-v")
    assert done.returncode == 1
    assert "  | Traceback (most recent call last):" in done.stderr.splitlines()
    ends(invoke(cluster, "nobody", "x"), 1, "application 'nobody' is not registered")


def test_common_data_reaches_the_service(cluster: Up, lab: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("be brief")
    for given in ("be brief", f"@{tmp_path / 'prompt'}"):
        assert json.loads(invoke(cluster, lab, '["who"]', "--common-data", given).stdout)["common_data"] == "be brief"


def test_who_waits_too_long_is_told_so(cluster: Up, lab: str) -> None:
    ends(invoke(cluster, lab, '["sleep", 1.5]', "--timeout", "0.3"), 1, "has not ended after 0.3 s", "its session ends")


def test_an_open_session_serves_many_invocations_and_its_tasks_can_be_looked_at(cluster: Up, lab: str) -> None:
    session = create(cluster, "-a", lab, "--max", "1")
    first, second = (json.loads(invoke(cluster, lab, '["who"]', "-s", session).stdout) for _ in range(2))
    assert first["pid"] == second["pid"]
    ends(invoke(cluster, lab, '["fail", "no such luck"]', "-s", session), 1, "no such luck")
    ends(invoke(cluster, "flmping", "x", "-s", session), 2, "one of application lab, not of flmping")
    tasks = ask(cluster, "view", "-s", session, "-t")
    assert [task["state"] for task in tasks] == ["succeed", "succeed", "failed"]
    assert all(tuple(task) == FIELDS["task"] for task in tasks)
    failed = tasks[-1]
    assert (failed["error"]["type"], failed["error"]["message"]) == ("ValueError", "no such luck")
    title, *rows = call("view", "-s", session, "-t", endpoint=cluster.endpoint).stdout.splitlines()
    assert title.split() == ["ID", "State", "Started", "Took", "Executor", "Output"]
    assert [row.split()[:2] for row in rows] == [[task["id"], task["state"].title()] for task in tasks]
    few = call("view", "-s", session, "-t", "--limit", "1", endpoint=cluster.endpoint)
    assert len(few.stdout.splitlines()) == 2
    assert few.stderr == "(the first 1 tasks; --limit shows more)\n"
    shown = call("view", "-s", session, "-t", failed["id"], endpoint=cluster.endpoint).stdout
    assert re.search(r"^State: +Failed$", shown, re.MULTILINE)
    assert re.search(r"^Error: +ValueError: no such luck$", shown, re.MULTILINE)
    assert "\nTraceback:\n  Traceback (most recent call last):\n" in shown
    ends(call("view", "-s", session, "-t", tasks[0]["id"], endpoint=cluster.endpoint), 0, "\nOutput, ", '"pid": ')
    ends(call("view", "-s", session, "-t", "nope", endpoint=cluster.endpoint), 1, "has no task 'nope'")
    ends(call("close", "-s", session, endpoint=cluster.endpoint), 0)
    assert len(ask(cluster, "view", "-s", session, "-t")) == 3  # it may have ended
    assert ask(cluster, "view", "-s", session, "-t", failed["id"]) == failed


def test_an_output_that_is_no_text_is_shown_as_base64(cluster: Up) -> None:
    session = create(cluster, "-a", "flmping")
    assert invoke(cluster, "flmping", "-", "-s", session, text=b"\xff\x00").output == b"\xff\x00"
    (task,) = ask(cluster, "view", "-s", session, "-t")
    assert (task["output"], base64.b64decode(task["output_base64"])) == (None, b"\xff\x00")
    done = call("view", "-s", session, "-t", task["id"], endpoint=cluster.endpoint)
    ends(done, 0, "Output: 2 bytes that are no text, see -o json")
    ends(call("close", "-s", session, endpoint=cluster.endpoint), 0)


# ---- executors, nodes, logs


def test_executors_and_nodes_are_listed_and_viewed(cluster: Up, lab: str) -> None:
    session = create(cluster, "-a", lab)
    assert invoke(cluster, lab, '["echo", 1]', "-s", session).stdout == "1"
    (executor,) = ask(cluster, "list", "-e", "--session", session)
    assert tuple(executor) == FIELDS["executor"]
    assert (executor["session"], executor["application"]) == (session, lab)
    eventually(lambda: ask(cluster, "view", "-e", executor["id"])["succeeded"] == 1, "the executor's counts are known")
    fields = view_of(call("view", "-e", executor["id"], endpoint=cluster.endpoint))
    assert (fields["ID"], fields["State"], fields["Session"]) == (executor["id"], "Bound", session)
    assert re.match(r"forked|warm|fresh", fields["Started"])
    ends(call("view", "-e", "nope", endpoint=cluster.endpoint), 1, "executor")
    (node,) = ask(cluster, "list", "-n")
    assert tuple(node) == FIELDS["node"]
    assert executor["id"] in {each["id"] for each in ask(cluster, "list", "-e", "--node", node["name"])}
    assert ask(cluster, "list", "-e", "--node", "elsewhere") == []
    assert view_of(call("view", "-n", node["name"], endpoint=cluster.endpoint))["State"] == "Ready"
    ends(call("view", "-n", "elsewhere", endpoint=cluster.endpoint), 1, "node")
    title, *lines = call("list", "-n", endpoint=cluster.endpoint).stdout.splitlines()
    assert title.split() == [
        *["Name", "Hostname", "Status", "CPU", "Memory", "Arch", "OS", "GPU", "Used", "Held", "by"],
    ]
    # Those of sessions before may be leaving.
    assert (node["gpu"], node["used"]["cpu"]) == (0, pytest.approx(0.1 * node["executors"]))
    assert node["memory_by"]
    assert [line.split()[2] for line in lines] == ["Ready"]
    ends(call("close", "-s", session, endpoint=cluster.endpoint), 0)


def test_logs_are_what_the_service_wrote(cluster: Up, lab: str) -> None:
    session = create(cluster, "-a", lab, "--max", "1")
    for word in ("one", "two"):
        ends(invoke(cluster, lab, f'["print", "{word}"]', "-s", session), 0)

    def lines(*options: str) -> list[str]:
        return call("logs", *options, endpoint=cluster.endpoint).stdout.splitlines()

    eventually(lambda: len(lines("-s", session)) == 4, "the lines have arrived")
    assert sorted(lines("-s", session)) == ["one", "one", "two", "two"]
    (executor,) = ask(cluster, "list", "-e", "--session", session)
    assert lines("-e", executor["id"]) == lines("-s", session)
    assert lines("-s", session, "--tail", "1") == lines("-s", session)[-1:]
    assert lines("-s", session, "--tail", "0") == []
    for line in lines("-s", session, "--timestamps", "--prefix"):
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT[\d:]{{8}}\.\d{{3}}Z {executor['id']} std(out|err) (one|two)", line)
    following = subprocess.Popen(
        [*FLMCTL, "logs", "-f", "--tail", "0", "-s", session, "--endpoint", cluster.endpoint], stdout=subprocess.PIPE
    )
    assert following.stdout is not None
    seen = b""
    while b"three" not in seen:  # whatever was written before it listened is not told
        ends(invoke(cluster, lab, '["print", "three"]', "-s", session), 0)
        if select.select([following.stdout], [], [], 0.5)[0]:
            seen += os.read(following.stdout.fileno(), 4096)
    ends(call("close", "-s", session, endpoint=cluster.endpoint), 0)
    following.communicate(timeout=LIMIT_S)  # it ends with the session
    assert following.returncode == 0
    ends(call("logs", "-s", "nobody-123456", endpoint=cluster.endpoint), 1, "session nobody-123456 is not known")


# ---- output


@pytest.mark.parametrize(("flag", "kind"), [("-a", "application"), ("-s", "session"), ("-n", "node")])
def test_lists_are_the_same_as_json_and_yaml(cluster: Up, flag: str, kind: str) -> None:
    ends(invoke(cluster, "flmping", "x"), 0)
    found = ask(cluster, "list", flag)
    assert found
    assert all(tuple(each) == FIELDS[kind] for each in found)
    done = call("list", flag, "-o", "yaml", endpoint=cluster.endpoint)
    assert [set(each) for each in yaml.safe_load(done.stdout)] == [set(each) for each in found]


def test_a_watched_list_is_a_document_for_each_change(cluster: Up) -> None:
    watching = subprocess.Popen(
        [*FLMCTL, "list", "-s", "--label", "watched=yes", "--watch", "-o", "json", "--endpoint", cluster.endpoint],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    assert json.loads(watching.stdout.readline()) == []
    session = create(cluster, "-a", "flmtest", "--label", "watched=yes")
    (found,) = json.loads(watching.stdout.readline())
    assert (found["id"], found["state"]) == (session, "open")
    ends(call("close", "-s", session, endpoint=cluster.endpoint), 0)
    while found["state"] != "closed":
        (found,) = json.loads(watching.stdout.readline())
    watching.send_signal(signal.SIGINT)
    assert watching.communicate(timeout=LIMIT_S)[0] == ""
    assert watching.returncode == 130


def test_a_watched_list_is_drawn_anew_in_a_terminal(cluster: Up) -> None:
    shown = in_terminal(
        ["list", "-n", "--watch", "--endpoint", cluster.endpoint], columns=200, stop_after=b"nodes at", times=2
    )
    frames = shown.split("\x1b[?7l")[1:]
    assert len(frames) >= 2
    for frame in frames:
        assert re.search(r"nodes at \d\d:\d\d:\d\d, Ctrl-C ends\x1b\[K\n", frame)
        assert "Ready" in frame
    assert frames[1].startswith("\x1b[3F")  # three lines up: where the one before began


def test_a_terminal_gets_what_fits_it(cluster: Up) -> None:
    ends(invoke(cluster, "flmping", "x"), 0)
    output = in_terminal(["list", "-s", "--endpoint", cluster.endpoint], columns=80, NO_COLOR="1")
    lines = output.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "Pending" in lines[0]
    assert "Resources" not in lines[0]
    assert lines[-1].startswith("(no room for Resources, Priority")
    assert "\x1b" not in output
    assert "\x1b[1mID" in in_terminal(["list", "-s", "--endpoint", cluster.endpoint], columns=200, TERM="xterm")


def test_nothing_to_list_is_said_in_a_terminal(cluster: Up) -> None:
    shown = in_terminal(["list", "-e", "--node", "elsewhere", "--endpoint", cluster.endpoint], columns=80, NO_COLOR="1")
    assert shown == "ID  State  Session  Node  Reason\n(none)\n"


def test_an_answer_in_a_terminal_ends_its_line(cluster: Up) -> None:
    assert in_terminal(["invoke", "flmping", "x", "--endpoint", cluster.endpoint], columns=80) == "x\n"


# ---- completion


def completed(cluster: Up, *lines: str) -> list[list[str]]:
    """Return what bash offers for each of some command lines, the cursor at its end."""
    script = ['flmctl() { "$PYTHON" -m flame_cli.main "$@"; }', call("completion", "bash").stdout]
    for line in lines:
        words = line.split(" ")
        script += [f"COMP_WORDS=({shlex.join(words)})", f"COMP_CWORD={len(words) - 1}", "_flmctl_complete"]
        script.append('echo "${COMPREPLY[@]}"')
    done = run("-c", "\n".join(script), program=["bash"], endpoint=cluster.endpoint, PYTHON=sys.executable)
    assert done.stderr == ""
    return [offered.split() for offered in done.stdout.splitlines()]


def test_bash_completes_verbs_options_and_names(cluster: Up) -> None:
    (node,) = ask(cluster, "list", "-n")
    assert completed(cluster, "flmctl reg", "flmctl view -a flmt", "flmctl view -n ") == [
        ["register"],
        ["flmtest"],
        [node["name"]],
    ]


# ---- flmping


def test_flmping_shows_each_task(cluster: Up) -> None:
    done = call("-t", "5", program="flmping", endpoint=cluster.endpoint)
    ends(done, 0)
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r"task \w+  executor \S+  \d+\.\d\d ms", line) for line in lines)
    assert len({line.split()[3] for line in lines}) == 1  # one at a time: one executor
    assert done.stderr == ""


def test_flmping_sums_up(cluster: Up) -> None:
    done = call("-t", "500", "-c", "2", "-m", "100", "-p", program="flmping", endpoint=cluster.endpoint)
    ends(done, 0)
    figures = dict(line.split(": ") for line in done.stdout.splitlines())
    assert figures["tasks"] == "1000 in 2 sessions, 100 bytes each"
    assert figures["succeeded"] == "1000"
    assert figures["failed"] == "0"
    assert float(figures["duration"].removesuffix(" s")) > 0
    assert float(figures["throughput"].removesuffix(" tasks/s")) > 0
    median, slow = (float(figures[f"latency {name}"].removesuffix(" ms")) for name in ("p50", "p99"))
    assert 0 < median <= slow
    assert done.stderr == ""


def test_a_payload_over_the_limit_is_refused(cluster: Up) -> None:
    too_much = 1024**3 + 1
    done = call("-m", str(too_much), program="flmping", endpoint=cluster.endpoint)
    ends(done, 2, f"flmping: error: input of {too_much:,} bytes")


def test_ctrl_c_ends_flmping_and_its_session(cluster: Up) -> None:
    ping = subprocess.Popen(
        [*FLMPING, "-t", "1000000", "--endpoint", cluster.endpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert ping.stdout is not None
    assert ping.stdout.readline().startswith("task ")
    session = next(line.split()[0] for line in _sessions(cluster) if " Open " in line)
    ping.send_signal(signal.SIGINT)
    _, errors = ping.communicate(timeout=LIMIT_S)
    assert ping.returncode == 130
    assert errors == ""
    eventually(
        lambda: any(line.split()[:2] == [session, "Closed"] for line in _sessions(cluster)), "the session is closed"
    )


def test_the_end_of_a_pipe_is_no_error(cluster: Up) -> None:
    command = f"{shlex.join(FLMCTL)} ping -t 1000000 --endpoint {cluster.endpoint} | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.stdout.startswith("task ")
    assert done.stderr == ""


# ---- flmexec


@pytest.fixture
def flmexec(cluster: Up) -> Callable[..., Called]:
    def run_script(*arguments: str, text: str | bytes = "") -> Called:
        return call(*arguments, program="flmexec", endpoint=cluster.endpoint, text=text)

    return run_script


def test_a_script_runs_in_the_cluster(flmexec: Callable[..., Called]) -> None:
    done = flmexec("-c", "cat; echo out; echo err >&2; exit 3", "-i", "-", text=b"\xffin\n")
    assert (done.returncode, done.output, done.stderr) == (3, b"\xffin\nout\n", "err\n")
    done = flmexec("-l", "python", "-c", "import sys; print(sys.stdin.read().upper())", "-i", "hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, "HELLO\n", "")


def test_a_script_runs_as_often_as_asked(flmexec: Callable[..., Called], tmp_path: Path) -> None:
    (tmp_path / "script").write_text("echo run; exit 4")
    done = flmexec("-c", f"@{tmp_path / 'script'}", "-t", "5")
    assert (done.returncode, done.stdout) == (4, "run\n" * 5)


def test_a_script_that_is_ended_has_the_status_that_shells_give_it(flmexec: Callable[..., Called]) -> None:
    assert flmexec("-c", "kill -9 $$").returncode == 137
    assert flmexec("-c", "sleep 20", "--timeout", "0.2").returncode == 124


def test_whoever_runs_many_in_a_terminal_sees_how_far_they_are(cluster: Up) -> None:
    shown = in_terminal(["-c", "echo run", "-t", "3"], columns=80, program=FLMEXEC, FLAME_ENDPOINT=cluster.endpoint)
    bar, *rest = shown.split("\r")
    assert "scripts [....................] 0/3" in (bar, *rest)
    assert shown.count("run\n") == 3
    assert shown.endswith(("run\n", "\r")), "nothing of the bar is left"
    shown = in_terminal(["-t", "200", "-p"], columns=80, program=FLMPING, FLAME_ENDPOINT=cluster.endpoint)
    assert "\rtasks [" in shown
    assert "succeeded: 200" in shown
    assert "tasks [" not in in_terminal(["-t", "2"], columns=80, program=FLMPING, FLAME_ENDPOINT=cluster.endpoint)


def _sessions(cluster: Up) -> list[str]:
    return call("list", "-s", endpoint=cluster.endpoint).stdout.splitlines()[1:]


def in_terminal(
    arguments: list[str],
    *,
    columns: int,
    program: list[str] = FLMCTL,
    stop_after: bytes = b"",
    times: int = 0,
    **environment: str,
) -> str:
    """Run a program in a terminal of that width and return what it shows; Ctrl-C once something was there so often."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        process = subprocess.Popen([*program, *arguments], stdout=theirs, stderr=theirs, env=kept | environment)
    finally:
        os.close(theirs)
    shown = b""
    try:
        while select.select([ours], [], [], LIMIT_S)[0]:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the last one who could write has gone
                break
            if not part:
                break
            shown += part
            if stop_after and shown.count(stop_after) >= times:
                process.send_signal(signal.SIGINT)
                stop_after = b""
        else:
            process.kill()
    finally:
        os.close(ours)
    assert process.wait(LIMIT_S) == (130 if times else 0), shown
    return shown.decode().replace("\r\n", "\n")
