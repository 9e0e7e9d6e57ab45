"""Variables in the environments of application files. Pure.

``${NAME}`` is the variable's value, ``${NAME:-default}`` the default if it is unset or empty, ``$$`` a dollar. Any
other dollar stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_REFERENCE: Final = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<inside>[^}]*)(?P<end>\}?))")
_INSIDE: Final = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<fallback>:-(?P<default>.*))?", re.DOTALL)


class ExpansionFailed(ValueError):
    """A text has a reference that can't be followed; the message says which and why."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Return a text with its references replaced; raise `ExpansionFailed` if one of them can't be."""

    def replaced(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        inside = _INSIDE.fullmatch(match["inside"])
        if inside is None or not match["end"]:
            raise ExpansionFailed(
                f"{match[0][:60]!r} is no reference: expected ${{NAME}} or ${{NAME:-default}}; $$ is a dollar"
            )
        name, value = inside["name"], variables.get(inside["name"])
        if inside["fallback"]:
            return value or inside["default"]
        if value is None:
            raise ExpansionFailed(f"variable {name} is not set: set it, or give a default as in ${{{name}:-default}}")
        return value

    return _REFERENCE.sub(replaced, text)
