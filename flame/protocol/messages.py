"""What passes on the hot path: plain dataclasses, no validation.

Decoding checks the frame (MessagePack, version, kind) and the fields it takes, and ignores the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from flame.credentials import GivenSecrets, check_secrets, revealed
from flame.errors import InvalidArgument, MalformedMessage
from flame.protocol import defaults
from flame.protocol.codec import VERSION, pack
from flame.protocol.fields import frame as _frame
from flame.protocol.fields import read_bytes as _bytes
from flame.protocol.fields import read_number as _number
from flame.protocol.fields import read_text as _text
from flame.protocol.states import TaskState
from flame.protocol.values import ValueRef

_NOTHING: Final = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """How one task is to be run; ``None`` leaves a matter to its application. Times count from when it was stored.

    Raises `InvalidArgument` for a value that an application could not have either.
    """

    timeout_s: float | None = None
    """How long one run may take, from 0.001 s to a day; then it is stopped, and the task fails with `TaskTimeout`."""
    expires_s: float | None = None
    """After this long it isn't worth starting any more: it fails with `TaskExpired`. 0: it stays worth starting."""
    delay_s: float | None = None
    """It is not started before."""
    max_attempts: int | None = None
    """How often it may run if the service raises, 1 to 1000; its application says after which exceptions."""
    common_data_version: int | None = None
    """It doesn't run with an older version of the session's common data. A session sees to that by itself for what was
    changed before the task was created, as far as it has heard of it.
    """
    credentials: GivenSecrets | None = field(default=None, repr=False, hash=False)
    """Secrets by name for whoever runs the task: in ``context.credentials`` they hide their values, see `Secret`."""
    delegations: GivenSecrets | None = field(default=None, repr=False, hash=False)
    """The same of what says on whose behalf the task acts: in ``context.delegations``."""

    def __post_init__(self) -> None:
        """Refuse what is out of range: of the few tasks that have options, so that everybody else may rely on it."""
        for name, (kinds, least, most) in _LIMITS.items():
            value = getattr(self, name)
            # Not a number is neither at least anything nor at most.
            if value is not None and (
                not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most
            ):
                what = "a whole number" if kinds is int else "a number"
                raise InvalidArgument(
                    f"options: {name}: expected {what} from {least:g} to {most:g}, got {repr(value)[:60]}"
                )
        for name in _SECRETS:
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, check_secrets(f"options: {name}", given))

    def fields(self) -> dict[str, Any]:
        """Return the map on the wire."""
        fields = {name: value for name in _LIMITS if (value := getattr(self, name)) is not None}
        for name in _SECRETS:
            if secrets := getattr(self, name):
                fields[name] = revealed(secrets)
        return fields

    @classmethod
    def from_fields(cls, fields: object) -> TaskOptions:
        """Read one from the map on the wire, ignoring keys of newer versions."""
        if not isinstance(fields, dict):
            raise MalformedMessage(f"options: expected a map, got {type(fields).__name__}")
        try:
            return cls(**{name: fields[name] for name in _OPTIONS if name in fields})
        except InvalidArgument as error:
            raise MalformedMessage(str(error)) from None


_OPTIONS: Final = tuple(TaskOptions.__dataclass_fields__)
_LIMITS: Final[dict[str, tuple[Any, float, float]]] = {
    "timeout_s": ((int, float), 0.001, defaults.RESULT_AGE_S),
    "expires_s": ((int, float), 0, defaults.RESULT_AGE_S),
    "delay_s": ((int, float), 0, defaults.RESULT_AGE_S),
    "max_attempts": (int, 1, 1000),
    "common_data_version": (int, 0, 2**53),
}
"""Of what kind each option is, and from where to where it goes: as in `flame.protocol.records.ApplicationSpec`."""
_SECRETS: Final = ("credentials", "delegations")


