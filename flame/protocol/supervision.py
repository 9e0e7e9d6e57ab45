"""What passes between an executor and the manager that started it, and what both are told by the scheduler.

Plain dataclasses like those of `flame.protocol.messages`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from flame.errors import MalformedMessage
from flame.protocol import defaults
from flame.protocol.codec import VERSION, pack
from flame.protocol.fields import frame as _frame
from flame.protocol.fields import read_bytes as _bytes
from flame.protocol.fields import read_number as _number
from flame.protocol.fields import read_text as _text
from flame.protocol.messages import TaskFault
from flame.protocol.states import ExecutorState
from flame.protocol.values import ValueRef

_NOTHING: Final = b""


@dataclass(slots=True)
class ExecutorReport:
    """What an executor tells the manager that started it: at each change, and now and then in between."""

    state: ExecutorState
    pid: int
    error: TaskFault | None = None
    """Why ``on_session_enter`` or ``on_session_leave`` failed."""
    succeeded: int = 0
    """Records of this executor that the broker stored, by outcome."""
    failed: int = 0
    cancelled: int = 0
    counted_to: int = 0
    """Every record of this executor up to this sequence of the result stream is counted above."""
    running: int = 0
    """Tasks that user code runs now."""
    held: int = 0
    """Tasks taken from the broker and not started."""
    pending: int = 0
    """Tasks of the session that the broker still held at the last delivery."""
    idle_s: float = 0.0
    """For how long it has had nothing to do; 0 while it has."""
    lost_consumer: bool = False
    """Its pulls find no consumer."""
    started: str = ""
    """How its process was started, as far as it knows: ``forked``, or ``fresh`` and why it was not forked."""
    patient: bool = False
    """It understands `WAIT`."""
    common_data_version: int = 0
    """Of the common data that it has, if it knows of a newer one."""
    common_data_wanted: int = 0
    """That it has heard of, and wants to have; 0: of none."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        fields: dict[str, Any] = {"v": VERSION, "kind": "report", "state": self.state.value, "pid": self.pid}
        if self.error is not None:
            fields["error"] = self.error.fields()
        for name in _COUNTS:
            if value := getattr(self, name):
                fields[name] = value
        if self.idle_s:
            fields["idle_s"] = self.idle_s
        if self.lost_consumer:
            fields["lost_consumer"] = True
        if self.started:
            fields["started"] = self.started
        if self.patient:
            fields["patient"] = True
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> ExecutorReport:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = _frame(data, "report")
        try:
            state = ExecutorState(str(fields.get("state")))
        except ValueError:
            raise MalformedMessage(f"report: {fields.get('state')!r} is no state of an executor") from None
        report = cls(state, _number(fields, "pid", 0), TaskFault.from_fields(fields.get("error")))
        for name in _COUNTS:
            setattr(report, name, _number(fields, name, 0))
        report.idle_s = float(_number(fields, "idle_s", 0.0))
        report.lost_consumer = bool(fields.get("lost_consumer"))
        report.started = _text(fields, "started")
        report.patient = bool(fields.get("patient"))
        return report


_COUNTS: Final = (
    "succeeded",
    "failed",
    "cancelled",
    "counted_to",
    "running",
    "held",
    "pending",
    "common_data_version",
    "common_data_wanted",
)


@dataclass(slots=True)
class Assignment:
    """The session that an executor serves, and where its tasks are."""

    application: str
    session: str
    epoch: int
    stream: str
    consumer: str
    fence: int = 0
    """Deliveries up to this stream sequence may have run before: look for a result first."""
    common_data: bytes = _NOTHING
    common_data_ref: ValueRef | None = None
    """Where the common data is, if it is too large for a message."""
    common_data_version: int = 0
    """How often that was changed since the session was created."""
    credentials: dict[str, str] = field(default_factory=dict, repr=False)
    """Of the session."""
    delegations: dict[str, str] = field(default_factory=dict, repr=False)
    concurrency: int = 1
    max_executors: int = 1
    """How many executors share the consumer at most; bounds its standing pulls."""
    ack_wait_s: float = 15.0
    """How long a delivery is good after its last extension."""
    leave_timeout_s: float = 10.0
    """How long ``on_session_leave`` may take."""
    delay_release_s: float = defaults.DELAY_RELEASE_S
    """A task that is due within this time is worth waiting for: until then the executor does not call itself idle."""
    ledger: str = ""
    """The file in which the executor notes what it holds (see `flame.ledger`); empty: it keeps its leases itself."""
    timeout_s: float = defaults.TASK_TIMEOUT_S
    """This and the following are the application's, for tasks that don't say otherwise; 0 is no limit, or none."""
    expires_s: float = 0.0
    delay_s: float = 0.0
    max_attempts: int = defaults.MAX_ATTEMPTS
    retry_on: tuple[str, ...] = ()
    """Classes of exceptions after which a task may run again; empty: all."""
    retry_backoff_s: float = defaults.RETRY_BACKOFF_S

    @property
    def data_bytes(self) -> int:
        """How much of it is its session's: common data and credentials."""
        texts = (text for secrets in (self.credentials, self.delegations) for item in secrets.items() for text in item)
        return len(self.common_data) + sum(len(text.encode()) for text in texts)

    def fields(self) -> dict[str, Any]:
        """Return the map on the wire."""
        fields = {name: getattr(self, name) for name in _ASSIGNMENT}
        fields["common_data_ref"] = None if self.common_data_ref is None else self.common_data_ref.fields()
        return fields

    @classmethod
    def from_fields(cls, fields: object) -> Assignment:
        """Read one from the map on the wire, ignoring keys of newer versions."""
        if not isinstance(fields, dict):
            raise MalformedMessage(f"assignment: expected a map, got {type(fields).__name__}")
        try:
            known = {name: fields[name] for name in _ASSIGNMENT if name in fields}
            ref = known.get("common_data_ref")
            known["common_data_ref"] = None if ref is None else ValueRef.from_fields(ref)
            return cls(**{**known, "retry_on": tuple(known.get("retry_on", ()))})
        except TypeError as error:
            raise MalformedMessage(f"assignment: {error}") from None


