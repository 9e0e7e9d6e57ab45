"""Where output goes: what a terminal can take and what a program behind a pipe should get."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from flame_cli.rendering import Column, table


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: fitted to a terminal, complete for anything else."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    made = table(columns, rows, width=width, colour=terminal and _colours_wanted())
    for line in made.lines:
        print(line)
    if made.dropped:
        note(f"({', '.join(made.dropped)}: no room in {width} columns; a wider terminal or a pipe shows all)")


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


def _colours_wanted() -> bool:
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
