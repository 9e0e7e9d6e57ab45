"""``--watch``: a list that is shown again when it has changed, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar

from flame.errors import Unavailable
from flame_cli.errors import one_line
from flame_cli.formats import Format
from flame_cli.listing import Kind
from flame_cli.output import dropped_note, formatted, make_table, note, on_terminal
from flame_cli.rendering import clipped

T = TypeVar("T")

REFRESH_S: Final = 1.0

_NO_WRAP: Final = "\x1b[?7l"
"""A line too long for the terminal stays one line, so that the next frame finds its beginning."""
_WRAP: Final = "\x1b[?7h"


async def watch(form: Format, kind: Kind[T], fetch: Callable[[], Awaitable[Sequence[T]]]) -> None:
    """Look every second. A cluster that does not answer may come back, and whoever watches wants to see that."""
    redrawn = form is Format.TABLE and on_terminal() and os.environ.get("TERM") != "dumb"
    view: _Redrawn[T] | _Appended[T] = _Redrawn(kind) if redrawn else _Appended(form, kind)
    while True:
        try:
            items = await fetch()
        except Unavailable as error:
            view.lost(error)
        else:
            view.show(items)
        await asyncio.sleep(REFRESH_S)


class _Appended(Generic[T]):
    """One document, or table, after the other: only those that differ from the one before."""

    def __init__(self, form: Format, kind: Kind[T]) -> None:
        self._form = form
        self._kind = kind
        self._shown = ""
        self._lost = False

    def show(self, items: Sequence[T]) -> None:
        """Show the list, unless it is what was shown last."""
        self._lost = False
        if self._form is Format.TABLE:
            lines = make_table(self._kind.columns, self._kind.rows(items)).lines
            text = "\n".join([*lines, ""])  # a blank line between tables
        else:
            text = formatted(self._kind.documents(items), self._form, compact=True)
        if text != self._shown:
            print(text, flush=True)
        self._shown = text

    def lost(self, error: Unavailable) -> None:
        """Say once that no list comes."""
        if not self._lost:
            note(f"({one_line(str(error))}; trying again)")
        self._lost = True


class _Redrawn(Generic[T]):
    """In a terminal: the new list takes the place of the old one, and a line above says when that was.

    What was in the terminal before stays, and the last list is still there in the end.
    """

    def __init__(self, kind: Kind[T]) -> None:
        self._kind = kind
        self._body: list[str] = []
        self._drawn = 0

    def show(self, items: Sequence[T]) -> None:
        """Show the list and when it was so."""
        made = make_table(self._kind.columns, self._kind.rows(items))
        self._body = [*made.lines, *([] if items else ["(none)"])]
        height = shutil.get_terminal_size().lines
        room = height - 3  # the line above, the one below, and where the cursor is
        below = [dropped_note(made)] if made.dropped else []
        if len(self._body) > room:
            below = [f"({len(self._body) - room} more: no room in {height} lines; without --watch all are shown)"]
        self._body = [*self._body[:room], *below]
        self._draw(f"{self._kind.title} at {time.strftime('%H:%M:%S')}, Ctrl-C ends")

    def lost(self, error: Unavailable) -> None:
        """Say above the last list why there is no newer one."""
        self._draw(f"{self._kind.title}: {one_line(str(error))}")

    def _draw(self, status: str) -> None:
        width = shutil.get_terminal_size().columns
        lines = [clipped(status, width), *self._body]
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        text = "".join(f"{line}\x1b[K\n" for line in lines)
        print(f"{_NO_WRAP}{up}{text}\x1b[J{_WRAP}", end="", flush=True)
        self._drawn = len(lines)
