"""Ids that are minted: by clients, and by a scheduler for clients that leave it to the cluster."""

from __future__ import annotations

import secrets
from typing import Final

_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""In ASCII order, so that what is sorted as text is sorted as numbers."""


def base62(number: int, width: int) -> str:
    """Write a number with letters and digits, padded to ``width``."""
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def mint_session_id(application: str) -> str:
    """Return an id for a session, most likely of no other one."""
    return f"{application}-{base62(secrets.randbelow(62**6), 6)}"
