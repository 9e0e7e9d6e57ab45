"""docs/protocol.md: other languages can work by it, and it says what the code does.

The programs tests/services/raw_client.py and raw_service.py know of Flame only what that text says, and get the
permissions that it lists.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import msgpack
import nats
import pytest
from pydantic import BaseModel

import flame
from flame.protocol import (
    api,
    chunks,
    codes,
    defaults,
    events,
    messages,
    progress,
    records,
    session_state,
    states,
    subjects,
    supervision,
    values,
)
from flame.service import environment
from tests.support.cluster import PATIENCE_S, SERVICES, eventually, executors_of, kill, lasting
from tests.support.guarded import ACK_WAIT_S, GuardedCluster, document, guarded_cluster, violations

CLIENT = "flmping"
SERVICE = "raw"
FORGED = f"flame.event.{CLIENT}.nobody.nothing.done"


# ---- what raw programs do


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[GuardedCluster]:
    with lasting(guarded_cluster(tmp_path_factory.mktemp("cluster"), CLIENT, SERVICE), request.session) as made:
        yield made


@pytest.fixture
async def raw(cluster: GuardedCluster, connection: flame.Connection) -> AsyncIterator[str]:
    """The application of tests/services/raw_service.py."""
    if SERVICE not in {application.name for application in await connection.list_applications()}:
        spec = cluster.service(
            "raw_service",
            environments={"RAW_ENDPOINT": cluster.endpoint_of("executor")},
            max_instances=1,
            session_retry_limit=2,
        )
        await connection.register_application(SERVICE, spec)
    yield SERVICE
    assert violations(cluster, but=FORGED) == []


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def test_a_client_of_nothing_but_nats_and_msgpack(cluster: GuardedCluster) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SERVICES / "raw_client.py"),
        cluster.endpoint_of("client"),
        CLIENT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, errors.decode()) == (0, "")
    said = json.loads(output)
    results = said["results"]
    assert [(result["state"], result["output"]) for result in results] == [
        ("succeed", f"number {number}") for number in range(3)
    ]
    assert said["running"] == [result["executor"] for result in results]
    assert said["looked_up"] == results[0]
    assert (said["unknown"], said["refused"], said["again"], said["waits"]) == ([], "", True, True)
    assert (said["cancelled"]["state"], said["cancelled"]["attempt"]) == ("cancelled", 0)
    assert said["cancelled"]["error"]["code"] == "task_cancelled"
    assert said["idle_states"] == said["states"] == ["open", "closing", "closed"]
    assert said["idle_counts"] == {"pending": 0, "cancelled": 2}
    assert said["large"]
    assert (said["cancels"], said["too_late"]) == ([True, True], True)
    assert said["on_request"] == {"code": "task_cancelled", "message": "no longer needed"}
    assert "cpu" in said["waited_for"]
    assert said["executors"][-1] == "executor released"
    assert {"executor bound", "executor unbinding"} <= set(said["executors"])
    assert said["refusals"] == {
        "the same id": "session_exists",
        "a bad name": "invalid_name",
        "no application": "application_not_found",
        "no session": "session_not_found",
        "an ended session": "session_not_open",
        "other options": "spec_mismatch",
        "an unknown option": "invalid_argument",
        "a wrong field": "invalid_argument",
        "a mode that is none": "invalid_argument",
        "to cancel in no session": "session_not_found",
        "to cancel nothing": "invalid_argument",
        "a newer version": "unsupported_version",
    }
    assert (said["nodes"], said["listed"], said["problems"]) == (1, [True], [])


async def test_the_documented_permissions_are_enough_for_the_sdk_too(cluster: GuardedCluster) -> None:
    async with (
        await flame.connect(cluster.endpoint_of("client")) as client,
        await client.create_session(CLIENT) as session,
    ):
        assert (await session.invoke(b"hello")).output == b"hello"
        large = bytes(3_000_000)
        assert (await session.invoke(large)).output == large
    assert violations(cluster, but=FORGED) == []


async def test_a_client_may_not_say_that_a_task_is_done(cluster: GuardedCluster) -> None:
    refused = asyncio.get_running_loop().create_future()

    async def on_error(error: Exception) -> None:
        refused.set_result(str(error))

    nc = await nats.connect(cluster.endpoint_of("client"), error_cb=on_error)
    try:
        await nc.publish(FORGED, b"")
        assert "permissions violation" in await asyncio.wait_for(refused, PATIENCE_S)
    finally:
        await nc.close()


async def test_a_service_of_nothing_but_nats_and_msgpack(
    connection: flame.Connection, raw: str, tmp_path: Path
) -> None:
    left = tmp_path / "left"
    heard: list[flame.Task] = []

    class Informer(flame.TaskInformer):
        def on_update(self, task: flame.Task) -> None:
            heard.append(task)

    async with await connection.create_session(raw, str(left).encode()) as session:
        first = await session.invoke(call("echo", "ä", 1), Informer())
        assert (json.loads(first.output), first.attempt) == (["ä", 1], 1)
        assert [task.state.value for task in heard] == ["pending", "running", "succeed"]
        with pytest.raises(flame.TaskFailed, match="ValueError: no such city"):
            await session.invoke(call("fail", "no such city"))
        tasks = await asyncio.gather(*(session.invoke(call("echo", number)) for number in range(50)))
        assert [json.loads(task.output) for task in tasks] == [[number] for number in range(50)]
        assert {task.executor for task in tasks} == {first.executor}

        async def counted() -> bool:
            return [(e.succeeded, e.failed, e.idle) for e in await executors_of(connection, session.id)] == [
                (51, 1, True)
            ]

        await eventually(counted, "the executor has reported what it did")
    assert left.read_text() == "left\n"


async def test_large_values_of_a_raw_service(connection: flame.Connection, raw: str, tmp_path: Path) -> None:
    left = str(tmp_path / "left")
    async with await connection.create_session(raw, left.ljust(300_000).encode()) as session:
        task = await session.invoke(call("echo", "ä" * 500_000))
        assert json.loads(task.output) == ["ä" * 500_000]
        assert task.output_size == len(task.output)
        ref = values.ValueRef(id="nothing", size=1, parts=1)
        message = messages.TaskMessage(input_ref=ref).encode()
        await connection.broker.store(subjects.task(raw, session.id, "t"), message, PATIENCE_S)

        async def failed() -> bool:
            error = (await session.get_task("t")).error
            return error is not None and error.code == "value_gone"

        await eventually(failed, "the task of which the input is missing has failed")
    assert (tmp_path / "left").read_text() == "left\n"


async def test_a_raw_service_keeps_its_lease_while_a_task_runs(
    connection: flame.Connection, raw: str, tmp_path: Path
) -> None:
    mark = tmp_path / "runs"
    async with await connection.create_session(raw) as session:
        task = await session.invoke(call("sleep", 1.5 * ACK_WAIT_S, str(mark)), timeout_s=60)
        assert task.attempt == 1
    assert len(mark.read_text().splitlines()) == 1


async def test_a_task_of_a_killed_raw_service_runs_again_and_has_one_record(
    connection: flame.Connection, raw: str, tmp_path: Path
) -> None:
    mark = tmp_path / "runs"
    session = await connection.create_session(raw)
    handle = await session.create_task(call("sleep", 0.5, str(mark)))
    behind = await session.create_task(call("echo", "behind"))
    await eventually(mark.exists, "the task runs")
    kill(int(mark.read_text()))
    async with asyncio.timeout(PATIENCE_S):
        assert ((await handle).attempt, (await behind).attempt) == (2, 1)
    await session.close()
    assert len(set(mark.read_text().splitlines())) == 2
    info = await connection.get_session(session.id)
    assert (info.succeeded, info.failed, info.pending) == (2, 0, 0)


async def test_a_raw_service_outlives_its_broker(
    cluster: GuardedCluster, connection: flame.Connection, raw: str, tmp_path: Path
) -> None:
    """With the server its consumer goes: what was delivered is delivered again, and looked up."""
    mark = tmp_path / "runs"
    [server] = cluster.servers.servers.values()
    async with await connection.create_session(raw) as session:
        handle = await session.create_task(call("sleep", 1.0, str(mark)))
        await eventually(mark.exists, "the task runs")
        await asyncio.to_thread(server.kill)
        server.run()
        await server.ready()
        async with asyncio.timeout(PATIENCE_S):
            assert (await handle).attempt == 1
            assert json.loads((await session.invoke(call("echo", "alive"))).output) == ["alive"]
    assert len(mark.read_text().splitlines()) == 1


async def test_a_task_that_kills_raw_services_is_given_up(connection: flame.Connection, raw: str) -> None:
    async with await connection.create_session(raw) as session:
        with pytest.raises(flame.TaskFailed, match="3 executors were lost") as caught:
            await session.invoke(call("exit", 7), timeout_s=60)
        assert caught.value.task.attempt == 3
        assert json.loads((await session.invoke(call("echo", "alive"), timeout_s=60)).output) == ["alive"]


async def test_a_raw_service_runs_tasks_on_the_terms_that_they_were_created_with(
    connection: flame.Connection, raw: str, tmp_path: Path
) -> None:
    mark = tmp_path / "runs"

    def sleep(seconds: float) -> bytes:
        return call("sleep", seconds, str(mark))

    async with await connection.create_session(raw) as session:
        with pytest.raises(flame.TaskTimeout, match=r"longer than 0\.2 s"):
            await session.invoke(sleep(60), options=flame.TaskOptions(timeout_s=0.2))
        busy = await session.create_task(sleep(0.5))
        expired = await session.create_task(call("echo", 1), options=flame.TaskOptions(expires_s=0.1))
        late = await session.create_task(call("echo", 2), options=flame.TaskOptions(delay_s=1.0))
        with pytest.raises(flame.TaskExpired):
            await expired
        assert (await late).started - (await busy).started >= 0.8
        tried = call("fail twice", str(tmp_path / "tried"))
        assert (await session.invoke(tried, options=flame.TaskOptions(max_attempts=3))).attempt == 3
        with pytest.raises(flame.TaskFailed, match="no luck") as caught:
            await session.invoke(call("fail", "no luck"), options=flame.TaskOptions(max_attempts=2))
        assert caught.value.task.attempt == 2
    info = await connection.get_session(session.id)
    assert (info.succeeded, info.failed, info.cancelled, info.pending) == (3, 3, 0, 0)


async def test_a_raw_service_stops_what_is_cancelled(connection: flame.Connection, raw: str, tmp_path: Path) -> None:
    mark = tmp_path / "runs"
    session = await connection.create_session(raw)
    handle = await session.create_task(call("sleep", 60, str(mark)))
    await eventually(mark.exists, "the task runs")
    assert await handle.cancel() is flame.TaskState.CANCELLED
    assert json.loads((await session.invoke(call("echo", "alive"), timeout_s=4)).output) == ["alive"]
    mark.unlink()
    forced = await session.create_task(call("sleep", 60, str(mark)))
    await eventually(mark.exists, "the task runs")
    async with asyncio.timeout(4):
        await session.close("force")
        with pytest.raises(flame.TaskCancelled):
            await forced
    info = await connection.get_session(session.id)
    assert (info.succeeded, info.failed, info.cancelled, info.pending) == (1, 0, 2, 0)


async def test_a_session_that_a_raw_service_can_not_enter_fails_with_its_text(
    connection: flame.Connection, raw: str
) -> None:
    session = await connection.create_session(raw, b"no entry")
    with pytest.raises(flame.TaskFailed, match="Closed: no entry today"):
        await session.invoke(call("echo", 1), timeout_s=60)


# ---- what the document says

CLASSES: dict[str, type[Any]] = {
    name: kind
    for module in (messages, supervision, chunks, progress, records, api, events, session_state, values)
    for name, kind in inspect.getmembers(module, inspect.isclass)
    if kind.__module__ == module.__name__ and (issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind))
}
BASES = {"Record", "Input", "Request"}
"""They have no fields of their own."""
NO_SUBJECTS = {
    "check_application",
    "check_token",
    "parse_state_key",
    "state_key",
    "stored_session",
    "task_key",
    "to_token",
}


def fields_of(kind: type[Any]) -> dict[str, str]:
    """The fields of a class with their defaults, as the document writes them."""
    if issubclass(kind, BaseModel):
        return {
            name: "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
            for name, field in kind.model_fields.items()
        }
    return {
        field.name: "required" if (default := default_of(field)) is dataclasses.MISSING else shown(default)
        for field in dataclasses.fields(kind)
    }


def default_of(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def shown(value: object) -> str:
    if isinstance(value, BaseModel | Mapping):
        return "{}"
    if isinstance(value, bytes):
        return f'b"{value.decode()}"'
    if isinstance(value, Enum):
        value = value.value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def documented() -> dict[str, dict[str, str]]:
    """The fields of each table of the document with their defaults, by the classes that it is about."""
    found: dict[str, dict[str, str]] = {}
    for names, table in re.findall(r"<!-- fields: ([\w ]+) -->\n\| field .*\n\| ---.*\n((?:\|.*\n)+)", document()):
        rows = [[cell.strip().strip("`") for cell in row.split("|")[1:]] for row in table.splitlines()]
        found |= {name: {row[0]: row[2] for row in rows} for name in names.split()}
    return found


def test_every_field_of_every_message_and_record_is_documented_with_its_default() -> None:
    wanted = {name: fields_of(kind) for name, kind in CLASSES.items() if name not in BASES}
    assert documented() == wanted


def test_every_subject_stream_bucket_and_consumer_is_documented() -> None:
    builders = {
        name: builder
        for name, builder in inspect.getmembers(subjects, inspect.isfunction)
        if builder.__annotations__.get("return") == "str" and not name.startswith("_") and name not in NO_SUBJECTS
    }
    placeholders = {"application": "<app>", "task_id": "<task>"}
    names = {
        builder(*(placeholders.get(name, f"<{name}>") for name in inspect.signature(builder).parameters))
        for builder in builders.values()
    }
    names |= {value for name, value in vars(subjects).items() if name.isupper() and str(value).startswith("flame-")}
    assert {name for name in names if f"`{name}`" not in document()} == set()


def test_every_verb_code_state_and_variable_is_documented() -> None:
    words: set[str] = {verb.value for verb in api.Verb}
    words |= {code.value for code in (*codes.ErrorCode, *codes.ReasonCode)}
    words |= {value.value for value in (*states.CloseMode, *states.Placement, *events.Noun)}
    words |= {f"{state}" for state in (*states.SessionState, *states.TaskState, *states.ExecutorState)} - {
        "pending",  # nothing on the wire says so of a task
        "starting",  # reported by no executor
    }
    words |= {value for name, value in vars(environment).items() if name.isupper()}
    words |= {supervision.SERVE, supervision.LEAVE, supervision.WAIT}
    assert {word for word in words if f"`{word}`" not in document()} == set()


def test_every_verb_says_what_it_may_be_refused_with() -> None:
    """What the control API raises itself; the rest is said once for all verbs."""
    from flame_services.scheduler.control_api import applications, cancel, executors, nodes, sessions, tasks

    nouns = (
        applications.Applications,
        sessions.Sessions,
        tasks.Tasks,
        cancel.Cancel,
        executors.Executors,
        nodes.Nodes,
    )
    verbs = re.split(r"^### `", document().split("## 7.")[1].split("## 8.")[0], flags=re.MULTILINE)
    text = {verb.partition("`")[0]: verb for verb in verbs}
    for verb, section in text.items():
        handler = next((getattr(noun, verb) for noun in nouns if hasattr(noun, verb)), None)
        if handler is None:
            continue
        for error in re.findall(r"raise (\w+)\(", textwrap.dedent(inspect.getsource(handler))):
            kind = getattr(inspect.getmodule(handler), error)  # the exception, or a function that makes it
            code = getattr(flame.errors, kind.__annotations__.get("return", error)).code.value
            assert f"`{code}`" in section, f"{verb} may answer {code}"


def test_the_limits_are_those_of_the_code() -> None:
    def thousands(number: float) -> str:
        return f"{number:,.0f}"

    limits = {
        f"{thousands(defaults.INLINE_LIMIT_BYTES)} bytes",
        f"`max_payload: {defaults.MAX_PAYLOAD_BYTES // 2**20}MB`",
        f"{thousands(defaults.WAITING_TASKS)} messages and {defaults.WAITING_BYTES // 2**30} GiB",
        f"kept for {defaults.RESULT_AGE_S / 3600:.0f} h; direct reads",
        f"({thousands(defaults.VALUE_PART_BYTES)} bytes)",
        f"1 to {thousands(defaults.VALUE_LIMIT_BYTES)} bytes",
        f"some at once (the SDK: {defaults.VALUE_WINDOW})",
        f"`Nats-TTL: {defaults.VALUE_AGE_S:.0f}s`",
        f"ask again for {defaults.VALUE_MISSING_S:g} s",
        f"kept for {defaults.LOG_AGE_S / 3600:.0f} h and up to {defaults.LOG_BYTES // 2**20} MiB",
        f"kept for {defaults.CHUNK_AGE_S / 3600:.0f} h and up to {defaults.CHUNK_BYTES // 2**30} GiB",
        f"whose `index` is higher by {defaults.CHUNK_WINDOW} will never be",
        f"whose `index` is higher by {defaults.CHUNK_WINDOW} or more",
        f"at most {thousands(defaults.PROGRESS_MESSAGE)} characters",
        f"`flame-leases` | | nothing yet; kept for {defaults.LEADER_LEASE_S:g} s",
        f"({defaults.ACK_WAIT_S:g} s unless the scheduler was told otherwise)",
        f"**certainly** yours for {defaults.LEASE_CERTAIN:g} of `ack_wait_s`",
        f"At {defaults.POISON_LIMIT} lost executors the task is given up",
        f"once it has run for {defaults.RUNNING_NOTICE_S:g} s",
        f"| start | {defaults.READY_TIMEOUT_S:.0f} s |",
        f"| enter | {defaults.ENTER_TIMEOUT_S:.0f} s |",
        f"at most {thousands(api.LOOK_UP_LIMIT)} ids",
        f"1 to {thousands(api.LOOK_UP_LIMIT)} ids",
        f"What doesn't stop within {defaults.TASK_STOP_S:g} s is ended with its process",
        f"how long one run may take, 0.001 to {thousands(defaults.RESULT_AGE_S)}",
        f"up to {defaults.BACKOFF_MAX_S:g} s or `retry_backoff_s` if it is more",
        f"1 to {thousands(api.PAGE)} |",
        f"at most {thousands(defaults.PUBLISH_WINDOW)} unacknowledged publishes",
        f"The SDK gives up after {defaults.STORE_TIMEOUT_S:.0f} s",
        f"outstanding for {defaults.RECONCILE_FIRST_S:g} s: after {defaults.RECONCILE_FIRST_S:g} s",
        f"every {defaults.RECONCILE_MAX_S:.0f} s while nothing new",
        f"`[A-Za-z0-9_-]{{1,{subjects.MAX_TOKEN}}}`; an application's name has at most {subjects.MAX_APPLICATION}",
    }
    text = " ".join(document().split())
    assert {limit for limit in limits if limit not in text} == set()
    assert defaults.extension_s(3) == pytest.approx(1)  # "every third of `ack_wait_s`"


EXAMPLES = re.findall(r"```example ([\w ]+)\n([0-9a-f \n]+?)\n\n(.+?)\n```", document(), re.DOTALL)


@pytest.mark.parametrize(("kind", "octets", "said"), EXAMPLES)
def test_an_example_is_read_and_made_as_shown(kind: str, octets: str, said: str) -> None:
    data = bytes.fromhex(octets.replace("\n", " "))
    literal = " ".join(line.strip() for line in said.splitlines())
    for json_word, word in (("true", "True"), ("false", "False"), ("null", "None")):
        literal = re.sub(rf"\b{json_word}\b", word, literal)
    fields = ast.literal_eval(literal)
    assert msgpack.unpackb(data) == fields
    assert msgpack.packb(fields) == data
    assert contains(made(kind, data), fields)


def made(kind: str, data: bytes) -> Any:
    """What becomes of an example that is read and written again."""
    if kind == "refusal":
        with pytest.raises(flame.FlameError) as caught:
            api.read_answer(data)
        return msgpack.unpackb(api.answer_error(caught.value))
    if kind.startswith("answer "):
        record = CLASSES[kind.removeprefix("answer ")].model_validate(api.read_answer(data), extra="ignore")
        return msgpack.unpackb(api.answer_ok(record))
    if issubclass(CLASSES[kind], api.Request):
        fields = msgpack.unpackb(data)
        del fields["v"]
        return msgpack.unpackb(CLASSES[kind].check(kind, fields).encode())
    return msgpack.unpackb(CLASSES[kind].decode(data).encode())


def contains(whole: Any, part: Any) -> bool:
    """Whether a map is all that another one says; it may say more, which came later."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and contains(whole[name], part[name]) for name in part)
    return bool(whole == part)


def test_there_is_an_example_of_everything_on_the_hot_path() -> None:
    assert {kind for kind, _, _ in EXAMPLES} >= {
        "TaskMessage",
        "ResultRecord",
        "RunningEvent",
        "ExecutorReport",
        "Orders",
        "Control",
        "Attempts",
        "LogChunk",
        "ChunkMessage",
        "Progress",
        "StateRequest",
        "StateAnswer",
    }


def test_every_link_within_the_document_has_its_heading() -> None:
    headings = re.findall(r"^#+ (.+)$", document(), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", document())) <= anchors
