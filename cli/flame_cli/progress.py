"""How far something is that takes a while: on standard error, one line that is drawn anew, or lines as it changes."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from flame_cli.output import note, terminal_width, write
from flame_cli.rendering import clipped

_CLEAR = "\r\x1b[K"


class Progress:
    """Tells how far it is. In a terminal the last line is gone when its block ends; in a file all stay."""

    def __init__(self) -> None:
        """Begin to count the time."""
        self._begin = time.monotonic()
        self._drawn = False
        self._told = ""
        self._redraws = sys.stderr.isatty()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wipe the line."""
        if self._drawn:
            write(sys.stderr, _CLEAR)

    def tell(self, text: str) -> None:
        """Say how far it is."""
        if self._redraws:
            line = f"{text}, {time.monotonic() - self._begin:.0f} s"
            write(sys.stderr, f"{_CLEAR}{clipped(line, terminal_width() - 1)}")
            self._drawn = True
        elif text != self._told:
            note(f"({text})")
        self._told = text
