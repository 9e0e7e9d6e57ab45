"""``--watch``: a list that is shown again when it has changed, until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NoReturn, Protocol, TypeVar

from flame.errors import Unavailable
from flame_cli.errors import one_line
from flame_cli.formats import Format
from flame_cli.listing import Kind
from flame_cli.output import dropped_note, formatted, make_table, note, on_terminal
from flame_cli.rendering import clipped

T = TypeVar("T")
In = TypeVar("In", contravariant=True)

REFRESH_S: Final = 1.0


async def watch(form: Format, kind: Kind[T], fetch: Callable[[], Awaitable[Sequence[T]]]) -> NoReturn:
    """Look every second. A cluster that does not answer may come back, and whoever watches wants to see that."""
    redrawn = form is Format.TABLE and on_terminal() and os.environ.get("TERM") != "dumb"
    view: _View[T] = _Redrawn(kind) if redrawn else _Appended(form, kind)
    while True:
        try:
            items = await fetch()
        except Unavailable as error:
            view.lost(error)
        else:
            view.show(items)
        await asyncio.sleep(REFRESH_S)


class _View(Protocol[In]):
    """Where a list is shown."""

    def show(self, items: Sequence[In]) -> None:
        """Show the list as it is now."""

    def lost(self, error: Unavailable) -> None:
        """Show that what was shown may be out of date."""


class _Appended(_View[T]):
    """One document, or table, after the other: only those that differ from the one before."""

    def __init__(self, form: Format, kind: Kind[T]) -> None:
        self._form = form
        self._kind = kind
        self._shown = ""
        self._lost = False

    def show(self, items: Sequence[T]) -> None:
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
        if not self._lost:
            note(f"({one_line(str(error))}; trying again)")
        self._lost = True


class _Redrawn(_View[T]):
    """In a terminal: the new list takes the place of the old one, and a line above says when that was.

    What was in the terminal before stays, and the last list is still there in the end.
    """

    def __init__(self, kind: Kind[T]) -> None:
        self._kind = kind
        self._body: list[str] = []
        self._drawn = 0

    def show(self, items: Sequence[T]) -> None:
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
        self._draw(f"{self._kind.title}: {one_line(str(error))}")

    def _draw(self, status: str) -> None:
        width = shutil.get_terminal_size().columns
        lines = [clipped(status, width), *self._body]
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        print(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J", end="", flush=True)
        self._drawn = len(lines)
