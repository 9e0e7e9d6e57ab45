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


INPUT_OF: Final = "of-"
"""What the ids of large values begin with that are the inputs of tasks; the task's id follows."""


def mint_value_id(task_id: str = "") -> str:
    """Return an id for a large value, which says whose input it is if it is a task's."""
    if task_id:
        return f"{INPUT_OF}{task_id}-{base62(secrets.randbits(40), 7)}"
    return base62(secrets.randbits(96), 17)


def task_of_value(value: str) -> str:
    """Return the id of the task whose input a large value is; empty if it is none's."""
    return value.removeprefix(INPUT_OF).rpartition("-")[0] if value.startswith(INPUT_OF) else ""


KEYED: Final = "key-"
"""What the ids of tasks begin with that were created under a key."""
MAX_KEY: Final = 512


def keyed_task_id(key: str) -> str:
    """Return the id of the task that a key names within its session: the same for every client."""
    return KEYED + hashlib.sha256(key.encode()).hexdigest()[:40]


def digest_of(data: bytes) -> bytes:
    """Return what tells whether two inputs are the same."""
    return hashlib.sha256(data).digest()
