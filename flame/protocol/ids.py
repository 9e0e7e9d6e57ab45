"""Ids that are minted: by clients, and by a scheduler for clients that leave it to the cluster."""

from __future__ import annotations

import hashlib
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


KEYED: Final = "key-"
"""What the ids of tasks begin with that were created under a key."""
MAX_KEY: Final = 512


def keyed_task_id(key: str) -> str:
    """Return the id of the task that a key names within its session: the same for every client."""
    return KEYED + hashlib.sha256(key.encode()).hexdigest()[:40]


def digest_of(data: bytes) -> bytes:
    """Return what tells whether two inputs are the same."""
    return hashlib.sha256(data).digest()
