"""What `-o json`, `-o yaml` and `view` show, and what they never show."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml

from flame import CloseMode, ClusterEvent, Task, TaskFault, TaskState
from flame.client.logs import LogLine
from flame.protocol.api import NodeInfo, SessionInfo
from flame.protocol.events import Noun
from flame.protocol.records import ApplicationRecord, ApplicationSpec, ExecutorRecord, SessionOptions, SessionRecord
from flame.protocol.resources import Resources
from flame.protocol.states import ExecutorState, NodeState, SessionState
from flame.scripts import LANGUAGES, encode_result
from flame.scripts import ScriptResult as Result
from flame_cli import applications, ending, events, executors, logs, nodes, sessions, tasks
from flame_cli.choices import Language, SessionStateName
from flame_cli.documents import FIELDS, at, plain, to_json, to_yaml
from flame_cli.errors import CommandFailed
from flame_cli.fields import block, duration, fields, label
from flame_cli.masking import looks_secret, masked, without_passwords
from flame_cli.scripts import result_of, status_of

AT = 1_700_000_000.125

SPEC = ApplicationSpec(
    command="uv",
    arguments=("run", "main file.py", "--broker=nats://me:pw@host"),
    environments={"API_KEY": "sk-123", "MODE": "careful"},
    input_schema={"type": "object"},
    url="https://me:pw@example.com/a.tar",
)
APPLICATION = ApplicationRecord(name="agent", spec=SPEC, created=AT)
SESSION = SessionInfo(
    session=SessionRecord(
        id="agent-1N1sIX",
        application="agent",
        options=SessionOptions(priority=7, resources=Resources(0.5, 2**29, 1), labels={"team": "search"}),
        created=AT,
    ),
    pending=1,
)
EXECUTOR = ExecutorRecord(
    id="e1",
    node="n1",
    application="agent",
    session="agent-1N1sIX",
    epoch=1,
    state=ExecutorState.BOUND,
    pid=42,
    started="fresh: it has threads",
    created=AT,
    updated=AT,
)
NODE = NodeInfo(
    name="n1",
    hostname="n1.example",
    state=NodeState.NOT_READY,
    cpu=2.0,
    memory=8 * 2**30,
    gpu=0,
    arch="x86_64",
    os="Linux",
    executors=1,
)
TASK = Task("t1", "agent-1N1sIX", "agent", TaskState.SUCCEED, b"42\n", None, "e1", 1, AT, AT + 0.25)
EVENT = ClusterEvent(
    noun=Noun.EXECUTOR,
    id="e1",
    event="released",
    state="released",
    before="bound",
    at=AT,
    application="agent",
    session="agent-1N1sIX",
    node="n1",
    code="killed",
    reason="signal 9\x1b\nand more of it",
)
DOCUMENTS = {
    "application": applications.document(APPLICATION),
    "session": sessions.document(SESSION),
    "executor": executors.document(EXECUTOR),
    "node": nodes.document(NODE),
    "task": tasks.document(TASK),
    "event": events.document(EVENT),
}


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# ---- fields


@pytest.mark.parametrize("kind", FIELDS)
def test_a_document_has_the_fields_that_help_lists(kind: str) -> None:
    assert tuple(DOCUMENTS[kind]) == FIELDS[kind]


@pytest.mark.parametrize(
    ("kind", "known", "elsewhere"),
    [
        ("application", {*ApplicationRecord.model_fields, *ApplicationSpec.model_fields}, {"spec"}),
        (
            "session",
            {*SessionInfo.model_fields, *SessionRecord.model_fields, *SessionOptions.model_fields},
            # The last ones are how counts are kept exact.
            {
                "session",
                "options",
                "common_data_key",
                "common_data_version",
                "credentials_key",
                "counted",
                "strays",
                "writer",
                "written_from",
            },
        ),
        ("executor", set(ExecutorRecord.model_fields), {"counted_to"}),
        ("node", set(NodeInfo.model_fields), {"application"}),
        ("task", set(Task.__dataclass_fields__), {"session_id"}),
        ("event", set(ClusterEvent.__dataclass_fields__), {"record"}),
    ],
)
def test_all_that_is_known_is_shown(kind: str, known: set[str], elsewhere: set[str]) -> None:
    assert known - elsewhere <= set(FIELDS[kind])


def test_choices_are_those_of_the_sdk() -> None:
    assert {state.value for state in SessionStateName} == {state.value for state in SessionState}
    assert tuple(language.value for language in Language) == LANGUAGES


def test_json_and_yaml_say_the_same() -> None:
    for document in DOCUMENTS.values():
        said = json.loads(to_json(document))
        assert said == json.loads(to_json(document, compact=True)) == yaml.safe_load(to_yaml(document))
    assert "\n" not in to_json(DOCUMENTS["application"], compact=True)


def test_values_are_what_programs_expect() -> None:
    session = plain(DOCUMENTS["session"])
    assert session["state"] == "open"
    assert session["created"] == "2023-11-14T22:13:20.125Z"
    assert session["ended"] is None
    assert session["resources"] == {"cpu": 0.5, "memory": 2**29, "gpu": 1}
    assert plain(DOCUMENTS["node"])["state"] == "not ready"
    assert plain(DOCUMENTS["application"])["arguments"][:2] == ["run", "main file.py"]
    assert at(0) is None


def test_an_output_is_text_or_base64() -> None:
    assert (DOCUMENTS["task"]["output"], DOCUMENTS["task"]["output_base64"]) == ("42\n", None)
    binary = tasks.document(Task("t", "s", "a", TaskState.SUCCEED, b"\xff"))
    assert (binary["output"], binary["output_base64"]) == (None, "/w==")


# ---- view


def test_a_view_is_aligned() -> None:
    lines = fields(DOCUMENTS["application"])
    begin = len("Session retry limit:  ")
    assert all(line[begin - 1] == " " and line[begin] != " " for line in lines if '"' not in line)
    shown = {line[:begin].strip(): line[begin:] for line in lines}
    assert shown["Delay release:"] == "60 s"
    assert shown["Arguments:"] == "run 'main file.py' '--broker=nats://me:********@host'"
    assert shown["Environments:"] == "API_KEY=********"
    assert shown["Created:"] == "2023-11-14 22:13:20"
    assert shown["Updated:"] == shown["Labels:"] == shown["Description:"] == "-"
    assert shown["Fresh process:"] == "no"


def test_what_was_started_how_is_shown() -> None:
    lines = fields(DOCUMENTS["executor"])
    assert "Started:          fresh: it has threads" in lines
    assert "PID:              42" in lines


def test_times_are_written_with_their_unit() -> None:
    assert [duration(seconds) for seconds in (0, 0.1, 60, 90, 3600, 86400)] == [
        *("0 s", "0.1 s", "60 s", "90 s", "1 h", "24 h"),
    ]
    lines = fields(DOCUMENTS["application"])
    assert "Timeout:              1 h" in lines
    assert "Retry on:             -" in lines


def test_a_reason_of_several_lines_is_shown_whole_below_its_field_and_by_its_first_line_in_a_table() -> None:
    failed = EXECUTOR.changed(reason="ValueError: no\nTraceback:\n\n\tin x\x1b")
    lines = fields(executors.document(failed))
    begin = lines.index("Reason:           ValueError: no")
    assert lines[begin + 1 : begin + 4] == [" " * 18 + "Traceback:", "", " " * 18 + "        in x?"]
    assert executors.row(failed)[-1] == "ValueError: no"


def test_a_node_says_how_it_holds_executors_to_what_they_asked_for() -> None:
    assert nodes.held_by(NODE) == "-"
    assert nodes.held_by(NODE.changed(memory_by="cgroup2", cpu_by="cgroup2")) == "cgroup2"
    assert nodes.held_by(NODE.changed(memory_by="watch", cpu_by="affinity")) == "watch,affinity"
    assert nodes.held_by(NODE.changed(application="agent", memory_by="none")) == "attached, for agent"
    assert nodes.document(NODE.changed(application="agent"))["serves"] == "attached, for agent"
    assert len(nodes.row(NODE)) == len(nodes.COLUMNS)


def test_how_a_session_ends_is_told_only_when_it_does() -> None:
    assert DOCUMENTS["session"]["close_mode"] is None
    closing = SESSION.session.changed(state=SessionState.CLOSING, close_mode=CloseMode.DRAIN)
    assert sessions.document(SESSION.changed(session=closing))["close_mode"] == "drain"
    far = ending.how_far(SESSION.changed(session=closing, running=2))
    assert far == "session agent-1N1sIX closing: 1 pending, 2 running"
    closed = SESSION.session.changed(state=SessionState.CLOSED)
    assert ending.summary(SESSION.changed(session=closed, cancelled=3)) == (
        "session agent-1N1sIX closed: 0 succeeded, 0 failed, 3 cancelled"
    )


# ---- events


def test_an_event_is_a_line() -> None:
    line = events.line(EVENT)
    assert line == "2023-11-14  executor     e1  Released  session=agent-1N1sIX node=n1  [killed] signal 9?"
    assert events.line(EVENT, width=40) == line[:39] + "…"
    assert "\x1b[31mNotReady\x1b[0m" in events.line(replace(EVENT, event="not ready"), colour=True)
    waiting = ClusterEvent(
        noun=Noun.SESSION, id="s1", event="waiting", state="open", at=AT, session="s1", reason="needs gpu=1"
    )
    assert events.line(waiting) == "2023-11-14  session      s1  Waiting  needs gpu=1"
    assert events.line(replace(waiting, reason="")).endswith("s1  Waiting  no more")


def test_an_event_cut_within_its_state_is_not_coloured() -> None:
    assert "\x1b" not in events.line(replace(EVENT, event="not ready"), width=31, colour=True)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("id", "ID"),
        ("delay_release_s", "Delay release"),
        ("input_schema", "Input schema"),
        ("url", "URL"),
        ("os", "OS"),
    ],
)
def test_labels_are_words(key: str, text: str) -> None:
    assert label(key) == text


def test_a_state_is_coloured_in_a_terminal_only() -> None:
    assert "State:      NotReady" in fields(DOCUMENTS["node"])
    assert "State:      \x1b[31mNotReady\x1b[0m" in fields(DOCUMENTS["node"], colour=True)


def test_a_block_is_cut_where_a_terminal_would_scroll() -> None:
    assert block("Output", "a\n\n\x1b[31mb\tc\n") == ["Output:", "  a", "", "  ?[31mb  c"]
    lines = block("Output", "x\n" * 50, limit=3)
    assert lines[1:] == ["  x"] * 3 + ["  (and 47 lines more: a pipe or -o json shows all)"]


@pytest.mark.parametrize(
    ("started", "finished", "text"),
    [(0, 0, "-"), (1, 0, "-"), (1, 1.0126, "13 ms"), (1, 3.46, "2.5 s"), (1, 91, "1.5 min"), (2, 1, "0 ms")],
)
def test_how_long_it_took_is_short(started: float, finished: float, text: str) -> None:
    assert tasks.took(started, finished) == text


def test_a_list_of_tasks_shows_the_beginning_of_what_came_of_them() -> None:
    def preview(**fields: Any) -> str:
        return tasks.preview(Task("t", "s", "a", TaskState.SUCCEED, **fields))

    assert preview(output=b"two\n lines\n") == "two lines"
    assert preview(output=b"x" * 100) == "x" * 59 + "…"
    assert preview(output=b"\xff\xff") == "(2 bytes)"
    assert preview() == "-"
    assert preview(error=TaskFault("task_failed", "no\nluck", "ValueError")) == "ValueError: no luck"
    assert tasks.row(TASK) == ["t1", "Succeed", "2023-11-14", "250 ms", "e1", "42"]


# ---- secrets


@pytest.mark.parametrize(
    "name",
    [
        *("DEEPSEEK_API_KEY", "api_key", "GITHUB_TOKEN", "CLIENT_SECRET", "DB_PASSWORD", "DB_PASS", "MYSQL_PWD"),
        *("AWS_CREDENTIALS", "HTTP_AUTHORIZATION", "SSH_PRIVATE", "SESSION_COOKIE", "GH_PAT", "SENTRY_DSN"),
    ],
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert looks_secret(name)
    assert masked({name: "x"}) == {name: "********"}


@pytest.mark.parametrize("name", ["PATH", "HOME", "DEEPSEEK_BASE_URL", "PWD", "OLDPWD", "LOG_LEVEL", "PATTERN", "MODE"])
def test_other_names_are_shown(name: str) -> None:
    assert masked({name: "x"}) == {name: "x"}


def test_an_empty_value_is_no_secret() -> None:
    assert masked({"API_KEY": ""}) == {"API_KEY": ""}


def test_passwords_in_urls_are_hidden() -> None:
    assert (
        without_passwords("nats://a:b@h:1,nats://:c@i/?x=y:z@w") == "nats://a:********@h:1,nats://:********@i/?x=y:z@w"
    )
    assert without_passwords("http://host:80/a@b and 12:30@noon") == "http://host:80/a@b and 12:30@noon"


def test_no_form_shows_a_secret() -> None:
    document = DOCUMENTS["application"]
    for text in (to_json(document), to_yaml(document), "\n".join(fields(document))):
        assert "sk-123" not in text
        assert ":pw@" not in text
        assert "careful" in text


# ---- logs and scripts


def test_a_line_of_a_log_is_as_the_service_wrote_it() -> None:
    line = LogLine(AT, "agent", "agent-1N1sIX", "e1", "stderr", "\x1b[1mbold\x1b[0m")
    assert logs.written(line, logs.Wanted()) == "\x1b[1mbold\x1b[0m"
    wanted = logs.Wanted(timestamps=True, prefix=True)
    assert logs.written(line, wanted) == "2023-11-14T22:13:20.125Z e1 stderr \x1b[1mbold\x1b[0m"


@pytest.mark.parametrize(
    ("result", "status"),
    [
        (Result(status=0), 0),
        (Result(status=3), 3),
        (Result(status=-9), 137),
        (Result(status=-15, timed_out=True), 124),
    ],
)
def test_a_script_has_the_status_that_a_shell_would_give_it(result: Result, status: int) -> None:
    assert status_of(result) == status


def test_what_came_of_a_script_is_read_from_its_output_or_its_error() -> None:
    result = Result(status=3, stdout=b"out", stderr=b"err")
    data = encode_result(result)
    fault = TaskFault("task_failed", "exit status 3", details=data)
    assert result_of(Task("t", "s", "flmexec", TaskState.SUCCEED, data)) == result
    assert result_of(Task("t", "s", "flmexec", TaskState.FAILED, error=fault)) == result
    lost = Task("t", "s", "flmexec", TaskState.FAILED, error=TaskFault("internal", "the executor is gone"))
    with pytest.raises(CommandFailed, match="the executor is gone"):
        result_of(lost)
