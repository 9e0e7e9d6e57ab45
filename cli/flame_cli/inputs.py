"""Values of the command line: bytes that are given as text, in a file or on standard input, and ``NAME=VALUE``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from flame_cli.errors import CommandFailed, ExitCode

STDIN: Final = "-"
FILE_MARK: Final = "@"


def read_bytes(what: str, value: str) -> bytes:
    """Return what ``TEXT``, ``@FILE`` or ``-`` stands for."""
    try:
        if value == STDIN:
            return sys.stdin.buffer.read()
        if value.startswith(FILE_MARK):
            return Path(value.removeprefix(FILE_MARK)).read_bytes()
    except OSError as error:
        raise CommandFailed(f"{what} {value}: {error.strerror}", code=ExitCode.USAGE) from None
    return value.encode("utf-8", "surrogateescape")


def read_labels(pairs: Sequence[str]) -> dict[str, str]:
    """Return labels that are given as ``NAME=VALUE``."""
    labels = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise CommandFailed(f"label {pair!r}: expected NAME=VALUE", code=ExitCode.USAGE)
        labels[name] = value
    return labels
