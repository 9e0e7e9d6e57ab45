"""How far many tasks are, for whoever sits at the terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self, TextIO

AGAIN_S: Final = 0.1
"""Between two drawings."""
WIDTH: Final = 20
"""Of the bar itself, in characters."""


class ProgressBar:
    """A line that says how far something is, and how fast: made for ``on_progress`` of `Session.map`.

    It takes what has been done and how much there is to do, if that is known::

        async for task in session.map(inputs, on_progress=flame.ProgressBar("questions")):
            ...

    It is drawn on standard error, a few times a second, and only where that is a terminal. It is gone when everything
    is done, when it is closed, or at the end of its ``with`` block, whichever comes first. Whoever writes to the same
    terminal calls `clear` before. What it costs where it is not shown is its call.
    """

    def __init__(
        self,
        label: str = "",
        *,
        total: int | None = None,
        show: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count the time.

        Args:
            label: What is being done.
            total: How much there is to do, where that isn't told by the calls.
            show: Whether to draw it; ``None``: on a terminal.
            stream: Where; ``None``: on standard error.
            clock: Tells the time, in seconds.
        """
        self._label = f"{label} " if label else ""
        self._total = total
        self._stream = sys.stderr if stream is None else stream
        # Without a console there is no standard error at all.
        self._shown = self._stream is not None and (self._stream.isatty() if show is None else show)
        self._clock = clock
        self._begin = clock()
        self._next = self._begin
        self._drawn = 0
        """Characters of the line that stands there."""

    def __call__(self, done: int, total: int | None = None) -> None:
        """Say that so much is done, of so much if that is known."""
        if not self._shown:
            return
        if total is None:
            total = self._total
        if total is not None and done >= total:
            self.clear()
            return
        now = self._clock()
        if now >= self._next:
            self._next = now + AGAIN_S
            self._draw(self._text(done, total, now - self._begin))

    def clear(self) -> None:
        """Wipe the line; the next call draws it again."""
        if self._drawn:
            self._write(f"\r{' ' * self._drawn}\r")
            self._drawn = 0
            self._next = self._begin

    def close(self) -> None:
        """Wipe the line for good. Idempotent."""
        self.clear()
        self._shown = False

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wipe the line for good."""
        self.close()

    def __del__(self) -> None:
        """Wipe the line, if whoever drew it was interrupted."""
        if getattr(self, "_drawn", 0):
            self.close()

    def _text(self, done: int, total: int | None, passed_s: float) -> str:
        rate = done / passed_s if passed_s > 0 else 0.0
        speed = "" if not done or not rate else f"  {rate:,.0f}/s" if rate >= 10 else f"  {rate:.1f}/s"
        if total is None:
            return f"{self._label}{done:,}{speed}"
        bar = "#" * (WIDTH * done // total)
        left = f"  {_duration((total - done) / rate)} left" if speed else ""
        return f"{self._label}[{bar:.<{WIDTH}}] {done:,}/{total:,}{speed}{left}"

    def _draw(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        self._write(f"\r{text:<{self._drawn}}")
        self._drawn = len(text)

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # it is closed, or nobody reads it any more
            self._stream.write(text)
            self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}" if hours else f"{minutes}:{whole:02}"
