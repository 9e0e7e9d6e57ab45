"""An event loop whose time passes only when everything waits for it: hours of a program run in milliseconds.

Nothing real may be waited for: no socket, no process, no thread. What runs on it takes the same course every time, as
far as the program itself does.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

LIMIT_S = 3600.0
"""Of virtual time: what waits for ever ends here."""


class _Selector(selectors.SelectSelector):
    """Waits by moving the loop's time on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the program waits for something that no timer and nobody brings")
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop that begins at 0 and jumps to the next timer when nothing is ready."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run_virtually(main: Coroutine[Any, Any, T], limit_s: float = LIMIT_S) -> T:
    """Run a program in virtual time; fail when it takes longer than ``limit_s`` of that."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await main

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(limited())
