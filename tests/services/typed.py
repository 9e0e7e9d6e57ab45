"""A typed service whose clients may be of another opinion."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import flame


@dataclass
class Prompt:
    sign: str


@dataclass
class Question:
    text: str
    verb: Literal["echo", "wrong", "fail", "refuse"] = "echo"
    times: int = 1


@dataclass
class Answer:
    text: str
    attempt: int
    pid: int


@flame.entrypoint
async def answer(question: Question, prompt: flame.CommonData[Prompt], context: flame.TaskContext) -> Answer:
    match question.verb:
        case "wrong":
            return {"txt": 1}  # type: ignore[return-value]
        case "fail":
            raise ValueError(question.text)
        case "refuse":
            raise flame.InvalidInput(question.text)
    return Answer(question.text * question.times + prompt.sign, context.attempt, os.getpid())


class Counter(flame.TypedService):
    def enter(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.count = 0

    def invoke(self, text: str | None) -> tuple[str, int]:
        self.count += 1
        return f"{text}{self.prompt.sign}", self.count


@flame.entrypoint
async def letters(question: Question) -> AsyncIterator[Answer]:
    for letter in question.text:
        yield Answer(letter, 1, 0)


if __name__ == "__main__":
    service = {"answer": answer, "counter": Counter(), "letters": letters}[os.environ.get("SERVICE", "answer")]
    asyncio.run(flame.run(service))
