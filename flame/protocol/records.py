"""What the control plane keeps in its buckets: validated, versioned records, each with one writer."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from flame.errors import FlameError, InvalidArgument, MalformedMessage
from flame.protocol import defaults
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.resources import Resources
from flame.protocol.states import ApplicationState, CloseMode, ExecutorState, Placement, SessionState
from flame.protocol.subjects import check_application, check_token

R = TypeVar("R", bound="Record")


MAX_LABELS: Final = 32
SCHEMA_BYTES: Final = 64 * 1024
"""The most that one schema may hold, as JSON."""

_LABEL = re.compile(r"[A-Za-z0-9_.\-/]{0,63}", re.ASCII)


def _labels(labels: dict[str, str]) -> dict[str, str]:
    """Refuse what is no set of labels."""
    if len(labels) > MAX_LABELS:
        raise ValueError(f"expected at most {MAX_LABELS} labels, got {len(labels)}")
    for key, value in labels.items():
        for what, text in (("key", key), ("value", value)):
            if not _LABEL.fullmatch(text) or (what == "key" and not text):
                raise ValueError(
                    f"{what} {text[:80]!r} is no {what} of a label: expected {1 if what == 'key' else 0} to 63"
                    " characters out of A-Z, a-z, 0-9, '_', '.', '-' and '/'"
                )
    return labels


def _schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse what JSON has no object for, or too large a one."""
    try:
        text = json.dumps(schema, allow_nan=False)
        pack(schema)
        same = json.loads(text) == schema
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a JSON object: {error}") from None
    if not same:
        raise ValueError("expected a JSON object, got a map with what JSON can't hold")
    if len(text) > SCHEMA_BYTES:
        raise ValueError(f"expected a JSON object of at most {SCHEMA_BYTES} bytes, got {len(text)}")
    return schema


def _name(what: str) -> AfterValidator:
    return AfterValidator(lambda value: check_token(what, value))


def _resources(value: object) -> object:
    return Resources.parse(value, defaults.RESOURCES) if isinstance(value, str) else value


ApplicationName = Annotated[str, AfterValidator(check_application)]
SessionId = Annotated[str, _name("session")]
NodeName = Annotated[str, _name("node")]
Labels = Annotated[dict[str, str], AfterValidator(_labels)]
Schema = Annotated[dict[str, Any], AfterValidator(_schema)]
Amounts = Annotated[Resources, BeforeValidator(_resources), AfterValidator(Resources.check)]


class Record(BaseModel):
    """A map with a version. Readers ignore keys that they don't know."""

    model_config = ConfigDict(frozen=True, extra="ignore", arbitrary_types_allowed=True, defer_build=True)

    def encode(self) -> bytes:
        """Return the bytes in the bucket."""
        return pack({"v": VERSION, **self.model_dump()})

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read one; raise `MalformedMessage` if it is none."""
        try:
            return _lean(cls.model_validate(cls._shared(unpack(data)), extra="ignore"))
        except ValidationError as error:
            raise MalformedMessage(f"{cls.__name__}: {explain(error)}") from None

    def lean(self) -> Self:
        """Return it as a reader of the bucket would have it, sharing with others what they have in common."""
        return self.decode(self.encode())

    def changed(self, **fields: Any) -> Self:
        """Return a copy with some fields replaced."""
        return _lean(self.model_copy(update=fields))

    @classmethod
    def _shared(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Put in place what many records have in common: a scheduler holds one for each open session."""
        return fields


_NONE_SET: Final[set[str]] = set()


def _lean(record: R) -> R:
    """Let a record forget which of its fields were given, which takes more room than they do, and nobody asks for."""
    object.__setattr__(record, "__pydantic_fields_set__", _NONE_SET)
    return record


