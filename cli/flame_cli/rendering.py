"""Tables as plain aligned columns. Pure: the width and whether to colour are arguments."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

GAP: Final = "  "
ELLIPSIS: Final = "…"

_BOLD: Final = "\x1b[1m"
_RESET: Final = "\x1b[0m"
_COLOURS: Final = {"green": "\x1b[32m", "yellow": "\x1b[33m", "red": "\x1b[31m"}
_STATE_COLOURS: Final = {
    "Enabled": "green",
    "Open": "green",
    "Bound": "green",
    "Ready": "green",
    "Succeed": "green",
    "Binding": "yellow",
    "Running": "yellow",
    "Closing": "yellow",
    "Disabled": "yellow",
    "Starting": "yellow",
    "Unbinding": "yellow",
    "Unknown": "yellow",
    "Cancelled": "red",
    "Failed": "red",
    "NotReady": "red",
}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    right: bool = False
    """Aligned to the right, as numbers are."""
    shrink_to: int | None = None
    """May be cut to this width where a terminal is too narrow."""
    drop: int = 0
    """Left out where a terminal is too narrow, the lowest first; 0: never."""
    state: bool = False
    """Coloured by what it says."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table, ready to print."""

    lines: list[str]
    dropped: list[str]
    """Titles of the columns that found no room."""


def table(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    width: int | None = None,
    colour: bool = False,
) -> Table:
    """Lay out rows under their titles.

    Args:
        columns: What the columns are.
        rows: As many texts a row as there are columns.
        width: Of the terminal; ``None`` if the output is read by a program: then nothing is cut or left out.
        colour: Whether to use colours.
    """
    cells = [[column.title for column in columns], *([visible(text) for text in row] for row in rows)]
    shown = list(range(len(columns)))
    if width is not None:
        shown = _columns_that_fit(columns, cells, width)
    widths = {index: max(len(line[index]) for line in cells) for index in shown}
    if width is not None:
        _shrink(columns, widths, width)
    lines = []
    for number, line in enumerate(cells):
        parts = [_cell(columns[index], line[index], widths[index]) for index in shown]
        if colour:
            parts = [
                f"{_BOLD}{part}{_RESET}" if number == 0 else _coloured(columns[index], part)
                for index, part in zip(shown, parts, strict=True)
            ]
        lines.append(GAP.join(parts).rstrip())
    return Table(lines, [column.title for index, column in enumerate(columns) if index not in shown])


def visible(text: str) -> str:
    """Return a text that changes nothing in a terminal but the line it is on."""
    return "".join(char if char.isprintable() else "?" for char in text) or "-"


def clipped(text: str, width: int) -> str:
    """Cut a text to a width, with a mark where something is missing."""
    return text if len(text) <= width else text[: max(0, width - 1)] + ELLIPSIS


def coloured(text: str) -> str:
    """Colour a state by what it says."""
    name = _STATE_COLOURS.get(text.strip())
    return text if name is None else f"{_COLOURS[name]}{text}{_RESET}"


def state(value: str) -> str:
    """Write a state as one capitalised word: ``not ready`` is ``NotReady``."""
    return value.title().replace(" ", "")


def first_line(text: str) -> str:
    """Return what a reason says in one line; what is below that helps to find out more."""
    return text.partition("\n")[0]


def clock(at: float, *, now: float | None = None) -> str:
    """Write a time of today as ``HH:MM:SS`` and any other as its date, in local time."""
    there, here = time.localtime(at), time.localtime(now)
    return time.strftime("%H:%M:%S" if there[:3] == here[:3] else "%Y-%m-%d", there)


def amount_of_bytes(amount: int) -> str:
    """Write an amount of memory in three digits or so: ``512m``, ``7.8g``."""
    size = float(amount)
    for unit in ("", "k", "m", "g"):
        if size < 1024:
            return f"{size:.0f}{unit}" if size >= 10 or size == int(size) else f"{size:.1f}{unit}"
        size /= 1024
    return f"{size:.1f}t"


def _columns_that_fit(columns: Sequence[Column], cells: list[list[str]], width: int) -> list[int]:
    """Leave columns out until what remains fits, with those that can be cut at their narrowest."""
    shown = list(range(len(columns)))
    for drop in sorted({column.drop for column in columns} - {0}):
        least = 0
        for index in shown:
            need = max(len(line[index]) for line in cells)
            limit = columns[index].shrink_to
            least += need if limit is None else min(need, limit)
        if least + len(GAP) * (len(shown) - 1) <= width:
            break
        shown = [index for index in shown if columns[index].drop != drop]
    return shown


def _shrink(columns: Sequence[Column], widths: dict[int, int], width: int) -> None:
    """Narrow the columns that may be cut, the last first, until the table fits or nothing is left to cut."""
    over = sum(widths.values()) + len(GAP) * (len(widths) - 1) - width
    for index in sorted(widths, reverse=True):
        limit = columns[index].shrink_to
        if over > 0 and limit is not None and widths[index] > limit:
            cut = min(over, widths[index] - limit)
            widths[index] -= cut
            over -= cut


def _cell(column: Column, text: str, width: int) -> str:
    text = clipped(text, width)
    return text.rjust(width) if column.right else text.ljust(width)


def _coloured(column: Column, part: str) -> str:
    return coloured(part) if column.state else part
