"""What a type checker makes of functions that run in the cluster. Never run: mypy reads it.

A line that must be refused says which error it expects; mypy complains of such a line that it accepts.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, assert_type

import flame
import flame.sync


def square(x: int) -> int:
    return x * x


async def greet(name: str, *, loud: bool = False) -> str:
    return name.upper() if loud else name


class Counter:
    def __init__(self, start: int) -> None:
        self.count = start

    def increment(self, by: int = 1) -> int:
        self.count += by
        return self.count


async def asynchronous() -> None:
    async with flame.functions(max_instances=4, labels={"a": "b"}) as fs:
        assert_type(fs, flame.FunctionSession)
        assert_type(fs.session, flame.Session)

        @fs.function
        def cube(x: int) -> int:
            return x**3

        @fs.function(options=flame.TaskOptions(timeout_s=1))
        async def later(x: int) -> str:
            return str(x)

        remote = fs.function(square)
        hello = fs.function(greet)
        assert_type(remote(3), flame.FunctionCall[int])
        assert_type(await remote(3), int)
        assert_type(await hello("a", loud=True), str)
        assert_type(await cube(2), int)
        assert_type(await later(2), str)
        assert_type(await remote(remote(2)), int)  # a call is an argument: so any argument is accepted
        assert_type(await hello(name=later(1)), str)
        remote(3).upper()  # type: ignore[attr-defined]
        "a" + await remote(3)  # type: ignore[operator]

        assert_type(fs.map(remote, range(3)), AsyncGenerator[int, None])
        failures = fs.map(remote, range(3), raise_failed=False)
        assert_type(failures, AsyncGenerator[int | flame.TaskError, None])
        fs.map(square, range(3))  # type: ignore[call-overload]

        counter = await fs.create(Counter, 10)
        assert_type(counter, flame.Instance[Counter])
        assert_type(counter.increment(2), flame.FunctionCall[Any])
        await fs.release(counter)
        await fs.create(square)  # type: ignore[arg-type]
        call = remote(1)
        assert_type(call.task_id, str)
        assert_type(await call.cancel("why"), flame.TaskState)
    flame.functions(instances=3)  # type: ignore[call-arg]
    assert_type((await flame.connect()).functions(priority=1), flame.FunctionSession)
    assert_type(flame.current_task(), flame.TaskContext)
    assert_type(await flame.current_task().output_of("id"), bytes)


def synchronous() -> None:
    with flame.sync.functions(max_instances=4) as fs:
        remote = fs.function(square)
        hello = fs.function(greet)
        assert_type(remote(3), flame.sync.FunctionCall[int])
        assert_type(remote(3).result(), int)
        assert_type(hello("a").result(1), str)
        assert_type(remote(remote(3)).result(), int)
        assert_type(fs.map(remote, range(3)), Generator[int, None, None])
        assert_type(fs.map(remote, [1], raise_failed=False), Generator[int | flame.TaskError, None, None])
        counter = fs.create(Counter, 1)
        assert_type(counter, flame.sync.Instance[Counter])
        assert_type(counter.increment(), flame.sync.FunctionCall[Any])
        assert_type(fs.session, flame.sync.Session)
    flame.sync.functions(instances=3)  # type: ignore[call-arg]
