"""What the command line prints and what it reads, without a cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import BrokerUnavailable, ConfigurationError, FlameError, InvalidArgument, SessionNotFound
from flame.protocol.api import NodeInfo, SessionInfo
from flame.protocol.records import ApplicationRecord, ApplicationSpec, ExecutorRecord, SessionRecord
from flame.protocol.resources import Resources
from flame.protocol.states import ExecutorState, NodeState, Placement, SessionState
from flame_cli import applications, executors, nodes, sessions
from flame_cli.errors import CommandFailed, ExitCode, report
from flame_cli.expansion import expand
from flame_cli.ping import PingOptions, Tally, percentile, summary
from flame_cli.rendering import Column, amount_of_bytes, clock, state, table, visible
from flame_cli.yaml_spec import read_applications

AT = 1_700_000_000.0


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


# ---- tables

SESSION_ROW = ["openai-agent-1N1sIX", "Open", "openai-agent", "cpu=0.1,mem=128m,gpu=0", *"01234", "03:36:51"]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    made = table((Column("Name"), Column("Shim")), [["flmping", "Nats"], ["a", "Log"]])
    assert made.lines == ["Name     Shim", "flmping  Nats", "a        Log"]


def test_numbers_stand_under_the_end_of_their_title() -> None:
    made = table((Column("Pending", right=True), Column("ID")), [["7", "a"], ["1234567890", "b"]])
    assert made.lines == ["   Pending  ID", "         7  a", "1234567890  b"]


def test_an_empty_table_is_its_titles() -> None:
    assert table(sessions.COLUMNS, []).lines == [
        "ID  State  App  Resources  Priority  Pending  Running  Succeed  Failed  Created"
    ]


def test_a_pipe_gets_everything() -> None:
    row = ["a" * 300, "Nats", "Enabled", "03:36:51", "/usr/bin/" + "b" * 300]
    made = table(applications.COLUMNS, [row])
    assert made.lines[1].split() == row
    assert made.dropped == []


@pytest.mark.parametrize("width", [80, 100, 130, 200])
def test_sessions_fit_a_terminal(width: int) -> None:
    made = table(sessions.COLUMNS, [SESSION_ROW], width=width)
    assert all(len(line) <= width for line in made.lines)
    assert made.lines[1].split()[:2] == SESSION_ROW[:2]
    assert (made.dropped == []) is (width >= 130)


def test_what_matters_least_is_left_out_first() -> None:
    assert table(sessions.COLUMNS, [SESSION_ROW], width=100).dropped == ["Resources"]
    assert table(sessions.COLUMNS, [SESSION_ROW], width=80).dropped == ["App", "Resources", "Priority"]


def test_a_long_command_is_cut_in_a_terminal_and_a_name_never_is() -> None:
    row = ["n" * 48, "Nats", "Enabled", "03:36:51", "/opt/" + "c" * 100]
    title, line = table(applications.COLUMNS, [row], width=100).lines
    assert len(line) == 100
    assert line.startswith("n" * 48)
    assert line.endswith("c…")
    assert title.startswith("Name ")


def test_colours_change_no_width() -> None:
    rows = [["a", "Enabled"], ["bb", "Disabled"]]
    columns = (Column("Name"), Column("State", state=True))
    plain = table(columns, rows).lines
    coloured = table(columns, rows, colour=True).lines
    assert "\x1b[32mEnabled" in coloured[1]
    strip = str.maketrans({"\x1b": None})
    for code in ("[1m", "[0m", "[32m", "[33m"):
        coloured = [line.translate(strip).replace(code, "") for line in coloured]
    assert [line.rstrip() for line in coloured] == plain


def test_what_a_service_is_called_does_not_steer_the_terminal() -> None:
    assert visible("a\x1b[31m\nb\tc") == "a?[31m?b?c"
    assert visible("") == "-"


def test_times_of_today_are_clock_times_and_others_are_dates() -> None:
    assert clock(AT, now=AT + 60) == "22:13:20"
    assert clock(AT, now=AT + 86_400) == "2023-11-14"


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0"), (512, "512"), (128 * 2**20, "128m"), (8_361_418_752, "7.8g"), (2**40, "1.0t"), (16 * 2**30, "16g")],
)
def test_memory_is_short(amount: int, text: str) -> None:
    assert amount_of_bytes(amount) == text


def test_a_state_is_one_word() -> None:
    assert [state(s.value) for s in NodeState] == ["Ready", "Unknown", "NotReady"]


# ---- rows


def test_rows_have_as_many_cells_as_their_table_has_columns() -> None:
    application = ApplicationRecord(name="flmtest", spec=ApplicationSpec(shim="Log"), created=AT)
    session = SessionRecord(id="flmtest-1N1sIX", application="flmtest", state=SessionState.CLOSING, created=AT)
    executor = ExecutorRecord(
        id="e1",
        node="n1",
        application="flmtest",
        session="flmtest-1N1sIX",
        epoch=1,
        state=ExecutorState.BOUND,
        created=AT,
        updated=AT,
    )
    node = NodeInfo(
        name="n1",
        hostname="n1.example",
        state=NodeState.NOT_READY,
        cpu=2.0,
        memory=8 * 2**30,
        gpu=1,
        arch="x86_64",
        os="Linux",
        executors=1,
        used=Resources(0.5, 128 * 2**20, 1),
        memory_by="watch",
        cpu_by="affinity",
    )
    info = SessionInfo(session=session, pending=1, running=2, succeeded=3, failed=4)
    rows = {
        "flmtest Log Enabled 2023-11-14 -": (applications.COLUMNS, applications.row(application)),
        "flmtest-1N1sIX Closing flmtest cpu=0.1,mem=128m,gpu=0 0 1 2 3 4 2023-11-14": (
            sessions.COLUMNS,
            sessions.row(info),
        ),
        "e1 Bound flmtest-1N1sIX n1 -": (executors.COLUMNS, executors.row(executor)),
        "n1 n1.example NotReady 2 8g x86_64 Linux 1 cpu=0.5,mem=128m,gpu=1 watch,affinity": (
            nodes.COLUMNS,
            nodes.row(node),
        ),
    }
    for text, (columns, row) in rows.items():
        assert table(columns, [row]).lines[1].split() == text.split()


# ---- application files

GOOD = """\
metadata:
  name: openai-agent
