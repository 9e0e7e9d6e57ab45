"""What an executor manager and a template say to one another, over a Unix socket that keeps messages apart.

A template is a process that has loaded a service and forks an executor for each order::

    manager                                template
       │ Adopt  (+ stdout, stderr)  ──►       │   once, after connecting
       │ ForkOrder (+ stdout, stderr) ──►     │
       │      ◄── Forked (+ pidfd), or NotForked
       │      ◄── Ended                       │   when that executor has ended, whoever is connected then
       │ Finish                     ──►       │   ends when its last executor has

What is in brackets are descriptors that go with the message (``SCM_RIGHTS``). Unknown kinds are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from flame.errors import MalformedMessage
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.supervision import Assignment

COMMON_DATA_BYTES: Final = 64 * 1024
"""An assignment with more data of its session doesn't go with an order: a datagram must fit in the smallest usual
buffer."""


@dataclass(slots=True)
class Adopt:
    """Says where a template is to work and write from now on; until then it did so as the first executor would."""

    folder: str
    ahead: int = 0
    """How many executors it is to fork before they are ordered."""
    ahead_s: float = 0.0
    """For how long it keeps them without an order; 0: for ever."""

    def encode(self) -> bytes:
        """Return the datagram."""
        return _pack("adopt", folder=self.folder, ahead=self.ahead, ahead_s=self.ahead_s)


@dataclass(slots=True)
class ForkOrder:
    """Asks for an executor."""

    executor: str
    folder: str
    """Where it works."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """The variables in which it differs from the template's as that was started; ``None``: it has none of that name."""
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Limits of the system on its process, soft and hard, by the number that ``setrlimit`` knows them by."""
    assignment: Assignment | None = None
    """Its session; ``None`` if that comes in the answer to its first report."""

    def encode(self) -> bytes:
        """Return the datagram."""
        return _pack(
            "fork",
            executor=self.executor,
            folder=self.folder,
            environment=self.environment,
            limits=[(number, *limit) for number, limit in self.limits.items()],
            assignment=None if self.assignment is None else self.assignment.fields(),
        )


@dataclass(slots=True)
class Finish:
    """Asks a template to end with its last executor."""

    def encode(self) -> bytes:
        """Return the datagram."""
        return _pack("finish")


@dataclass(slots=True)
class Forked:
    """Says that an executor was forked."""

    executor: str
    pid: int

    def encode(self) -> bytes:
        """Return the datagram."""
        return _pack("forked", executor=self.executor, pid=self.pid)


@dataclass(slots=True)
class NotForked:
    """Says that the system refused a fork."""

    executor: str
    reason: str

    def encode(self) -> bytes:
        """Return the datagram."""
        return _pack("not forked", executor=self.executor, reason=self.reason)


@dataclass(slots=True)
class Ended:
    """Says that an executor has ended, and with it the processes of its group."""

    executor: str
    pid: int
    status: int
    """Of its exit; negative: killed by that signal."""

    def encode(self) -> bytes:
        """Return the datagram."""
        return _pack("ended", executor=self.executor, pid=self.pid, status=self.status)


ToTemplate: TypeAlias = Adopt | ForkOrder | Finish
ToManager: TypeAlias = Forked | NotForked | Ended


def decode_for_template(data: bytes) -> ToTemplate | None:
    """Read what a manager says; ``None`` if it is of a kind that is not known here. Raises `MalformedMessage`."""
    fields = unpack(data)
    kind = fields.get("kind")
    if kind == "fork":
        assignment = fields.get("assignment")
        return ForkOrder(
            _text(fields, "executor"),
            _text(fields, "folder"),
            _environment(fields.get("environment", {})),
            _limits(fields.get("limits", [])),
            None if assignment is None else Assignment.from_fields(assignment),
        )
    if kind == "adopt":
        return Adopt(_text(fields, "folder"), _number(fields, "ahead"), float(fields.get("ahead_s", 0.0)))
    return Finish() if kind == "finish" else None


def decode_for_manager(data: bytes) -> ToManager | None:
    """Read what a template says; ``None`` if it is of a kind that is not known here. Raises `MalformedMessage`."""
    fields = unpack(data)
    kind = fields.get("kind")
    if kind == "forked":
        return Forked(_text(fields, "executor"), _pid(fields))
    if kind == "ended":
        return Ended(_text(fields, "executor"), _pid(fields), _number(fields, "status"))
    return NotForked(_text(fields, "executor"), _text(fields, "reason")) if kind == "not forked" else None


def difference(wanted: Mapping[str, str], present: Mapping[str, str]) -> dict[str, str | None]:
    """Return the changes that make ``wanted`` of ``present``, as in `ForkOrder.environment`.

    Only these are made after a fork: what the service itself has put into its environment meanwhile stays.
    """
    changes: dict[str, str | None] = {name: value for name, value in wanted.items() if present.get(name) != value}
    return changes | {name: None for name in present if name not in wanted}


def _pack(kind: str, **fields: Any) -> bytes:
    return pack({"v": VERSION, "kind": kind, **fields})


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key)
    if type(value) is not str:
        raise MalformedMessage(f"{key}: expected text, got {type(value).__name__}")
    return value


def _number(fields: dict[str, Any], key: str) -> int:
    value = fields.get(key)
    if type(value) is not int:
        raise MalformedMessage(f"{key}: expected a number, got {type(value).__name__}")
    return value


def _pid(fields: dict[str, Any]) -> int:
    """Read the number of a process that may be signalled: to the system smaller ones are many processes, or all."""
    pid = _number(fields, "pid")
    if pid <= 1:
        raise MalformedMessage(f"pid: expected that of a process, got {pid}")
    return pid


def _environment(value: object) -> dict[str, str | None]:
    if not isinstance(value, dict) or not all(
        type(name) is str and (text is None or type(text) is str) for name, text in value.items()
    ):
        raise MalformedMessage("environment: expected texts by name")
    return value


def _limits(value: object) -> dict[int, tuple[int, int]]:
    try:
        limits = {number: (soft, hard) for number, soft, hard in value}  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        limits = {None: (None, None)}
    if not all(type(each) is int for number, limit in limits.items() for each in (number, *limit)):
        raise MalformedMessage("limits: expected lists of three numbers")
    return limits
