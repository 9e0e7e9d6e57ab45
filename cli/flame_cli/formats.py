"""How results are written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Format(StrEnum):
    """A form of what a command shows."""

    TABLE = "table"
    """For people."""
    JSON = "json"
    YAML = "yaml"


@dataclass(frozen=True, slots=True)
class How:
    """In which form to list, and whether once or until Ctrl-C."""

    form: Format = Format.TABLE
    watch: bool = False