spec:
  command: uv
  arguments:
    - run
    - main.py
    - 8080
  environments:
    DEEPSEEK_API_KEY: sk-xxxxxxxxxxxxxxxxx
    PORT: 8080
    VERSION: 1.10
    MODE: 0755
    SINCE: 2024-01-01
    TIME: 12:30
    EMPTY: ""
    YES: "yes"
"""


VARIABLES = {"HOME": "/home/me", "EMPTY": "", "KEY": "sk-123"}


def read(text: str, folder: Path = Path("/apps")) -> dict[str, ApplicationSpec]:
    found = read_applications(text, source="agent.yaml", folder=folder, variables=VARIABLES)
    return {application.name: application.spec for application in found}


def test_the_reference_file_is_read_as_it_is_written() -> None:
    assert read(GOOD)["openai-agent"] == ApplicationSpec(
        command="uv",
        arguments=("run", "main.py", "8080"),
        environments={
            "DEEPSEEK_API_KEY": "sk-xxxxxxxxxxxxxxxxx",
            "PORT": "8080",
            "VERSION": "1.10",
            "MODE": "0755",
            "SINCE": "2024-01-01",
            "TIME": "12:30",
            "EMPTY": "",
            "YES": "yes",
        },
    )


def spec(lines: str, name: str = "a") -> str:
    return f"metadata: {{name: {name}}}\nspec:\n  command: c\n" + "".join(f"  {line}\n" for line in lines.splitlines())


def test_every_field_of_the_specification_can_be_given() -> None:
    text = spec(
        "shim: Nats\narguments: [x]\nenvironments: {A: b}\nworking_directory: /w\ndescription: d\nlabels: {k: v}\n"
        "url: https://example.com/d.tar\nimage: d:1\noutput_schema: {}\ncommon_data_schema:\n"
        "input_schema: {type: object, required: [city], maxProperties: 3, nullable: false, default: ~, big: 1.5}\n"
        "max_instances: 4\nmin_instances: 1\ndelay_release: 2.5\nconcurrency: 3\nsession_retry_limit: 2\n"
        "fresh_process: yes\nwarm_instances: 2\nmax_executors: 9\nweight: 2.5\nplacement: pack\nidle_timeout: 0\n"
        "timeout: 2\nexpires: 3\ndelay_s: 0.5\nmax_attempts: 5\nretry_on: [ValueError]\nretry_backoff: 0.25"
    )
    given = {line.split(":")[0].strip() for line in text.splitlines()[2:]}
    assert given | {f"{name}_s" for name in given} >= set(ApplicationSpec.model_fields)
    assert read(text)["a"] == ApplicationSpec(
        command="c",
        arguments=("x",),
        environments={"A": "b"},
        working_directory="/w",
        description="d",
        labels={"k": "v"},
        url="https://example.com/d.tar",
        image="d:1",
        input_schema={
            "type": "object",
            "required": ["city"],
            "maxProperties": 3,
            "nullable": False,
            "default": None,
            "big": 1.5,
        },
        fresh_process=True,
        warm_instances=2,
        max_instances=4,
        min_instances=1,
        delay_release_s=2.5,
        concurrency=3,
        session_retry_limit=2,
        max_executors=9,
        weight=2.5,
        placement=Placement.PACK,
        idle_timeout_s=0,
        timeout_s=2,
        expires_s=3,
        delay_s=0.5,
        max_attempts=5,
        retry_on=("ValueError",),
        retry_backoff_s=0.25,
    )


def test_what_is_empty_has_its_default() -> None:
    assert read(spec("arguments:\nenvironments:\nlabels:\nmax_executors:\nretry_on:"))["a"] == ApplicationSpec(
        command="c"
    )


def test_an_alias_of_yaml_may_be_used() -> None:
    assert read(spec("labels: &l {k: v}\nenvironments: *l"))["a"].environments == {"k": "v"}


def test_a_working_directory_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    assert read(spec("working_directory: ."), tmp_path)["a"].working_directory == str(tmp_path.resolve())
    found = read(spec("working_directory: agents/../agents"), tmp_path)["a"].working_directory
    assert found == str(tmp_path.resolve() / "agents")


def test_a_command_with_a_slash_is_relative_to_the_file_and_keeps_its_links(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to("/bin/sh")
    assert read(spec("").replace("command: c", "command: ./python"), tmp_path)["a"].command == str(tmp_path / "python")
    assert read(spec("").replace("command: c", "command: /bin/c"), tmp_path)["a"].command == "/bin/c"
    assert read(spec(""), tmp_path)["a"].command == "c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${KEY}", "sk-123"),
        ("Bearer ${KEY}!", "Bearer sk-123!"),
        ("${KEY}${HOME}", "sk-123/home/me"),
        ("${EMPTY}", ""),
        ("${EMPTY:-x}", "x"),
        ("${NONE:-}", ""),
        ("${NONE:-a b:-c}", "a b:-c"),
        ("$$", "$"),
        ("$${KEY}", "${KEY}"),
        ("$$$${KEY}", "$${KEY}"),
        ("$KEY 5$ $", "$KEY 5$ $"),
        ("{KEY}", "{KEY}"),
    ],
)
def test_environments_refer_to_variables(text: str, expected: str) -> None:
    assert read(spec(f"environments: {{A: '{text}'}}"))["a"].environments == {"A": expected}


def test_nothing_but_environments_refers_to_variables() -> None:
    found = read(spec("arguments: ['${KEY}']\nlabels: {k: $$}\nworking_directory: /${NONE}"))["a"]
    assert (found.arguments, found.labels, found.working_directory) == (("${KEY}",), {"k": "$$"}, "/${NONE}")


@given(st.text(alphabet="ab${}:-_ \n"))
def test_a_text_with_its_dollars_doubled_stands_for_itself(text: str) -> None:
    assert expand(text.replace("$", "$$"), {}) == text


def test_a_file_may_declare_several() -> None:
    text = "---\n" + spec("") + "---\n" + spec("", "b") + "---\n"
    assert list(read(text)) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected an application"),
        ("---\n---\n", "expected an application"),
        ("metadata: {name: a", "line 1, column 19: not YAML"),
        ("metadata:\n  name: a\n name: b\n", "line 3, column 2: not YAML"),
        ("a: b\n\tc: d\n", "line 2, column 1: not YAML"),
        ("a: \x07", "line 1, column 4: not YAML"),
        ("a: *b", "line 1, column 4: not YAML: found undefined alias 'b'"),
        ("[" * 5000, "nested too deeply"),
        ("- a", "line 1: expected name: value pairs, got a list"),
        ("just text", "line 1: expected name: value pairs, got 'just text'"),
        ("metadata: {name: a}", "line 1: spec: missing"),
        ("spec: {command: c}", "line 1: metadata: missing"),
        ("metadata: {}\nspec: {command: c}", "line 1: metadata.name: missing"),
        ("metadata: {name: a.b}\nspec: {command: c}", "line 1: metadata.name: application 'a.b' is not a legal name"),
        ("metadata: {nmae: a}\nspec: {command: c}", "line 1: metadata.nmae: unknown field, did you mean 'name'?"),
        ("metadata: {name: a}\nspce: {}", "line 2: spce: unknown field, did you mean 'spec'?"),
        ("metadata: {name: a}\nspec:", "line 2: spec: expected name: value pairs, got nothing"),
        ("metadata: {name: a}\nspec: {}", "application 'a': spec: command: missing"),
        (spec("max_executors: many"), "line 4: spec.max_executors: expected a number, got 'many'"),
        (spec("timeout: 0"), "spec: timeout: Input should be greater than or equal to 0.001"),
        (spec("timeout_s: 0"), "spec: timeout_s: Input should be"),
        (spec("idle_timeout_s: -1\ntimeout: 1"), "spec: idle_timeout_s: Input should be"),
        (spec("expires: -1"), "spec: expires: Input should be greater than or equal to 0"),
        (spec("max_attempts: 0"), "spec: max_attempts: Input should be greater than or equal to 1"),
        (spec("placement: anywhere"), "spec: placement: Input should be 'spread' or 'pack', got 'anywhere'"),
        (spec("retry_on: ValueError"), "line 4: spec.retry_on: expected a list"),
        (spec("delay: 1\ndelay_s: 2"), "line 5: spec.delay_s: given twice"),
        (spec("comand: x"), "line 4: spec.comand: unknown field, did you mean 'command'?"),
        (spec("zzz: x"), "line 4: spec.zzz: unknown field, expected one of arguments, command,"),
        (spec("command: x"), "line 4: spec.command: given twice"),
        (spec("delay_release: 1\ndelay_release_s: 1"), "line 5: spec.delay_release_s: given twice"),
        (spec("shim: Grpc"), "spec: shim: Input should be 'Nats' or 'Log', got 'Grpc'"),
        (spec("arguments: run main.py"), "line 4: spec.arguments: expected a list"),
        (spec("arguments: [a, {b: c}]"), "line 4: spec.arguments[1]: expected text, got name: value pairs"),
        (spec("environments: [a]"), "line 4: spec.environments: expected name: value pairs, got a list"),
        (
            spec("environments:\n  DEBUG: true"),
            "line 5: spec.environments.DEBUG: true is a truth value in YAML, quote it",
        ),
        (spec("environments:\n  A:"), "line 5: spec.environments.A: expected text, got nothing"),
        (spec("environments:\n  A: 1\n  A: 2"), "line 6: spec.environments.A: given twice"),
        (spec("environments: {A: !secret x}"), "line 4: spec.environments.A: expected text, got !secret"),
        (spec("environments: {[a]: x}"), "line 4: spec.environments: expected a name, got a list"),
        (spec("environments: {'A=B': x}"), "environments: 'A=B' is no name of a variable"),
        (spec("labels: &l\n  <<: *l"), "line 5: spec.labels: merge keys"),
        (spec("labels: &l\n  a: *l"), "line 4: spec.labels.a: expected text, got name: value pairs"),
        (spec("max_instances: four"), "line 4: spec.max_instances: expected a number, got 'four'"),
        (spec("max_instances: true"), "line 4: spec.max_instances: expected a number, got 'true'"),
        (spec("max_instances: 0"), "spec: max_instances: Input should be greater than or equal to 1, got '0'"),
        (spec("max_instances: 1.5"), "spec: max_instances: Input should be a valid integer"),
        (spec("min_instances: 9"), "min_instances 9 is over max_instances 8"),
        (spec("delay_release: -1"), "spec: delay_release: Input should be greater than or equal to 0"),
        (spec("delay_release: .nan"), "spec: delay_release: "),
        (spec("") + "---\n" + spec(""), "application 'a' is declared twice"),
        (
            spec("environments:\n  A: x\n  B: ${NONE}"),
            "line 6: spec.environments.B: variable NONE is not set: set it, or",
        ),
        (spec("environments: {A: '${KEY'}"), "line 4: spec.environments.A: '${KEY' is no reference: expected ${NAME}"),
        (spec("environments: {A: '${}'}"), "'${}' is no reference"),
        (spec("environments: {A: '${A B}'}"), "'${A B}' is no reference"),
        (spec("environments: {A: '${A-b}'}"), "'${A-b}' is no reference"),
        (spec("fresh_process: 1"), "line 4: spec.fresh_process: expected true or false, got '1'"),
        (spec("input_schema: [a]"), "line 4: spec.input_schema: expected name: value pairs, got a list"),
        (spec("input_schema: {a: {b: !x y}}"), "line 4: spec.input_schema.a.b: expected text, got !x"),
        (spec("input_schema: {a: [{b: 1, b: 2}]}"), "line 4: spec.input_schema.a[0].b: given twice"),
        (spec("input_schema: &l {a: *l}"), "line 4: spec.input_schema: nested too deeply"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, expected: str) -> None:
    with pytest.raises((ConfigurationError, InvalidArgument)) as caught:
        read(text)
    assert str(caught.value).startswith("agent.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- measuring


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(number) for number in range(1, 101)]
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([7.0], 99) == 7
    assert percentile([], 50) is None


def options(tasks: int = 3, of: int = 1) -> PingOptions:
    return PingOptions(tasks=tasks, sessions=of, payload_bytes=64, measure=True, limit_s=1)


def test_a_summary_has_a_line_for_each_figure() -> None:
    tally = Tally([0.001, 0.003, 0.002])
    assert summary(options(), tally, ready_s=0.0123, duration_s=0.5) == [
        "tasks: 3 in 1 session, 64 bytes each",
        "session ready: 12.3 ms",
        "duration: 0.500 s",
        "succeeded: 3",
        "failed: 0",
        "throughput: 6.0 tasks/s",
        "latency p50: 2.00 ms",
        "latency p99: 3.00 ms",
    ]


def test_a_summary_without_a_success_has_no_latency() -> None:
    lines = summary(options(1, 2), Tally(failed=2), ready_s=0, duration_s=0)
    assert lines[0] == "tasks: 2 in 2 sessions, 64 bytes each"
    assert lines[4:] == ["failed: 2", "throughput: 0.0 tasks/s", "latency p50: -", "latency p99: -"]


# ---- errors


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (SessionNotFound("no session x"), 1, "flmctl: error: no session x\n"),
        (FlameError("line one\n  line two\x1b"), 1, "flmctl: error: line one line two?\n"),
        (InvalidArgument("bad"), 2, "flmctl: error: bad\n"),
        (ConfigurationError("bad"), 2, "flmctl: error: bad\n"),
        (BrokerUnavailable("gone"), 3, "flmctl: error: gone\n"),
        (CommandFailed("it ended:", "last\nwords"), 1, "flmctl: error: it ended:\n  | last\n  | words\n"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (KeyError("x"), 1, "flmctl: internal error: KeyError: 'x' (FLAME_DEBUG=1 shows where)\n"),
        (ModuleNotFoundError("no", name="psutil"), 2, "pip install 'flame-engine[server]'\n"),
        (ModuleNotFoundError("no", name="yaml.reader"), 2, "pip install 'flame-engine[cli]'\n"),
        (ModuleNotFoundError("no", name="other"), 1, "ModuleNotFoundError: no (FLAME_DEBUG=1 shows where)\n"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLAME_DEBUG", raising=False)
    assert report("flmctl", error) == ExitCode(code)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(text)


def test_a_traceback_is_shown_to_who_asks_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "FLAME_DEBUG", "1")
    report("flmctl", KeyError("x"))
    assert "KeyError" in capsys.readouterr().err
