"""What a type checker makes of typed services and their clients. Never run: mypy reads it.

A line that must be refused says which error it expects; mypy complains of such a line that it accepts.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, assert_type

import flame
import flame.sync


@dataclass
class Question:
    text: str


@dataclass
class Answer:
    text: str


@flame.entrypoint
async def answer(question: Question, prompt: flame.CommonData[str], context: flame.TaskContext) -> Answer:
    assert_type(prompt, str)
    return Answer(question.text)


@flame.entrypoint
def double(number: int) -> int:
    return 2 * number


@flame.entrypoint
async def nothing() -> None: ...


@flame.entrypoint
async def words(question: Question) -> AsyncIterator[str]:
    yield question.text


@flame.entrypoint
def letters(question: Question) -> Iterator[str]:
    yield from question.text


class Service(flame.TypedService):
    async def enter(self, prompt: str, context: flame.SessionContext) -> None:
        self.prompt = prompt

    async def invoke(self, question: Question, context: flame.TaskContext) -> Answer:
        return Answer(self.prompt)


class Blocking(flame.TypedService):
    def enter(self) -> None: ...

    def invoke(self, question: Question) -> Answer:
        return Answer(question.text)


def services() -> None:
    assert_type(answer, flame.Entrypoint[Question, Answer])
    assert_type(double, flame.Entrypoint[int, int])
    assert_type(nothing, flame.Entrypoint[None, None])
    assert_type(words, flame.Entrypoint[Question, str])
    assert_type(letters, flame.Entrypoint[Question, str])
    assert_type(flame.schemas_of(answer), dict[str, Any])
    flame.ApplicationSpec(command="python", arguments=("main.py",), **flame.schemas_of(answer))
    assert_type(flame.as_json(Question("x")), bytes)
    flame.entrypoint(3)  # type: ignore[call-overload]


async def sessions(session: flame.Session) -> None:
    typed = session.typed(Question, Answer)
    assert_type(typed, flame.TypedSession[Question, Answer])
    assert_type(session.typed(answer), flame.TypedSession[Question, Answer])
    assert_type(session.typed(list[int], Answer), flame.TypedSession[list[int], Answer])
    union: flame.TypedSession[int | None, Answer] = session.typed(int | None, Answer)
    assert_type((await union.invoke(None)).output, Answer)
    task = await typed.invoke(Question("x"), timeout_s=5)
    assert_type(task, flame.TypedTask[Answer])
    assert_type(task.output, Answer)
    assert_type(task.task.output, bytes)
    handle = await typed.create_task(Question("x"))
    assert_type(handle, flame.TypedHandle[Answer])
    assert_type((await handle).output, Answer)
    assert_type(await handle.finished(), flame.TypedTask[Answer])
    assert_type(await typed.create_tasks([Question("x")]), list[flame.TypedHandle[Answer]])
    async for done in typed.map((Question(str(number)) for number in range(3)), ordered=False):
        assert_type(done.output, Answer)
    async for chunk in session.typed(words).stream(Question("x")):
        assert_type(chunk.value, str)
    assert_type(await session.typed_as_published(), flame.TypedSession[Any, Any])
    await typed.invoke("x")  # type: ignore[arg-type]
    await typed.invoke(Answer("x"))  # type: ignore[arg-type]
    typed.map([1])  # type: ignore[list-item]
    session.typed()  # type: ignore[call-overload]


async def maps(session: flame.Session) -> None:
    def on_progress(done: int, total: int | None) -> None: ...

    async for task in session.map([b"x"], on_progress=on_progress, cancel_on_exit=False):
        assert_type(task, flame.Task)
    session.map([b"x"], on_progress=lambda done: None)  # type: ignore[arg-type,misc]
    session.map([b"x"], key=lambda data: data.hex() if isinstance(data, bytes) else None)
    session.map([b"x"], key=lambda data: 1)  # type: ignore[arg-type,return-value]
    assert_type(await session.create_tasks([b"x", "y"], keys=["k", None]), list[flame.TaskHandle])
    await session.create_tasks([b"x"], keys=[1])  # type: ignore[list-item]
    with flame.ProgressBar("tasks", total=3, show=True) as bar:
        assert_type(bar, flame.ProgressBar)
        bar(1)
        bar("1")  # type: ignore[arg-type]


def blocking(session: flame.sync.Session) -> None:
    typed = session.typed(answer)
    assert_type(typed, flame.sync.TypedSession[Question, Answer])
    assert_type(session.typed(Question, Answer), flame.sync.TypedSession[Question, Answer])
    assert_type(typed.invoke(Question("x")).output, Answer)
    handle = typed.create_task(Question("x"), key="k")
    assert_type(handle, flame.sync.TypedHandle[Answer])
    assert_type(handle.result(1.0).output, Answer)
    assert_type(handle.handle.result(), flame.Task)
    for done in concurrent.futures.as_completed(typed.create_tasks([Question("x")], keys=["k"])):
        assert_type(done.result().output, Answer)
    assert_type(session.typed(words).stream(Question("x")), flame.sync.TypedStream[str])
    for task in typed.map([Question("x")], key=lambda question: question.text, on_progress=flame.ProgressBar("asked")):
        assert_type(task.output, Answer)
    typed.map([Question("x")], key=lambda question: 1)  # type: ignore[arg-type,return-value]
    for chunk in session.typed(words).stream(Question("x")):
        assert_type(chunk.value, str)
    typed.invoke(1)  # type: ignore[arg-type]
