"""Keeping secrets off screens: values of environments whose names say that they are secret. Pure.

What is hidden is hidden in every view and output format; nothing of `flmctl` shows it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

HIDDEN: Final = "********"

_ANYWHERE: Final = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH", "PRIVATE", "COOKIE", "JWT", "BEARER")
_WORDS: Final = frozenset({"PWD", "PAT", "SAS", "DSN", "CERT", "SIGNATURE", "SALT", "SEED"})
_NAMES_OF_FOLDERS: Final = frozenset({"PWD", "OLDPWD"})
_PASSWORD_IN_URL: Final = re.compile(r"(?<=://)([^/@\s:]*):([^/@\s]+)(?=@)")


def looks_secret(name: str) -> bool:
    """Whether the name of a variable says that its value is nobody's business. In doubt it is none."""
    upper = name.upper()
    if upper in _NAMES_OF_FOLDERS:
        return False
    return any(part in upper for part in _ANYWHERE) or not _WORDS.isdisjoint(re.split(r"[^A-Z0-9]+", upper))


def masked(environments: Mapping[str, str]) -> dict[str, str]:
    """Return environments fit to be shown. The passwords in URLs are hidden, too; an empty value is no secret."""
    return {name: _masked(name, value) for name, value in environments.items()}


def without_passwords(text: str) -> str:
    """Return a text with the passwords in its URLs hidden."""
    return _PASSWORD_IN_URL.sub(rf"\1:{HIDDEN}", text)


def _masked(name: str, value: str) -> str:
    return HIDDEN if value and looks_secret(name) else without_passwords(value)