_ASSIGNMENT: Final = tuple(Assignment.__dataclass_fields__)


SERVE: Final = "serve"
LEAVE: Final = "leave"
WAIT: Final = "wait"


@dataclass(slots=True)
class Orders:
    """A manager's answer to a report: what the executor is to do from now on."""

    want: str = SERVE
    """`SERVE`, or `LEAVE`: take no more tasks, finish the running ones, leave the session, end.

    `WAIT` is said only to `ExecutorReport.patient` ones that have no session yet: there is none now, ask again at once.
    """
    assignment: Assignment | None = None
    """In the answer to the first report; later only if something in it changed."""
    executor: str = ""
    """With the assignment of a process that was started ahead: the name of the executor that it is from now on."""
    folder: str = ""
    """With ``executor``: the folder to work in from now on; empty if that does not change."""
    force: bool = False
    """With `LEAVE`: the running tasks are to be stopped and recorded as cancelled."""
    common_data_version: int | None = None
    """To those that want newer common data: the version in force."""
    common_data: bytes | None = None
    """With that: the data, if the executor has an older one."""
    common_data_ref: ValueRef | None = None
    """Instead of that: where it is, if it is too large for a message."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        fields: dict[str, Any] = {"v": VERSION, "kind": "orders", "want": self.want}
        if self.assignment is not None:
            fields["assignment"] = self.assignment.fields()
        if self.executor:
            fields["executor"] = self.executor
        if self.folder:
            fields["folder"] = self.folder
        if self.force:
            fields["force"] = True
        if self.common_data_version is not None:
            fields["common_data_version"] = self.common_data_version
        if self.common_data is not None:
            fields["common_data"] = self.common_data
        if self.common_data_ref is not None:
            fields["common_data_ref"] = self.common_data_ref.fields()
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> Orders:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = _frame(data, "orders")
        assignment = fields.get("assignment")
        want = fields.get("want")
        return cls(
            want if want in (LEAVE, WAIT) else SERVE,
            None if assignment is None else Assignment.from_fields(assignment),
            _text(fields, "executor"),
            _text(fields, "folder"),
            bool(fields.get("force")),
            None if fields.get("common_data_version") is None else _number(fields, "common_data_version", 0),
            None if fields.get("common_data") is None else _bytes(fields, "common_data"),
            None if fields.get("common_data_ref") is None else ValueRef.from_fields(fields["common_data_ref"]),
        )


@dataclass(slots=True)
class LogChunk:
    """Some of what an executor's service wrote, in order; whole lines where they are short enough."""

    stream: str
    """``stdout`` or ``stderr``."""
    at: float
    """When it was read, Unix seconds."""
    data: bytes = _NOTHING

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        return pack({"v": VERSION, "kind": "log", "stream": self.stream, "at": self.at, "data": self.data})

    @classmethod
    def decode(cls, data: bytes) -> LogChunk:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = _frame(data, "log")
        return cls(_text(fields, "stream"), float(_number(fields, "at", 0.0)), _bytes(fields, "data"))


@dataclass(slots=True)
class Control:
    """What the executors of a session, and their managers, are told in between: report now, or stop tasks."""

    executor: str = ""
    """Whom it is for; empty: every executor of the session."""
    cancel: tuple[str, ...] = ()
    """Tasks that have their cancelled records: not to be started, and to be stopped if they run."""
    common_data_version: int = 0
    """The session's common data has this version now; 0: nothing is said of it."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        fields: dict[str, Any] = {"v": VERSION, "kind": "control", "executor": self.executor}
        if self.cancel:
            fields["cancel"] = list(self.cancel)
        if self.common_data_version:
            fields["common_data_version"] = self.common_data_version
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> Control:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = _frame(data, "control")
        cancel = fields.get("cancel", ())
        if not isinstance(cancel, list | tuple) or not all(isinstance(task, str) for task in cancel):
            raise MalformedMessage("cancel: expected a list of task ids")
        return cls(_text(fields, "executor"), tuple(cancel), _number(fields, "common_data_version", 0))
