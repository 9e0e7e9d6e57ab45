"""The control API: a verb is a subject, its request and its answer are MessagePack maps.

An answer holds either ``ok`` with the verb's result or ``error`` with a code and a text.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import Field, PlainSerializer, PlainValidator

from flame.credentials import NO_SECRETS, Secrets, check_secrets, revealed
from flame.errors import FlameError, MalformedMessage, from_code
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.records import (
    Amounts,
    ApplicationRecord,
    ApplicationSpec,
    ExecutorRecord,
    Input,
    Record,
    SessionOptions,
    SessionRecord,
)
from flame.protocol.resources import Resources
from flame.protocol.states import CloseMode, NodeState, SessionState, TaskState
from flame.protocol.values import ValueRef


class Verb(StrEnum):
    """What can be asked of the cluster."""

    INFO = "info"
    REGISTER_APPLICATION = "register_application"
    UPDATE_APPLICATION = "update_application"
    DISABLE_APPLICATION = "disable_application"
    ENABLE_APPLICATION = "enable_application"
    UNREGISTER_APPLICATION = "unregister_application"
    GET_APPLICATION = "get_application"
    LIST_APPLICATIONS = "list_applications"
    CREATE_SESSION = "create_session"
    OPEN_SESSION = "open_session"
    GET_SESSION = "get_session"
    LIST_SESSIONS = "list_sessions"
    CLOSE_SESSION = "close_session"
    UPDATE_COMMON_DATA = "update_common_data"
    GET_EXECUTOR = "get_executor"
    LIST_EXECUTORS = "list_executors"
    GET_NODE = "get_node"
    LIST_NODES = "list_nodes"
    CANCEL_TASKS = "cancel_tasks"
    LIST_TASKS = "list_tasks"
    LOOK_UP_TASKS = "look_up_tasks"


PAGE: Final = 1000
"""Things in one answer to a list, at most."""
LOOK_UP_LIMIT: Final = 1024
"""Tasks in one look-up, at most."""


def _credentials(given: object) -> Secrets:
    return check_secrets("credentials", given)


Credentials = Annotated[
    Secrets,
    PlainValidator(_credentials),
    PlainSerializer(revealed),
]
"""Of a session. What is wrong with some is said without showing any."""


def _reference(given: object) -> ValueRef:
    try:
        return given if isinstance(given, ValueRef) else ValueRef.from_fields(given)
    except MalformedMessage as error:
        raise ValueError(str(error)) from None


Reference = Annotated[ValueRef, PlainValidator(_reference), PlainSerializer(ValueRef.fields)]
"""To a large value."""


class Request(Input):
    """The arguments of a verb."""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        return pack({"v": VERSION, **self.model_dump(exclude_defaults=True)})


class Named(Request):
    """One application, session, executor or node."""

    name: str


class RegisterApplication(Request):
    """Register an application under a new name."""

    name: str
    spec: ApplicationSpec


class UpdateApplication(Request):
    """Give an application another specification."""

    name: str
    spec: ApplicationSpec


class UnregisterApplication(Request):
    """Remove an application, its waiting tasks and its results."""

    name: str
    force: bool = False
    """Even if sessions of it are open: they are ended first."""


class CreateSession(Request):
    """Open a new session."""

    application: str
    common_data: bytes = b""
    common_data_ref: Reference | None = None
    """Where it is, if it is too large for a message: stored under the session's ``id``, which is given then."""
    id: str | None = None
    """``None``: one is minted."""
    options: SessionOptions = Field(default_factory=SessionOptions)
    credentials: Credentials = Field(default_factory=lambda: NO_SECRETS, repr=False)
    """To its executors only."""
    delegations: Credentials = Field(default_factory=lambda: NO_SECRETS, repr=False)
    """The same, of what says on whose behalf they act."""


class OpenSession(Request):
    """Find an open session, or create it if ``create`` says how."""

    id: str
    create: CreateSession | None = None


class CloseSession(Request):
    """End a session; once it is closing, a mode that goes further than the present one still counts."""

    id: str
    mode: CloseMode = CloseMode.CLOSE


class UpdateCommonData(Request):
    """Give an open session other common data."""

    session: str
    data: bytes = b""
    data_ref: Reference | None = None
    """Where it is, if it is too large for a message."""
    expected_version: int | None = Field(default=None, ge=0)
    """Only if it has this one; ``None``: whichever it has."""
    token: str
    """Of this update alone, so that asking again changes nothing."""


