"""Where output goes: what a terminal can take and what a program behind a pipe should get."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from flame_cli.formats import Format
from flame_cli.rendering import Column, Table, table

if TYPE_CHECKING:
    from flame_cli.documents import Document


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: fitted to a terminal, complete for anything else."""
    made = make_table(columns, rows)
    print_lines(made.lines)
    if not rows and on_terminal():
        note("(none)")
    if made.dropped:
        note(dropped_note(made))


def make_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    """Lay a table out for where it will be printed."""
    return table(columns, rows, width=terminal_width() if on_terminal() else None, colour=colours_wanted())


def dropped_note(made: Table) -> str:
    """Say which columns found no room."""
    return f"(no room for {', '.join(made.dropped)}: use a wider terminal or a pipe)"


def print_document(document: Document, form: Format) -> None:
    """Print one thing with all that is known of it."""
    if form is Format.TABLE:
        from flame_cli.fields import fields

        print_lines(fields(document, colour=colours_wanted()))
    else:
        print(formatted(document, form))


def formatted(value: Document | Sequence[Document], form: Format, *, compact: bool = False) -> str:
    """Write documents as JSON or YAML; ``compact``: JSON in one line, YAML with a mark before each document."""
    from flame_cli.documents import to_json, to_yaml

    if form is Format.JSON:
        return to_json(value, compact=compact)
    return f"---\n{to_yaml(value)}" if compact else to_yaml(value)


def print_lines(lines: Sequence[str]) -> None:
    """Print lines."""
    for line in lines:
        print(line)


def print_bytes(data: bytes) -> None:
    """Print bytes as they are; in a terminal what follows them begins on a new line."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    if data and not data.endswith(b"\n") and on_terminal():
        sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


def note(text: str) -> None:
    """Tell a person something on standard error; if nobody is there, that is no error."""
    write(sys.stderr, f"{text}\n")


def write(stream: TextIO, text: str) -> None:
    """Write at once; nobody being there to read it is no error."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        pass


def on_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def terminal_width() -> int:
    """Return how many columns the terminal has."""
    return shutil.get_terminal_size().columns


def colours_wanted() -> bool:
    """Whether to use colours on standard output."""
    return on_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
