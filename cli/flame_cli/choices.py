"""What options and arguments offer a choice of. Written out here, since completion and help must not wait for Flame."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from flame_cli.formats import Format


class SessionStateName(StrEnum):
    """A state that sessions can be listed by: the values of `flame.SessionState`."""

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


class Language(StrEnum):
    """What a script is written in: the values of `flame.scripts.LANGUAGES`."""

    SHELL = "shell"
    PYTHON = "python"


class Shell(StrEnum):
    """A shell that can be told how to complete."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


CHOICES: Final[dict[str, type[StrEnum]]] = {
    "output": Format,
    "state": SessionStateName,
    "language": Language,
    "shell": Shell,
}
"""By the name of the parameter."""
