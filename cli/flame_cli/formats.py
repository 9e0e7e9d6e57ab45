"""How results are written."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """A form of what a command shows."""

    TABLE = "table"
    """For people."""
    JSON = "json"
    YAML = "yaml"
