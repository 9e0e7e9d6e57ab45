"""Typed services as programs in a cluster: values in and out, published schemas, and errors that name fields."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import flame
import flame.sync
from flame.protocol.codes import ErrorCode
from tests.integration.test_cli import call, ends
from tests.support.cluster import SERVICES, Cluster, executors_of, kill

EXAMPLE = Path(__file__).parents[2] / "examples" / "typed"


@dataclass
class Prompt:
    sign: str


@dataclass
class Question:
    text: str
    verb: str = "echo"
    times: int = 1


@dataclass
class Answer:
    text: str
    attempt: int
    pid: int


@dataclass
class NewerQuestion:
    """What a client has that was written for a later version of the service."""

    words: str


@dataclass
class NewerAnswer:
    words: str


PROMPT = flame.as_json(Prompt("!"))


def declared(name: str, service: str, **spec: Any) -> str:
    fields = {
        "command": sys.executable,
        "arguments": [str(SERVICES / "typed.py")],
        "environments": {"SERVICE": service},
    }
    return f"metadata: {{name: {name}}}\nspec: {fields | spec}"


def register(cluster: Cluster, name: str, service: str, *options: str, **spec: Any) -> str:
    """Register a service with the schemas that it tells of."""
    text = declared(name, service, **spec)
    ends(call("register", "--describe", "-f", "-", *options, endpoint=cluster.broker.endpoint, text=text), 0)
    return name


@pytest.fixture(scope="module")
def answer(cluster: Cluster) -> str:
    return register(cluster, "answer", "answer", max_attempts=3, retry_backoff=0.01)


async def test_values_go_in_and_come_out(connection: flame.Connection, answer: str) -> None:
    async with await connection.create_session(answer, PROMPT) as session:
        typed = session.typed(Question, Answer)
        task = await typed.invoke(Question("hi", times=2))
        assert (task.output.text, task.output.attempt, task.executor) == ("hihi!", 1, task.task.executor)
        handle = await typed.create_task(Question("there"))
        assert (await handle).output.text == "there!"
        assert typed.read(await session.get_task(handle.id)).output.text == "there!"
        assert [(await h).output.text for h in await typed.create_tasks([Question("a"), Question("b")])] == ["a!", "b!"]
        questions = (Question(str(number)) for number in range(300))
        outputs = [task.output.text async for task in typed.map(questions, in_flight=50)]
        assert outputs == [f"{number}!" for number in range(300)]
        assert (await session.invoke('{"text": "from any language"}')).output.startswith(
            b'{"text":"from any language!"'
        )


async def test_a_class_keeps_its_state_and_a_generator_streams(connection: flame.Connection, cluster: Cluster) -> None:
    counter = await asyncio.to_thread(register, cluster, "counter", "counter")
    async with await connection.create_session(counter, PROMPT, max_instances=1) as session:
        typed: flame.TypedSession[str | None, tuple[str, int]] = session.typed(str | None, tuple[str, int])
        assert [(await typed.invoke(text)).output for text in ("a", None)] == [("a!", 1), ("None!", 2)]
        assert (await session.invoke(b"")).output == b'["None!",3]'
    letters = await asyncio.to_thread(register, cluster, "letters", "letters")
    async with await connection.create_session(letters) as session:
        values = [chunk.value async for chunk in session.typed(Question, Answer).stream(Question("abc"))]
        assert [value.text for value in values] == ["a", "b", "c"]
        async with session.typed(Question, NewerAnswer).stream(Question("abc")) as chunks:
            chunk = await anext(chunks)
            with pytest.raises(flame.SchemaMismatch, match=r"chunk 0 of task .* is not NewerAnswer: words"):
                chunk.value  # noqa: B018


async def test_a_client_without_the_types_is_told_which_field_is_wrong_before_anything_is_sent(
    connection: flame.Connection, answer: str
) -> None:
    async with await connection.create_session(answer, PROMPT) as session:
        plain = await session.typed_as_published()
        assert (await plain.invoke({"text": "hi"})).output["text"] == "hi!"
        assert (await plain.invoke(b'{"text": "hi"}')).output["text"] == "hi!"
        for value, says in (
            ({"txt": "hi"}, "'text' is a required property"),
            ({"text": 1}, "text: 1 is not of type 'string'"),
            ({"text": "hi", "verb": "fly"}, "verb: 'fly' is not one of"),
            (b"hi", "no JSON"),
        ):
            with pytest.raises(flame.InvalidInput, match=f"input for application answer: not Question: {says}"):
                await plain.invoke(value)
        assert len(await session.list_tasks()) == 2


async def test_what_the_service_does_not_take_fails_at_once_with_the_field(
    connection: flame.Connection, answer: str
) -> None:
    async with await connection.create_session(answer, PROMPT) as session:
        for typed, value, says in (
            (
                session.typed(NewerQuestion, Answer),
                NewerQuestion("hi"),
                "Question, which answer takes: text: Field req",
            ),
            (session.typed(Question, Answer), Question("not so", verb="refuse"), "InvalidInput: not so"),
        ):
            with pytest.raises(flame.TaskFailed, match=says) as caught:
                await typed.invoke(value)  # type: ignore[arg-type]
            fault = caught.value.task.error
            assert fault is not None
            assert (fault.code, fault.type) == (ErrorCode.INVALID_ARGUMENT, "InvalidInput")
            assert caught.value.task.attempt == 1, "it isn't tried again"
        for verb, kind in (("fail", "ValueError"), ("wrong", "flame.errors.InvalidArgument")):
            with pytest.raises(flame.TaskFailed) as caught:
                await session.typed(Question, Answer).invoke(Question("x", verb=verb))
            assert caught.value.task.error is not None
            assert (caught.value.task.error.type, caught.value.task.attempt) == (kind, 3)
            if verb == "fail":
                frames = caught.value.task.error.traceback
                assert "in answer" in frames
                assert "flame/service" not in frames, "it begins with the user's code"


async def test_what_the_client_does_not_expect_is_named_with_the_field(
    connection: flame.Connection, answer: str
) -> None:
    async with await connection.create_session(answer, PROMPT) as session:
        typed = session.typed(Question, NewerAnswer)
        with pytest.raises(
            flame.SchemaMismatch, match="its output is not NewerAnswer: words: Field required"
        ) as caught:
            await typed.invoke(Question("hi"))
        assert caught.value.task.state is flame.TaskState.SUCCEED
        assert caught.value.task.output.startswith(b'{"text":"hi!"')
        tasks = [task async for task in typed.map([Question("a"), Question("b", verb="fail")], raise_failed=False)]
        with pytest.raises(flame.SchemaMismatch):
            tasks[0].output  # noqa: B018
        with pytest.raises(flame.TaskFailed, match="ValueError: b"):
            tasks[1].output  # noqa: B018
        assert tasks[1].error is not None


async def test_an_input_of_a_map_that_does_not_fit_ends_it(connection: flame.Connection, answer: str) -> None:
    async with await connection.create_session(answer, PROMPT) as session:
        typed = session.typed(Question, Answer)
        seen: list[tuple[int, int | None]] = []
        with pytest.raises(flame.InvalidInput, match="not Question: text"):
            async for _ in typed.map(
                [{"text": "a"}, {"txt": "b"}],  # type: ignore[list-item]  # that is the point
                in_flight=1,
                on_progress=lambda done, total: seen.append((done, total)),
            ):
                pass
        assert seen == [(1, 2)]


async def test_common_data_that_does_not_fit_fails_the_session_by_its_field(
    connection: flame.Connection, cluster: Cluster
) -> None:
    name = await asyncio.to_thread(register, cluster, "once", "answer", session_retry_limit=1)
    session = await connection.create_session(name, b"{}")
    with pytest.raises(flame.TaskFailed, match="common data is not Prompt, which answer takes: sign: Field"):
        await session.invoke(b"{}")


async def test_common_data_that_changes_is_read_anew(connection: flame.Connection, answer: str) -> None:
    async with await connection.create_session(answer, PROMPT, max_instances=1) as session:
        typed = session.typed(Question, Answer)
        assert (await typed.invoke(Question("hi"))).output.text == "hi!"
        version = await session.update_common_data(flame.as_json(Prompt("?")))
        options = flame.TaskOptions(common_data_version=version)
        assert (await typed.invoke(Question("hi"), options=options)).output.text == "hi?"


async def test_it_survives_its_executor(connection: flame.Connection, answer: str) -> None:
    async with await connection.create_session(answer, PROMPT, max_instances=1) as session:
        typed = session.typed(Question, Answer)
        first = await typed.invoke(Question("a"))
        kill(first.output.pid)
        second = await typed.invoke(Question("b"))
        assert second.output.text == "b!"
        assert second.output.pid != first.output.pid
        assert [executor.pid for executor in await executors_of(connection, session.id)] == [second.output.pid]


# ---- publishing


async def test_schemas_are_published_with_the_application(connection: flame.Connection, answer: str) -> None:
    spec = (await connection.get_application(answer)).spec
    assert spec.input_schema["required"] == ["text"]
    assert set(spec.output_schema["properties"]) == {"text", "attempt", "pid"}
    assert spec.common_data_schema["title"] == "Prompt"
    raw = await connection.create_session("flmping")
    with pytest.raises(flame.ConfigurationError, match="application flmping publishes no schemas"):
        await raw.typed_as_published()
    await raw.close()


def test_what_the_file_says_itself_stays_and_an_update_describes_too(cluster: Cluster) -> None:
    own = {"title": "Own", "type": "object"}
    name = register(cluster, "own", "answer", input_schema=own)

    def published() -> tuple[Any, Any]:
        with flame.sync.connect(cluster.broker.endpoint) as client:
            spec = client.get_application(name).spec
        return spec.input_schema, spec.output_schema

    assert published()[0] == own
    text = declared(name, "counter")
    ends(call("update", "-f", "-", endpoint=cluster.broker.endpoint, text=text), 0)
    assert published() == ({}, {})
    ends(call("update", "--describe", "-f", "-", endpoint=cluster.broker.endpoint, text=text), 0)
    assert published()[0] == {"anyOf": [{"type": "string"}, {"type": "null"}]}


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("nosuchprogram", [], "its command nosuchprogram can't be run here: there is none"),
        (sys.executable, ["-c", "pass"], "ended without describing anything"),
        (sys.executable, ["-c", "print('oh no'); raise SystemExit(3)"], "status 3 instead of describing itself"),
        (sys.executable, ["-c", "import os; open(os.environ['FLAME_DESCRIBE'], 'w').write('{')"], "is no JSON"),
        (sys.executable, ["-c", "import os; open(os.environ['FLAME_DESCRIBE'], 'w').write('[]')"], "a JSON object"),
    ],
    ids=["no-program", "nothing", "failed", "no-json", "no-object"],
)
def test_a_command_that_does_not_describe_itself_is_named(
    cluster: Cluster, command: str, arguments: list[str], says: str
) -> None:
    text = f"metadata: {{name: silent}}\nspec: {{command: {command!r}, arguments: {arguments!r}}}"
    done = call("register", "--describe", "-f", "-", endpoint=cluster.broker.endpoint, text=text)
    assert done.returncode != 0
    assert "application silent: " in done.stderr
    assert says in " ".join(done.stderr.split())


# ---- without async, and as the example shows it


@pytest.fixture
def blocking(cluster: Cluster, answer: str) -> Iterator[flame.sync.Session]:
    with flame.sync.connect(cluster.broker.endpoint) as client, client.create_session(answer, PROMPT) as session:
        yield session


def test_the_same_without_async(blocking: flame.sync.Session) -> None:
    typed = blocking.typed(Question, Answer)
    assert typed.invoke(Question("hi")).output.text == "hi!"
    handle = typed.create_task(Question("a"))
    assert handle.result(30).output.text == "a!"
    assert (handle.done(), handle.running(), handle.cancelled(), handle.exception()) == (True, False, False, None)
    assert repr(handle) == f"<flame.sync.TypedHandle {blocking.id}/{handle.id} succeed>"
    handles = typed.create_tasks([Question("b"), Question("c")])
    done, _ = concurrent.futures.wait(handles, 30)
    assert done == {*handles}
    assert [handle.result().output.text for handle in handles] == ["b!", "c!"]
    called: concurrent.futures.Future[object] = concurrent.futures.Future()
    handles[0].add_done_callback(called.set_result)
    assert called.result(30) is handles[0]
    failed = typed.create_task(Question("x", verb="fail"))
    assert isinstance(failed.exception(30), flame.TaskFailed)
    assert failed.finished().error is not None
    with pytest.raises(flame.TaskFailed):
        failed.result()
    other = blocking.typed(Question, NewerAnswer).create_task(Question("x"))
    assert isinstance(other.exception(30), flame.SchemaMismatch)
    assert other.finished().state is flame.TaskState.SUCCEED
    with pytest.raises(flame.SchemaMismatch, match="words: Field required"):
        other.result()
    seen: list[tuple[int, int | None]] = []
    questions = [Question(str(number)) for number in range(50)]
    tasks = typed.map(questions, on_progress=lambda done, total: seen.append((done, total)))
    assert [task.output.text for task in tasks] == [f"{number}!" for number in range(50)]
    assert seen == [(number, 50) for number in range(1, 51)]
    with contextlib.closing(typed.map(questions)) as some:
        assert next(some).output.text == "0!"
    assert blocking.typed_as_published().invoke({"text": "x"}).output["text"] == "x!"
    with pytest.raises(flame.InvalidInput, match="text: Field required"):
        typed.invoke({})  # type: ignore[arg-type]
    assert repr(typed) == f"<flame.sync.TypedSession {blocking.id} Question -> Answer>"


def test_chunks_without_async(cluster: Cluster) -> None:
    letters = register(cluster, "blocking-letters", "letters")
    with flame.sync.connect(cluster.broker.endpoint) as client, client.create_session(letters, PROMPT) as session:
        typed = session.typed(Question, Answer)
        with typed.stream(Question("abc")) as chunks:
            assert chunks.next(timeout_s=30).value.text == "a"
            assert [chunk.value.text for chunk in chunks] == ["b", "c"]
            assert chunks.stream.task.state is flame.TaskState.SUCCEED
        left = typed.stream(Question("abc"))
        assert next(left).value.text == "a"
        left.close()
        assert list(left) == []


async def test_the_example_runs(cluster: Cluster) -> None:
    endpoint = cluster.broker.endpoint
    done = await asyncio.to_thread(
        call, "register", "--describe", "-f", str(EXAMPLE / "service.yaml"), endpoint=endpoint
    )
    ends(done, 0)
    client = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", str(EXAMPLE / "client.py")],
        env={**os.environ, "FLAME_ENDPOINT": endpoint},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (client.returncode, client.stderr) == (0, "")
    assert client.stdout.splitlines() == [
        "Danke, Ada: 7 pieces, missing: ['pear']",
        "pieces in 500 orders: 499",
        "the same tasks: True",
        "without types: Danke, Bob",
        "refused: input for application shop: not Order: items.pear: 'many' is not of type 'integer'",
    ]
