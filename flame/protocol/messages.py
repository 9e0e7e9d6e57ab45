"""What passes on the hot path and between an executor and its manager: plain dataclasses, no validation.

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
from flame.protocol.states import ExecutorState, TaskState

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
        return pack(fields)

    @classmethod
    def decode(cls, data: bytes) -> TaskMessage:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = _frame(data, "task")
        if len(fields) == _PLAIN and "input" in fields:
            return cls(_bytes(fields, "input"))
        options = fields.get("options")
        return cls(
            _bytes(fields, "input"),
            bool(fields.get("listen")),
            bool(fields.get("again")),
            None if options is None else TaskOptions.from_fields(options),
            _bytes(fields, "digest"),
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
        return {name: getattr(self, name) for name in _ASSIGNMENT}

    @classmethod
    def from_fields(cls, fields: object) -> Assignment:
        """Read one from the map on the wire, ignoring keys of newer versions."""
        if not isinstance(fields, dict):
            raise MalformedMessage(f"assignment: expected a map, got {type(fields).__name__}")
        try:
            known = {name: fields[name] for name in _ASSIGNMENT if name in fields}
            return cls(**{**known, "retry_on": tuple(known.get("retry_on", ()))})
        except TypeError as error:
            raise MalformedMessage(f"assignment: {error}") from None


_ASSIGNMENT: Final = tuple(Assignment.__dataclass_fields__)


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