@dataclass(slots=True)
class TaskMessage:
    """A task, as a client stores it."""

    input: bytes = _NOTHING
    listen: bool = False
    """Somebody wants to hear at once that it runs; otherwise only a long one says so."""
    again: bool = False
    """The client stored it before and could not learn whether that worked: look for a result before running."""
    options: TaskOptions | None = None
    """What its creator asked for; ``None``: what its application says."""
    digest: bytes = _NOTHING
    """Of its input, if it was created under a key: what is created under that again must be the same."""
    input_ref: ValueRef | None = None
    """Where its input is, if that is too large for a message."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        fields: dict[str, Any] = {"v": VERSION, "kind": "task", "input": self.input}
        if self.listen:
            fields["listen"] = True
        if self.again:
            fields["again"] = True
        if self.options is not None:
            fields["options"] = self.options.fields()
        if self.digest:
            fields["digest"] = self.digest
        if self.input_ref is not None:
            fields["input_ref"] = self.input_ref.fields()
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> TaskMessage:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = _frame(data, "task")
        if len(fields) == _PLAIN and "input" in fields:
            return cls(_bytes(fields, "input"))
        options, ref = fields.get("options"), fields.get("input_ref")
        return cls(
            _bytes(fields, "input"),
            bool(fields.get("listen")),
            bool(fields.get("again")),
            None if options is None else TaskOptions.from_fields(options),
            _bytes(fields, "digest"),
            None if ref is None else ValueRef.from_fields(ref),
        )


_PLAIN: Final = len(("v", "kind", "input"))
"""So many fields has a task of which nothing special is said: most of them."""


@dataclass(slots=True)
class TaskFault:
    """Why a task failed or was cancelled."""

    code: str
    """An `flame.protocol.codes.ErrorCode`."""
    message: str
    type: str = ""
    """The class of the exception that the service raised, if it raised one."""
    traceback: str = ""
    details: bytes = b""
    """What the service tells besides: the ``details`` of the exception that it raised, if those are bytes."""

    def fields(self) -> dict[str, Any]:
        """Return the map on the wire."""
        fields: dict[str, Any] = {"code": str(self.code), "message": self.message}
        if self.type:
            fields["type"] = self.type
        if self.traceback:
            fields["traceback"] = self.traceback
        if self.details:
            fields["details"] = self.details
        return fields

    @classmethod
    def from_fields(cls, fields: object) -> TaskFault | None:
        """Read one from the map on the wire; ``None`` if there is none."""
        if fields is None:
            return None
        if not isinstance(fields, dict):
            raise MalformedMessage(f"error: expected a map, got {type(fields).__name__}")
        return cls(
            str(fields.get("code", "")),
            str(fields.get("message", "")),
            str(fields.get("type", "")),
            str(fields.get("traceback", "")),
            _bytes(fields, "details"),
        )


@dataclass(slots=True)
class ResultRecord:
    """The one terminal record of a task."""

    state: TaskState
    output: bytes = _NOTHING
    error: TaskFault | None = None
    executor: str = ""
    """Of the executor that ran the task or found that it must not run; empty: a record of the control side."""
    attempt: int = 1
    """1 for the first run; higher where the service raised before, or an executor was lost while running it."""
    started: float = 0.0
    """When the run began, Unix seconds; 0 if it never ran."""
    finished: float = 0.0
    """When the record was made, Unix seconds."""
    digest: bytes = _NOTHING
    """Of the task's input, if that was created under a key."""
    chunks: int = 0
    """How many chunks the run emitted; of one that succeeded all were stored before the record."""
    output_ref: ValueRef | None = None
    """Where the output is, if it is too large for a message: all of it was stored before the record."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        fields: dict[str, Any] = {
            "v": VERSION,
            "kind": "result",
            "state": self.state.value,
            "output": self.output,
            "executor": self.executor,
            "attempt": self.attempt,
            "started": self.started,
            "finished": self.finished,
        }
        if self.error is not None:
            fields["error"] = self.error.fields()
        if self.digest:
            fields["digest"] = self.digest
        if self.chunks:
            fields["chunks"] = self.chunks
        if self.output_ref is not None:
            fields["output_ref"] = self.output_ref.fields()
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> ResultRecord:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = _frame(data, "result")
        state = _TERMINAL.get(str(fields.get("state")))
        if state is None:
            raise MalformedMessage(f"result: expected a terminal state, got {fields.get('state')!r}")
        return cls(
            state,
            _bytes(fields, "output"),
            TaskFault.from_fields(fields.get("error")),
            _text(fields, "executor"),
            _number(fields, "attempt", 1),
            float(_number(fields, "started", 0.0)),
            float(_number(fields, "finished", 0.0)),
            _bytes(fields, "digest"),
            _number(fields, "chunks", 0) if "chunks" in fields else 0,
            ValueRef.from_fields(fields["output_ref"]) if "output_ref" in fields else None,
        )


_TERMINAL: Final = {state.value: state for state in TaskState if state.terminal}


@dataclass(slots=True)
class RunningEvent:
    """A live notification that a task was started."""

    executor: str
    attempt: int
    at: float
    """Unix seconds."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        return pack(
            {"v": VERSION, "kind": "running", "executor": self.executor, "attempt": self.attempt, "at": self.at}
        )

    @classmethod
    def decode(cls, data: bytes) -> RunningEvent:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = _frame(data, "running")
        return cls(_text(fields, "executor"), _number(fields, "attempt", 1), float(_number(fields, "at", 0.0)))


@dataclass(slots=True)
class Attempts:
    """What became of a task's earlier runs."""

    lost: int = 0
    """Executors that were lost while they ran it."""
    raised: int = 0
    """Runs after which it may run again, since the service raised."""
    not_before: float = 0.0
    """It is not to be started before this, Unix seconds."""

    def encode(self) -> bytes:
        """Return the bytes in the bucket."""
        fields: dict[str, Any] = {"v": VERSION, "kind": "attempts", "lost": self.lost}
        if self.raised:
            fields["raised"] = self.raised
        if self.not_before:
            fields["not_before"] = self.not_before
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> Attempts:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = _frame(data, "attempts")
        return cls(_number(fields, "lost", 0), _number(fields, "raised", 0), float(_number(fields, "not_before", 0.0)))
