"""A program in virtual time: hours of it run in milliseconds, and take the same course every time.

The loop's time passes only when everything waits for it. Nothing real may be waited for: no socket, no process, no
thread. The other clocks go with it, and what is random comes from the seed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import selectors
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")

LIMIT_S = 3600.0
"""Of virtual time: what waits for ever ends here."""
BEGIN_S = 1_750_000_000.0
"""What the wall clock shows at first, Unix seconds."""
TURN_S = 1e-6
"""What one turn of the loop takes: nothing takes no time at all."""
_TURNS = 200_000
"""Of the loop without waiting for anything: nothing honest takes so many."""


class Stuck(BaseException):
    """The program waits for nothing that could come, or runs in circles."""


class _Selector(selectors.SelectSelector):
    """Waits by moving the loop's time on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turns = 0 if timeout is None or timeout > 0 else self._turns + 1
        if self._turns > _TURNS:
            self._turns = 0
            raise Stuck(f"{_TURNS} turns of the loop without waiting for anything")
        if timeout is None:
            raise Stuck("everything waits, and no timer runs")
        self.now += max(timeout, TURN_S)
        return []


class _Task(asyncio.Task[Any]):
    """A task whose place in a set doesn't depend on where it lies in memory."""

    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop that begins at 0 and jumps to the next timer when nothing is ready."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self.set_debug(False)  # noting where every callback comes from takes ten times as long as running it
        numbers = itertools.count()
        self.set_task_factory(lambda loop, coro, **kwargs: _Task(next(numbers), coro, loop=loop, **kwargs))

    def time(self) -> float:
        return self._virtual.now


def run_virtually(main: Coroutine[Any, Any, T], *, seed: int = 0, limit_s: float = LIMIT_S) -> T:
    """Run a program in virtual time; fail when it takes longer than ``limit_s`` of that."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await main

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner, _everything_by(runner.get_loop(), seed):
        return runner.run(limited())


@contextmanager
def _everything_by(loop: asyncio.AbstractEventLoop, seed: int) -> Iterator[None]:
    """Have all clocks go by the loop, and all chance by the seed."""
    chance = random.Random(seed)

    def wall() -> float:
        return BEGIN_S + loop.time()

    def wall_ns() -> int:
        return int(wall() * 1e9)

    def token(size: int = 32) -> str:
        return chance.randbytes(size).hex()

    with (
        mock.patch.object(time, "monotonic", loop.time),
        mock.patch.object(time, "time", wall),
        mock.patch.object(time, "time_ns", wall_ns),
        mock.patch.object(secrets, "token_hex", token),
        mock.patch.object(secrets, "randbelow", chance.randrange),
        mock.patch.object(secrets, "choice", chance.choice),
        mock.patch.object(random, "random", chance.random),
    ):
        yield
