"""Lists in pages, and answers that a message can hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from flame.errors import InternalError
from flame.protocol import defaults
from flame.protocol.api import List, Verb, answer_ok
from flame.protocol.records import Record

_LARGEST_ANSWER: Final = defaults.MAX_PAYLOAD_BYTES - 4096
"""In bytes; the headers of the message need some too."""


def page(names: Iterable[str], request: List) -> tuple[list[str], bool]:
    """Return the names of one page, in order, and whether there are more."""
    rest = sorted(name for name in names if name > request.after)
    return rest[: request.limit], len(rest) > request.limit


def fitting(verb: Verb, result: Record | None) -> bytes:
    """Encode an answer; of a page as much as a message may hold, since what is larger would never arrive."""
    data = answer_ok(result)
    items = getattr(result, "items", ())
    while len(data) > _LARGEST_ANSWER and result is not None and len(items) > 1:
        items = items[: len(items) // 2]
        result = result.changed(items=items, more=True)
        data = answer_ok(result)
    if len(data) > _LARGEST_ANSWER:
        raise InternalError(f"{verb.value}: an answer of {len(data)} bytes is more than a message may hold")
    return data
