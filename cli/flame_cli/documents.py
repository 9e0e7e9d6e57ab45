"""What ``-o json`` and ``-o yaml`` show, and `view` in a terminal: records as plain maps. Pure.

Their names are an interface: `FIELDS` lists them, ``--help`` shows that list, and a test compares it with what the
records bring.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

Document = dict[str, Any]

FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "application": (
        *("name", "state", "shim", "command", "arguments", "environments", "working_directory", "description"),
        *("labels", "url", "image", "input_schema", "output_schema", "common_data_schema", "max_instances"),
        *("min_instances", "delay_release_s", "concurrency", "session_retry_limit", "max_executors", "weight"),
        *("placement", "idle_timeout_s", "timeout_s", "expires_s", "delay_s", "max_attempts", "retry_on"),
        *("retry_backoff_s", "fresh_process", "warm_instances", "created", "updated"),
    ),
    "session": (
        *("id", "application", "state", "code", "reason", "waits_for", "labels", "priority", "weight"),
        *(
            "resources",
            "min_instances",
            "max_instances",
            "idle_timeout_s",
            "common_data",
            "pending",
            "running",
            "succeeded",
        ),
        *("failed", "cancelled", "created", "idle_since", "ended", "close_mode", "settled", "epoch"),
        "bind_failures",
    ),
    "executor": (
        *("id", "state", "application", "session", "node", "pid", "started", "process_started", "entered", "idle"),
        *("pending", "running", "succeeded", "failed", "cancelled", "clean", "code", "reason", "epoch", "created"),
        "updated",
    ),
    "node": (
        *("name", "hostname", "state", "cpu", "memory", "gpu", "arch", "os", "serves", "executors", "used"),
        *("memory_by", "cpu_by"),
    ),
    "task": (
        *("id", "session", "application", "state", "executor", "attempt", "chunks", "started", "finished"),
        *("output_size", "output", "output_base64", "error"),
    ),
    "event": (
        *("at", "noun", "id", "event", "state", "before", "application", "session", "node", "executor", "code"),
        "reason",
    ),
}
"""The names of each kind's fields, in order."""


def at(seconds: float) -> datetime | None:
    """Return a time; ``None`` for 0, which says that it has not come."""
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def text_of(data: bytes) -> str | None:
    """Return bytes as the text that they are, ``None`` if they are none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def output_fields(data: bytes) -> Document:
    """Return an output as text if it is text, otherwise as base64."""
    text = text_of(data)
    return {"output": text, "output_base64": base64.b64encode(data).decode() if text is None else None}


def plain(value: Any) -> Any:
    """Return a value with nothing in it but what JSON has."""
    if isinstance(value, datetime):
        return instant(value)
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def instant(value: datetime) -> str:
    """Write a time as RFC 3339 has it, in UTC: ``2026-11-23T07:58:16.123Z``."""
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_json(value: Document | Sequence[Document], *, compact: bool = False) -> str:
    """Write documents as JSON; ``compact``: in one line."""
    import json

    if compact:
        return json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"))
    return json.dumps(plain(value), ensure_ascii=False, indent=2)


def to_yaml(value: Document | Sequence[Document]) -> str:
    """Write documents as YAML, without a line break at the end."""
    import yaml

    text: str = yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True, width=2**31)
    return text.rstrip("\n")
