"""One thing as lines of ``Field: value``. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from flame_cli.documents import Document
from flame_cli.rendering import amount_of_bytes, coloured, state, visible

_WORDS: Final = {"id": "ID", "pid": "PID", "cpu": "CPU", "gpu": "GPU", "os": "OS", "url": "URL"}
_NOTHING: Final = "-"


def fields(document: Document, *, colour: bool = False) -> list[str]:
    """Return a line for each field, more for those with several values, the values one below the other."""
    labels = {key: f"{label(key)}:" for key in document}
    width = max(map(len, labels.values()), default=0)
    lines = []
    for key, value in document.items():
        first, *others = shown(key, value)
        if colour and key == "state":
            first = coloured(first)
        lines.append(f"{labels[key].ljust(width)}  {first}")
        lines += [f"{' ' * width}  {line}".rstrip() for line in others]
    return lines


def block(title: str, text: str, *, limit: int | None = None) -> list[str]:
    """Return a text of several lines below its title; of a long one the first ``limit`` lines."""
    lines = [visible(line.expandtabs()) if line else "" for line in text.splitlines()]
    if limit is not None and len(lines) > limit:
        more = f"(and {len(lines) - limit} lines more: a pipe or -o json shows all)"
        lines = [*lines[:limit], more]
    return [f"{title}:", *(f"  {line}".rstrip() for line in lines)]


def label(key: str) -> str:
    """Write a field's name for people: ``delay_release_s`` is ``Delay release``."""
    words = key.removesuffix("_s").split("_")
    text = " ".join(_WORDS.get(word, word) for word in words)
    return text[0].upper() + text[1:]


def duration(seconds: float) -> str:
    """Write how long something lasts: ``60 s``, ``24 h``."""
    return f"{seconds / 3600:g} h" if seconds and seconds % 3600 == 0 else f"{seconds:g} s"


def shown(key: str, value: Any) -> list[str]:
    """Write a field's value as one or more lines."""
    if isinstance(value, Mapping):
        if key.endswith("_schema") and value:
            lines = json.dumps(value, ensure_ascii=False, indent=2).splitlines()
        else:
            lines = [f"{name}={item}" for name, item in value.items()]
        return [visible(line) for line in lines] or [_NOTHING]
    if value is None:
        return [_NOTHING]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, int | float) and key.endswith("_s"):
        return [duration(value)]
    if isinstance(value, datetime):
        return [value.astimezone().strftime("%Y-%m-%d %H:%M:%S")]
    text = _FORMS.get(key, str)(value)
    return [visible(line.expandtabs()) if line else "" for line in text.splitlines()] or [_NOTHING]


_FORMS: Final[Mapping[str, Callable[[Any], str]]] = {
    "state": lambda value: state(str(value)),
    "arguments": shlex.join,
    "memory": amount_of_bytes,
    "cpu": lambda value: f"{value:g}",
    "weight": lambda value: f"{value:g}",
    "retry_on": ", ".join,
}