class List(Request):
    """A page of a list, ordered by name."""

    after: str = ""
    """The last name of the page before."""
    limit: int = Field(default=PAGE, ge=1, le=PAGE)


class ListSessions(List):
    """A page of the sessions for which all that is given holds."""

    application: str | None = None
    state: SessionState | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    """They have each of these labels with this value."""


class ListExecutors(List):
    """A page of the executors for which all that is given holds."""

    session: str | None = None
    node: str | None = None


class ListTasks(List):
    """A page of a session's tasks, ordered by id."""

    application: str
    session: str


class LookUpTasks(Request):
    """What has become of some tasks of one session."""

    application: str
    session: str
    tasks: tuple[str, ...] = Field(max_length=LOOK_UP_LIMIT)


class CancelTasks(Request):
    """Give some tasks of one session up, whether they wait or run."""

    session: str
    tasks: tuple[str, ...] = Field(min_length=1, max_length=LOOK_UP_LIMIT)
    reason: str = Field(default="", max_length=1000)


class Info(Record):
    """What a cluster is."""

    version: str
    """Of the scheduler that answered."""
    scheduler: str
    nodes: int
    """Ready ones."""


class SessionInfo(Record):
    """A session with the counts of its tasks."""

    session: SessionRecord
    pending: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    waits_for: str = ""
    """Why it has fewer executors than it could use, such as ``needs gpu=1; no node has one``."""


class NodeInfo(Record):
    """A node as the scheduler believes it to be."""

    name: str
    hostname: str
    state: NodeState
    cpu: float
    memory: int
    gpu: int
    arch: str
    os: str
    executors: int
    used: Amounts = Resources()
    """What its executors were given of it."""
    memory_by: str = ""
    """See `NodeRecord`."""
    cpu_by: str = ""
    application: str = ""
    """The one application that is served there; empty: any is."""


class ApplicationPage(Record):
    """Some applications."""

    items: tuple[ApplicationRecord, ...]
    more: bool = False


class SessionPage(Record):
    """Some sessions."""

    items: tuple[SessionInfo, ...]
    more: bool = False


class ExecutorPage(Record):
    """Some executors."""

    items: tuple[ExecutorRecord, ...]
    more: bool = False


class NodePage(Record):
    """Some nodes."""

    items: tuple[NodeInfo, ...]
    more: bool = False


class TaskInfo(Record):
    """A task as the scheduler knows it."""

    id: str
    state: TaskState
    """Of an unfinished one `TaskState.RUNNING` is an inference: those that run are taken to be the oldest."""
    record: bytes = b""
    """The terminal record of a finished one, as stored."""


class TaskPage(Record):
    """Some tasks of one session."""

    items: tuple[TaskInfo, ...]
    more: bool = False


class TaskLooks(Record):
    """What became of the tasks asked for; those in neither map have expired or never were."""

    waiting: tuple[str, ...] = ()
    """Stored and not finished."""
    results: dict[str, bytes] = Field(default_factory=dict)
    """Their terminal records, as stored."""
    unread: tuple[str, ...] = ()
    """Those that did not fit in one answer: ask for them again."""
    digests: dict[str, bytes] = Field(default_factory=dict)
    """Of few tasks: the digests of those that wait and were created under a key."""


class TaskCancels(Record):
    """What became of the tasks that were to be cancelled."""

    states: dict[str, TaskState] = Field(default_factory=dict)
    """The terminal state of each: another than cancelled if it had ended before. Those not named here are not known."""


def answer_ok(result: Record | None) -> bytes:
    """Encode the answer of a request that was carried out."""
    return pack({"v": VERSION, "ok": {} if result is None else result.model_dump()})


def answer_error(error: FlameError) -> bytes:
    """Encode the answer of a request that was refused."""
    return pack({"v": VERSION, "error": {"code": error.code.value, "message": str(error)}})


def read_answer(data: bytes) -> dict[str, Any]:
    """Return what a request brought, or raise the error that it was answered with."""
    fields = unpack(data)
    error = fields.get("error")
    if isinstance(error, dict):
        raise from_code(str(error.get("code")), str(error.get("message")))
    result = fields.get("ok")
    if not isinstance(result, dict):
        raise MalformedMessage("answer: expected ok or error")
    return result
