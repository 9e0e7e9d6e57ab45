"""Typed services and sessions: values in, values out, and errors that name the field."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Generator
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import pydantic
import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict  # on Python 3.11 pydantic takes no other

import flame
from flame.client.published import SchemaCodec, codecs
from flame.errors import ConfigurationError, InvalidArgument, InvalidInput
from flame.protocol.codes import ErrorCode
from flame.protocol.states import TaskState
from flame.service.contexts import SessionContext, TaskContext
from flame.service.handlers import fault_of
from flame.typed.codec import Codec, Unfit


class Question(BaseModel):
    text: str
    limit: Annotated[int, Field(ge=1)] = 10


class Answer(BaseModel):
    text: str
    tags: list[str] = []


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


class Options(TypedDict):
    name: str
    depth: int


class Colour(Enum):
    RED = "red"


class Aliased(BaseModel):
    from_: str = Field(alias="from")


def session(common_data: bytes = b"", session_id: str = "s") -> SessionContext:
    return SessionContext(session_id, "app", common_data)


def task(value: object, session_id: str = "s") -> TaskContext:
    return TaskContext(session_id, "t", value if isinstance(value, bytes) else json.dumps(value).encode())


async def run(service: Any, value: object, common_data: bytes = b"") -> Any:
    """Run a service as an executor does, and read its JSON."""
    entered = service.on_session_enter(session(common_data))
    if entered is not None:
        await entered
    output = service.on_task_invoke(task(value))
    if asyncio.iscoroutine(output):
        output = await output
    return json.loads(output)


# ---- types on the wire


@pytest.mark.parametrize(
    ("kind", "value", "wire"),
    [
        (Question, Question(text="a"), b'{"text":"a","limit":10}'),
        (Question, {"text": "a", "limit": 2}, b'{"text":"a","limit":2}'),
        (Point, Point(1.5), b'{"x":1.5,"y":0.0}'),
        (Options, {"name": "a", "depth": 2}, b'{"name":"a","depth":2}'),
        (list[Point], [Point(1)], b'[{"x":1.0,"y":0.0}]'),
        (dict[str, int], {"a": 1}, b'{"a":1}'),
        (int | str, "ü", '"ü"'.encode()),
        (int | None, None, b"null"),
        (type(None), None, b"null"),
        (None, None, b"null"),
        (Literal["a", "b"], "a", b'"a"'),
        (Colour, Colour.RED, b'"red"'),
        (datetime, datetime(2026, 1, 2, tzinfo=UTC), b'"2026-01-02T00:00:00Z"'),
        (UUID, UUID(int=1), b'"00000000-0000-0000-0000-000000000001"'),
        (Decimal, Decimal("1.10"), b'"1.10"'),
        (tuple[int, str], (1, "a"), b'[1,"a"]'),
        (set[int], {1}, b"[1]"),
        (Annotated[int, Field(gt=0)], 1, b"1"),
        (Aliased, {"from": "a"}, b'{"from":"a"}'),
        (bytes, b"\0raw", b"\0raw"),
        (Any, {"a": [1, None]}, b'{"a":[1,null]}'),
    ],
    ids=str,
)
def test_values_travel_as_json_and_come_back(kind: Any, value: Any, wire: bytes) -> None:
    codec: Codec[Any] = Codec(kind, "test")
    assert codec.encode(value) == wire
    assert codec.encode(codec.decode(wire)) == wire


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (Question, {"limit": 2}, "text: Field required"),
        (Question, {"text": "a", "limit": 0}, "limit: Input should be greater than or equal to 1, got '0'"),
        (list[Point], [Point(1), {"x": "one"}], r"1\.x: Input should be a valid number"),
        (Question, Question.model_construct(text=1), "field_name='text'"),  # type: ignore[arg-type]
        (int, None, "Input should be a valid integer"),
        (bytes, "text", "expected bytes, got str"),
        (str, "\ud800", "unpaired surrogate|surrogates not allowed|valid unicode"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_the_name_of_its_field(kind: Any, value: Any, says: str) -> None:
    with pytest.raises(Unfit, match=says):
        Codec(kind, "test").encode(value)


@pytest.mark.parametrize(
    ("kind", "wire", "says"),
    [
        (Question, b'{"txt":"a"}', "text: Field required"),
        (Question, b"hello", "Invalid JSON"),
        (Question, b"\xff", "Invalid JSON"),
        (Question, b"", "Input should be an object"),
        (list[int], b'[1,"x"]', "1: Input should be a valid integer"),
    ],
    ids=str,
)
def test_bytes_that_do_not_fit_are_refused_by_the_name_of_their_field(kind: Any, wire: bytes, says: str) -> None:
    with pytest.raises(Unfit, match=says):
        Codec(kind, "test").decode(wire)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (threading.Lock, "test: .*lock.* can't be sent as JSON"),
        (3, "test: 3 can't be sent as JSON"),
        ("Nowhere", "test: Nowhere names what is not there"),
    ],
)
def test_a_type_that_json_can_not_hold_is_refused(kind: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Codec(kind, "test")


def test_values_become_json_for_common_data() -> None:
    assert flame.as_json(Question(text="a")) == b'{"text":"a","limit":10}'
    assert flame.as_json([1, "a", None]) == b'[1,"a",null]'
    assert flame.as_json({"x": 1}, Point) == b'{"x":1.0,"y":0.0}'
    with pytest.raises(InvalidInput, match="as_json: not Point: x: Field required"):
        flame.as_json({}, Point)


# ---- functions


async def test_a_function_gets_its_input_contexts_and_common_data() -> None:
    @flame.entrypoint
    async def answer(
        question: Question,
        context: flame.TaskContext,
        prompt: flame.CommonData[Point],
        *,
        where: flame.SessionContext,
        retries: int = 3,
    ) -> Answer:
        return Answer(text=f"{question.text} {context.task_id} {where.session_id} {prompt.x} {retries}")

    assert await run(answer, {"text": "hi"}, b'{"x":2}') == {"text": "hi t s 2.0 3", "tags": []}
    direct = await answer(Question(text="direct"), task(b""), Point(1), where=session())
    assert direct == Answer(text="direct t s 1 3")
    assert repr(answer) == "<flame.entrypoint answer>"


async def test_a_function_that_is_not_async_is_left_to_a_thread() -> None:
    @flame.entrypoint
    def double(number: int) -> int:
        return 2 * number

    assert not asyncio.iscoroutinefunction(double.on_task_invoke)
    assert await run(double, 21) == 42


async def test_a_function_may_take_nothing_and_return_nothing() -> None:
    @flame.entrypoint
    async def nothing() -> None:
        pass

    assert await run(nothing, b"") is None
    assert await run(nothing, None) is None
    with pytest.raises(InvalidInput, match="its input is not NoneType, which nothing takes"):
        await run(nothing, {"a": 1})


async def test_sessions_in_one_process_keep_their_common_data() -> None:
    @flame.entrypoint
    def say(word: str, common: flame.CommonData[str]) -> str:
        return f"{common} {word}"

    await say.on_session_enter(session(b'"one"', "s1"))
    await say.on_session_enter(session(b'"two"', "s2"))
    outputs: list[Any] = [say.on_task_invoke(task("x", name)) for name in ("s1", "s2")]
    assert outputs == [b'"one x"', b'"two x"']


async def test_an_input_that_does_not_fit_is_refused_before_the_function_is_called() -> None:
    called = False

    @flame.entrypoint
    async def answer(question: Question) -> Answer:
        nonlocal called
        called = True
        return Answer(text="")

    with pytest.raises(InvalidInput, match="its input is not Question, which answer takes: text: Field") as caught:
        await run(answer, {"txt": "a"})
    assert not called
    fault = fault_of(caught.value)
    assert (fault.code, fault.type) == (ErrorCode.INVALID_ARGUMENT, "InvalidInput")


async def test_what_a_function_must_not_return_is_its_fault() -> None:
    @flame.entrypoint
    async def answer(question: Question) -> Answer:
        return {"txt": 1}  # type: ignore[return-value]  # that is the point

    with pytest.raises(InvalidArgument, match="answer did not return Answer: text: Field required") as caught:
        await run(answer, {"text": "a"})
    assert fault_of(caught.value).code == ErrorCode.TASK_FAILED


def declared(body: str) -> Any:
    names: dict[str, Any] = {"flame": flame, "Question": Question}
    exec(compile(body, "declared", "exec", dont_inherit=True), names)
    return names["f"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def f(question) -> int: ...", "f: question has no annotation"),
        ("def f(question: int): ...", "f: it doesn't say what it returns"),
        ("def f(a: int, b: int) -> int: ...", "f: b: expected one input, as the first parameter"),
        ("def f(context: flame.TaskContext, a: int) -> int: ...", "f: a: expected one input, as the first parameter"),
        ("def f(*numbers: int) -> int: ...", "f: numbers: expected one input"),
        ("def f(a: int, **more: int) -> int: ...", "f: more: expected one input"),
        ("import threading\ndef f(a: type(threading.Lock())) -> int: ...", "f: its input: lock can't be sent as JSON"),
        ("def f(a: int) -> int:\n yield 1", "f: it yields; expected it to return something like AsyncIterator"),
        ("class f: ...", "flame.entrypoint: expected a function, got <class 'f'>"),
        ("f = 3", "flame.entrypoint: expected a function, got 3"),
    ],
)
def test_a_function_that_can_be_no_service_is_refused_where_it_is_declared(body: str, says: str) -> None:
    function = declared(body)
    with pytest.raises(ConfigurationError, match=says):
        flame.entrypoint(function)


async def test_types_may_be_defined_further_down() -> None:
    @flame.entrypoint
    async def late(value: Later) -> int:
        return value.number

    @dataclasses.dataclass
    class Later:
        number: int

    late._names = locals()  # of a module they are its globals, which grow by themselves
    assert await run(late, {"number": 3}) == 3


def test_a_type_that_is_never_defined_is_named() -> None:
    @flame.entrypoint
    async def f(value: Nowhere) -> int:  # type: ignore[name-defined]  # noqa: F821  # that is the point
        return 1

    with pytest.raises(ConfigurationError, match="an annotation names what is not there: name 'Nowhere'"):
        flame.schemas_of(f)


async def test_what_a_generator_yields_is_of_its_type() -> None:
    @flame.entrypoint
    async def words(question: Question) -> AsyncIterator[Point]:
        for number in range(2):
            yield Point(number)

    @flame.entrypoint
    def letters(question: Question) -> Generator[str, None, Answer]:
        yield from question.text
        return Answer(text=question.text)

    @flame.entrypoint
    async def wrong(question: Question) -> AsyncIterator[int]:
        yield "x"  # type: ignore[misc]  # that is the point

    for service in (words, letters, wrong):
        await service.on_session_enter(session())
    given = task({"text": "ab"})
    words_of: Any = words.on_task_invoke(given)
    assert [json.loads(chunk) async for chunk in words_of] == [{"x": 0.0, "y": 0.0}, {"x": 1.0, "y": 0.0}]
    letters_of: Any = letters.on_task_invoke(given)
    assert [next(letters_of), next(letters_of)] == [b'"a"', b'"b"']
    with pytest.raises(StopIteration) as end:
        next(letters_of)
    assert json.loads(end.value.value) == {"text": "ab", "tags": []}
    with pytest.raises(InvalidArgument, match="wrong did not yield int"):
        await anext(wrong.on_task_invoke(given))
    assert flame.schemas_of(letters)["output_schema"] == {"type": "string"}


# ---- classes


async def test_a_class_enters_with_its_common_data_and_keeps_state() -> None:
    class Summarise(flame.TypedService):
        def __init__(self, sign: str) -> None:
            self.sign = sign

        async def enter(self, prompt: Point, context: flame.SessionContext) -> None:
            self.prompt = prompt
            self.where = context.session_id

        async def invoke(self, question: Question, context: flame.TaskContext) -> Answer:
            return Answer(text=f"{question.text} {self.prompt.x} {self.where} {context.task_id}{self.sign}")

    assert await run(Summarise("!"), {"text": "hi"}, b'{"x":1}') == {"text": "hi 1.0 s t!", "tags": []}
    assert flame.schemas_of(Summarise)["common_data_schema"]["title"] == "Point"
    assert flame.schemas_of(Summarise("!")) == flame.schemas_of(Summarise)
    with pytest.raises(InvalidInput, match=r"session's common data is not Point, which .*Summarise\.enter takes: x"):
        await run(Summarise("!"), {"text": "hi"}, b"{}")


async def test_a_class_may_block_and_be_derived_from() -> None:
    class Base(flame.TypedService):
        def enter(self) -> None:
            self.count = 0

        def invoke(self, number: int, common: flame.CommonData[str]) -> str:
            self.count += 1
            return f"{common} {number} {self.count}"

    class Derived(Base):
        async def invoke(self, number: int) -> int:  # type: ignore[override]  # nobody calls it as one of the base
            self.count += 1
            return number + self.count

    assert not asyncio.iscoroutinefunction(Base().on_task_invoke)
    assert asyncio.iscoroutinefunction(Derived().on_task_invoke)
    assert await run(Base(), 1, b'"x"') == "x 1 1"
    assert await run(Derived(), 1) == 2


def test_a_class_that_can_be_no_service_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="has invoke and enter; on_task_invoke"):
        type("Both", (flame.TypedService,), {"on_task_invoke": print})
    empty = type("Empty", (flame.TypedService,), {})
    with pytest.raises(ConfigurationError, match="Empty has no invoke"):
        flame.schemas_of(empty)


# ---- schemas


def test_schemas_are_of_what_is_taken_and_returned() -> None:
    @flame.entrypoint
    async def answer(question: Question, prompt: flame.CommonData[str]) -> list[Answer]:
        return []

    @flame.entrypoint
    async def raw(data: bytes) -> bytes:
        return data

    schemas = flame.schemas_of(answer)
    assert schemas["input_schema"]["required"] == ["text"]
    assert schemas["input_schema"]["properties"]["limit"]["minimum"] == 1
    assert schemas["output_schema"]["type"] == "array"
    assert schemas["common_data_schema"] == {"type": "string"}
    assert flame.schemas_of(raw) == {}
    assert flame.schemas_of(flame.FlameService()) == {}
    spec = flame.ApplicationSpec(command="python", **schemas)
    assert spec.input_schema == schemas["input_schema"]


def test_a_service_is_described_instead_of_served(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @flame.entrypoint
    async def double(number: int) -> int:
        return 2 * number

    monkeypatch.setenv("FLAME_DESCRIBE", str(tmp_path / "schemas"))
    asyncio.run(flame.run(double))
    schemas = json.loads((tmp_path / "schemas").read_text())
    assert schemas == {"input_schema": {"type": "integer"}, "output_schema": {"type": "integer"}}
    asyncio.run(flame.run(flame.FlameService()))
    assert json.loads((tmp_path / "schemas").read_text()) == {}


# ---- what is only published


SCHEMA = pydantic.TypeAdapter(Question).json_schema()


def test_values_are_checked_by_a_published_schema() -> None:
    codec = SchemaCodec(SCHEMA, "test", sends=True)
    assert codec.encode({"text": "ü"}) == '{"text":"ü"}'.encode()
    assert codec.encode(b'{ "text": "a" }') == b'{ "text": "a" }'
    for value, says in (
        ({}, "'text' is a required property"),
        ({"text": 1}, "text: 1 is not of type 'string'"),
        ({"text": "a", "limit": 0}, "limit: 0 is less than the minimum of 1"),
        ({"text": object()}, "no JSON: .*object"),
        ({"text": float("nan")}, "no JSON"),
        (b"{", "no JSON"),
    ):
        with pytest.raises(Unfit, match=says):
            codec.encode(value)


def test_of_alternatives_the_nearest_one_is_complained_of() -> None:
    schema = pydantic.TypeAdapter(list[Question | None]).json_schema()
    with pytest.raises(Unfit, match=r"1\.text: 1 is not of type 'string'|1: .*required|1\.text"):
        SchemaCodec(schema, "test", sends=True).encode([None, {"text": 1}])


def test_what_nothing_is_published_of_is_bytes() -> None:
    sends, reads = codecs("app", {}, {"type": "string"})
    assert sends.encode(b"\0") == b"\0"
    assert sends.encode("ü") == "ü".encode()
    assert reads.decode(b'"a"') == "a"
    with pytest.raises(Unfit, match="no JSON"):
        reads.decode(b"a")
    with pytest.raises(Unfit, match="expected bytes or str"):
        sends.encode({})
    with pytest.raises(ConfigurationError, match="application app publishes no schemas"):
        codecs("app", {}, {})


def test_a_schema_that_is_none_and_a_library_that_is_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="test: no JSON schema"):
        SchemaCodec({"type": 3}, "test", sends=True)
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'flame-engine\[typed\]'"):
        SchemaCodec(SCHEMA, "test", sends=True)
    assert SchemaCodec(SCHEMA, "test", sends=False).decode(b"1") == 1


# ---- clients


def finished(output: bytes) -> flame.Task:
    return flame.Task("t1", "s1", "app", TaskState.SUCCEED, output)


def test_an_output_of_another_type_is_named() -> None:
    codec: Codec[Answer] = Codec(Answer, "test")
    typed = flame.TypedTask(finished(b'{"txt":1}'), codec)
    with pytest.raises(flame.SchemaMismatch, match=r"t1 of session s1 succeeded, but .* not Answer: text") as e:
        typed.output  # noqa: B018
    assert e.value.task.output == b'{"txt":1}'
    good = flame.TypedTask(finished(b'{"text":"a"}'), codec)
    assert good.output is good.output
    assert (good.id, good.state, good.error, good.executor) == ("t1", TaskState.SUCCEED, None, "")
    assert repr(good) == "<TypedTask s1/t1 succeed>"


# ---- what a program doesn't use


def test_an_executor_of_bytes_loads_nothing_of_this() -> None:
    script = (
        "import sys, flame\n"
        "class S(flame.FlameService): ...\n"
        "flame.run, S()\n"
        "found = [n for n in sys.modules if n.startswith(('pydantic', 'flame.typed', 'flame.service.typed'))]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
