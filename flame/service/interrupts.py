"""Ctrl-C and SIGTERM in a process that somebody has started by hand."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from flame.service.forked import flush_streams

_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], Any] | int | None


class Interrupts:
    """The first one asks, the second one ends the process, also while user code blocks the event loop.

    They are handled as Python does it, in the main thread between two instructions, and not by the loop.
    """

    def __init__(self, ask: Callable[[], None], must_end: Callable[[], bool]) -> None:
        """Have the loop call ``ask`` at the first, unless ``must_end`` says that this one is to end the process."""
        self._ask: Final = ask
        self._must_end: Final = must_end
        self._loop = asyncio.get_running_loop()
        self._asked = False
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> None:
        """Handle them from now on, if this is the main thread: otherwise they are another's."""
        with contextlib.suppress(ValueError):
            for number in _NUMBERS:
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        """Leave them to whom they were handled by before."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:  # otherwise a debugger has taken it since
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._asked or self._must_end():
            flush_streams()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            os._exit(128 + number)  # the first process of a container doesn't die of it
        self._asked = True
        self._loop.call_soon_threadsafe(self._ask)