def explain(error: ValidationError) -> str:
    """Say in one line which fields are wrong, what was expected and what was got."""
    lines = []
    for fault in error.errors(include_url=False):
        cause = fault.get("ctx", {}).get("error")
        text = str(cause) if isinstance(cause, FlameError) else fault["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            text = "unknown field"
        elif fault["type"] not in ("value_error", "missing"):
            text = f"{text}, got {str(fault['input'])[:60]!r}"
        lines.append(f"{where}: {text}" if where else text)
    return "; ".join(lines)


class Input(BaseModel):
    """Something that a user wrote: unknown fields are refused, since they are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, defer_build=True)

    @classmethod
    def check(cls, what: str, fields: object) -> Self:
        """Read one from a map; raise `InvalidArgument` that names ``what`` and every wrong field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InvalidArgument(f"{what}: {explain(error)}") from None


class ApplicationSpec(Input):
    """What an application is: how its service is started and how many executors a session of it may have."""

    shim: Literal["Nats", "Log"] = "Nats"
    """How the service is driven: ``Nats`` by the SDK's protocol, ``Log`` by a built-in that echoes its input."""
    command: str = ""
    """The program; found on the executor's PATH if it has no slash. Needed unless the shim is ``Log``."""
    arguments: tuple[str, ...] = ()
    environments: dict[str, str] = Field(default_factory=dict)
    """Added to the small base environment of every executor. Values are kept in the cluster."""
    working_directory: str = ""
    """Where the service starts; a folder of the node's own if empty."""
    description: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    url: str = ""
    """Where the service's package or its documentation is. Kept and shown; nothing is fetched from there."""
    image: str = ""
    """The container image of the service. Kept and shown; services are started as processes of their node."""
    input_schema: Schema = Field(default_factory=dict)
    """A JSON schema of the inputs of tasks, for those who call the service, such as `Session.typed_as_published`.

    Empty: nothing is said about them.
    """
    output_schema: Schema = Field(default_factory=dict)
    """The same of outputs."""
    common_data_schema: Schema = Field(default_factory=dict)
    """The same of a session's common data."""
    max_instances: int = Field(default=defaults.MAX_INSTANCES, ge=1, le=10_000)
    """The most executors that one session may have."""
    min_instances: int = Field(default=defaults.MIN_INSTANCES, ge=0, le=10_000)
    """Executors that a session has from its creation to its end."""
    delay_release_s: float = Field(default=defaults.DELAY_RELEASE_S, ge=0, le=7 * 24 * 3600, allow_inf_nan=False)
    """For how long an executor with nothing to do stays with its session."""
    concurrency: int = Field(default=defaults.CONCURRENCY, ge=1, le=1000)
    """Tasks that one executor runs at once."""
    session_retry_limit: int = Field(default=defaults.SESSION_RETRY_LIMIT, ge=1, le=1000)
    """Attempts at entering a session before the session fails."""
    max_executors: int | None = Field(default=None, ge=1, le=1_000_000)
    """The most executors that all its sessions have together; ``None``: no such limit."""
    weight: float = Field(default=defaults.WEIGHT, ge=0.001, le=1000, allow_inf_nan=False)
    """Its sessions' part of a full cluster, in relation to that of others of the same priority."""
    placement: Placement = Placement.SPREAD
    """Which nodes its executors are placed on, of those that have room."""
    idle_timeout_s: float = Field(default=defaults.IDLE_TIMEOUT_S, ge=0, le=365 * 24 * 3600, allow_inf_nan=False)
    """An open session that has had no task for this long is closed; 0: never."""
    timeout_s: float = Field(default=defaults.TASK_TIMEOUT_S, ge=0.001, le=defaults.RESULT_AGE_S, allow_inf_nan=False)
    """How long one run of a task may take; then it is stopped and the task has failed."""
    expires_s: float = Field(default=0.0, ge=0, le=defaults.RESULT_AGE_S, allow_inf_nan=False)
    """A task that was not started for this long isn't started any more but fails; 0: it stays worth starting."""
    delay_s: float = Field(default=0.0, ge=0, le=defaults.RESULT_AGE_S, allow_inf_nan=False)
    """A task is not started before this has passed since it was stored."""
    max_attempts: int = Field(default=defaults.MAX_ATTEMPTS, ge=1, le=1000)
    """How often a task may run if the service raises; a lost executor is not counted here."""
    retry_on: tuple[str, ...] = ()
    """The classes of exceptions, named as in a task's ``error.type``, after which it may run again; empty: all."""
    retry_backoff_s: float = Field(default=defaults.RETRY_BACKOFF_S, ge=0, le=3600, allow_inf_nan=False)
    """Before the second run of a task; doubled before each further one, up to 5 s or this if it is more, jittered."""
    fresh_process: bool = False
    """Start every executor as a process of its own, never as a fork of one that has loaded the service before."""
    warm_instances: int = Field(default=0, ge=0, le=1000)
    """On each node: executors to have ready before there is a session for them, from the registration on.

    0: none of a service that can't be forked; of any other its template, and one executor after a session came."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.shim != "Log" and not self.command:
            raise ValueError("command: missing; it is the program that runs the service")
        if self.min_instances > self.max_instances:
            raise ValueError(f"min_instances {self.min_instances} is over max_instances {self.max_instances}")
        for text in (self.command, self.working_directory, *self.arguments, *self.environments.values()):
            if "\0" in text:
                raise ValueError(f"{text[:60]!r} holds a NUL character")
        for name in self.environments:
            if not name or "=" in name or "\0" in name:
                raise ValueError(f"environments: {name!r} is no name of a variable")
        return self


class SessionOptions(Input):
    """What a session asks for, beyond its application."""

    min_instances: int | None = Field(default=None, ge=0, le=10_000)
    """``None``: the application's."""
    max_instances: int | None = Field(default=None, ge=1, le=10_000)
    """``None``: the application's, which is also the most it may be."""
    priority: int = Field(default=defaults.PRIORITY, ge=0, le=1_000_000)
    """Higher is served first."""
    resources: Amounts = defaults.RESOURCES
    """Of each of its executors."""
    labels: Labels = Field(default_factory=dict)
    """What its creator calls it by; `list_sessions` finds it by them."""
    weight: float | None = Field(default=None, ge=0.001, le=1000, allow_inf_nan=False)
    """Its part of a full cluster, in relation to that of others of its priority; ``None``: the application's."""
    idle_timeout_s: float | None = Field(default=None, ge=0, le=365 * 24 * 3600, allow_inf_nan=False)
    """It is closed when it has had no task for this long; 0: never. ``None``: the application's."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (
            self.min_instances is not None
            and self.max_instances is not None
            and self.min_instances > self.max_instances
        ):
            raise ValueError(f"min_instances {self.min_instances} is over max_instances {self.max_instances}")
        return self


class ApplicationRecord(Record):
    """An application as it is registered. Written by the control API."""

    name: ApplicationName
    spec: ApplicationSpec
    state: ApplicationState = ApplicationState.ENABLED
    created: float
    """Unix seconds."""
    updated: float = 0.0
    """When its specification was last changed, Unix seconds; 0 if never."""


class SessionRecord(Record):
    """A session. Written by the scheduler; clients watch it."""

    id: SessionId
    application: ApplicationName
    options: SessionOptions = Field(default_factory=SessionOptions)
    state: SessionState = SessionState.OPEN
    settled: bool = False
    """Every task of an ended session has its record."""
    close_mode: CloseMode = CloseMode.CLOSE
    """Once it is closing: what becomes of its tasks."""
    reason: str = ""
    """Why it failed, or was closed by the cluster; after the first line, what is there to help finding out."""
    code: str = ""
    """With ``reason``: which kind it is, a `flame.protocol.codes.ReasonCode`."""
    created: float
    ended: float = 0.0
    idle_since: float = 0.0
    """When its last executor left, Unix seconds; 0 if it never had one."""
    common_data_key: str = ""
    """Where its common data is; empty if it has none."""
    common_data_version: int = 0
    """How often that was changed since the session was created."""
    credentials_key: str = ""
    """Where its credentials are; empty if it has none."""
    epoch: int = 0
    """How often it was bound; part of its consumer's name."""
    bind_failures: int = 0
    """Attempts at entering it that failed in a row."""
    succeeded: int = 0
    """Records written by executors that have left, by outcome, and by the control side."""
    failed: int = 0
    cancelled: int = 0
    counted: tuple[str, ...] = ()
    """Executors that are counted above although their bindings may still be there."""
    strays: dict[str, int] = Field(default_factory=dict)
    """Executors that were given up and may still live: up to which sequence of the result stream each is counted."""
    writer: str = ""
    """The scheduler that is writing records of its tasks, which are not counted yet; empty if none is."""
    written_from: int = 0
    """With ``writer``: what it writes is behind this sequence of the result stream."""

    @classmethod
    def _shared(cls, fields: dict[str, Any]) -> dict[str, Any]:
        options, application = fields.get("options"), fields.get("application")
        if isinstance(options, dict):
            fields["options"] = _known_options(options)
        if isinstance(application, str):
            fields["application"] = sys.intern(application)
        return fields


_OPTIONS: Final[dict[bytes, SessionOptions]] = {}
_OPTIONS_MOST: Final = 256


def _known_options(fields: dict[str, Any]) -> SessionOptions:
    """Return one object for all sessions that ask for the same."""
    key = pack(fields)
    options = _OPTIONS.get(key)
    if options is None:
        if len(_OPTIONS) >= _OPTIONS_MOST:
            _OPTIONS.clear()
        options = _OPTIONS[key] = SessionOptions.model_validate(fields, extra="ignore")
    return options


class NodeRecord(Record):
    """A node. Written by its executor manager at every heartbeat."""

    name: NodeName
    hostname: str
    arch: str
    os: str
    capacity: Amounts
    started: float
    memory_by: str = ""
    """How executors are held to the memory that they asked for: ``cgroup2``, ``cgroup1``, ``watch``, or ``none``."""
    cpu_by: str = ""
    """The same of processors: ``cgroup2``, ``cgroup1``, ``affinity``, or ``none``."""
    beat: int = 0
    """Rises with every heartbeat, so that a reader sees it change."""
    stopping: bool = False
    """The manager is leaving: nothing new is placed there."""
    application: str = ""
    """The one application that is served there, by a process that somebody has started by hand; empty: any is."""
    max_executors: int = 0
    """With ``application``: so many executors at most, whatever they ask for; 0: no limit."""


class BindingRecord(Record):
    """That one executor is to serve one session on one node. Written by the scheduler, carried out by the manager."""

    executor: str
    node: NodeName
    application: ApplicationName
    session: SessionId
    epoch: int
    consumer: str
    fence: int = 0
    """See `flame.protocol.supervision.Assignment`."""
    ack_wait_s: float = defaults.ACK_WAIT_S
    """For how long its consumer's deliveries are good after their last extension."""
    leave: bool = False
    """The executor is to leave its session and end."""
    force: bool = False
    """With ``leave``: its running tasks are stopped and recorded as cancelled."""
    resources: Amounts = defaults.RESOURCES
    """What it is given on the node."""
    max_executors: int = 0
    """How many the session's consumer was made for; 0 if that is not known."""
    application_revision: int = 0
    """Of its application's record, as the scheduler knew it: a manager that knows it too need not read it. 0: none."""
    common_data_key: str | None = None
    """Of the session's record, which a manager then need not read either; ``None``: unknown."""
    common_data_version: int = 0
    """With ``common_data_key``: of the same record."""
    credentials_key: str | None = None
    """The same; ``None``: unknown."""
    results_from: int = 0
    """Every record that this executor stores is behind this sequence of the result stream; 0 if that is not known."""
    created: float


class ExecutorRecord(Record):
    """An executor. Written by the manager that runs it."""

    id: str
    node: NodeName
    application: ApplicationName
    session: SessionId
    epoch: int
    state: ExecutorState
    pid: int = 0
    """Of the process that runs the service; 0 until it reported."""
    process_started: float = 0.0
    """When that process started, Unix seconds: with the pid, who it was, even after the pid is used again."""
    started: str = ""
    """How that was: ``forked`` from a template, ``warm``: started ahead, or ``fresh``; the last two with the reason."""
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    counted_to: int = 0
    """Every record of its up to this sequence of the result stream is counted above."""
    running: int = 0
    pending: int = 0
    """Tasks of its session that the broker held when it last knew."""
    idle: bool = False
    """It has had nothing to do since `updated`, or longer."""
    clean: bool = True
    """Once released: it left its session in order."""
    entered: bool = False
    """It entered its session."""
    reason: str = ""
    """Once released: why, if not in order."""
    code: str = ""
    """With ``reason``: which kind of end it was, a `flame.protocol.codes.ReasonCode`."""
    created: float
    updated: float


def decode_record(record_type: type[R], data: bytes) -> R | None:
    """Read a record, or ``None`` if the bytes are none: a foreign value must not stop a reader of a bucket."""
    try:
        return record_type.decode(data)
    except MalformedMessage:
        return None
