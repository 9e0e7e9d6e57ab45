"""Every subject, stream, bucket, key and consumer name. Nothing else in the code spells one.

A *token* is one part of a subject between dots. Names that users choose become tokens, so they are checked
here, at the edge: what NATS gives a meaning to (``.``, ``*``, ``>``, blanks) can never get in.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from flame.errors import InvalidName, MalformedMessage

MAX_TOKEN: Final = 64
MAX_APPLICATION: Final = 48
"""Shorter than a token, since minted session ids are ``<application>-<6 characters>``."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_REPLACED = re.compile(r"[^A-Za-z0-9_-]+", re.ASCII)


def check_token(what: str, value: object, limit: int = MAX_TOKEN) -> str:
    """Return ``value`` if it can be one token of a subject, otherwise raise `InvalidName` naming ``what``."""
    if isinstance(value, str) and len(value) <= limit and _TOKEN.fullmatch(value):
        return value
    raise InvalidName(
        f"{what} {_shown(value)} is not a legal name:"
        f" expected 1 to {limit} characters out of A-Z, a-z, 0-9, '_' and '-'"
    )


def is_token(text: str) -> bool:
    """Whether a text can be one token of a subject."""
    return _TOKEN.fullmatch(text) is not None


def check_application(value: object) -> str:
    """Return ``value`` if it is a legal application name, otherwise raise `InvalidName`."""
    return check_token("application", value, MAX_APPLICATION)


def to_token(text: str) -> str:
    """Turn any text, such as a host name with dots, into a legal token."""
    return _REPLACED.sub("-", text).strip("-")[:MAX_TOKEN] or "unnamed"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- Tasks and what happens to them


def task(application: str, session: str, task_id: str) -> str:
    """Where a task waits until it is acknowledged."""
    return f"flame.task.{application}.{session}.{task_id}"


def result(application: str, session: str, task_id: str) -> str:
    """Where a task's one terminal record is stored."""
    return f"flame.result.{application}.{session}.{task_id}"


def event(application: str, session: str, task_id: str, kind: str) -> str:
    """Where a task's notifications are heard: ``done`` for a stored record, ``running`` and ``progress`` live."""
    return f"flame.event.{application}.{session}.{task_id}.{kind}"


def chunk(application: str, session: str, task_id: str) -> str:
    """Where what a task emits while it runs is stored, chunk by chunk."""
    return f"flame.chunk.{application}.{session}.{task_id}"


IN: Final = "in"
"""The side of a session's large values that is inputs and common data: they go with the session."""
OUT: Final = "out"
"""The side that is outputs: they are kept as long as results."""


def blob(application: str, session: str, side: str, value: str, part: int | str) -> str:
    """Where one part of a large value is stored, numbered from 0; ``side`` is `IN` or `OUT`."""
    return f"flame.blob.{application}.{session}.{side}.{value}.{part}"


def session_blobs(application: str, session: str, side: str) -> str:
    """All parts of a session's large values of one side."""
    return f"flame.blob.{application}.{session}.{side}.*.*"


def all_blobs(application: str) -> str:
    """All parts of an application's large values."""
    return f"flame.blob.{application}.*.*.*.*"


def session_tasks(application: str, session: str) -> str:
    """All waiting tasks of a session."""
    return f"flame.task.{application}.{session}.*"


def session_results(application: str, session: str) -> str:
    """All terminal records of a session."""
    return f"flame.result.{application}.{session}.*"


def session_task_events(application: str, session: str) -> str:
    """Everything that happens to the tasks of a session."""
    return f"flame.event.{application}.{session}.*.*"


class TaskAddress(NamedTuple):
    """Which task a task, result or event subject is about."""

    application: str
    session: str
    task: str


def parse_task(subject: str) -> TaskAddress:
    """Return whose task a ``flame.task.…`` subject is; raise `MalformedMessage` for any other."""
    return _parse(subject, "task", 5)


def stored_session(subject: str) -> str:
    """Return the session of a task that is stored, legal or not: whatever a client wrote there must be got rid of."""
    return subject.split(".")[3]


def stored_value(subject: str) -> tuple[str, str]:
    """Return the session of a part of a large value, and the value's id."""
    parts = subject.split(".")
    return parts[3], parts[5]


def parse_result(subject: str) -> TaskAddress:
    """Return whose record a ``flame.result.…`` subject is; raise `MalformedMessage` for any other."""
    return _parse(subject, "result", 5)


def parse_event(subject: str) -> tuple[TaskAddress, str]:
    """Return whose event a ``flame.event.…`` subject is, and its kind."""
    return _parse(subject, "event", 6), subject.rsplit(".", 1)[1]


def _parse(subject: str, noun: str, tokens: int) -> TaskAddress:
    parts = subject.split(".")
    if len(parts) != tokens or parts[0] != "flame" or parts[1] != noun or not all(map(_TOKEN.fullmatch, parts)):
        raise MalformedMessage(f"subject {_shown(subject)}: expected flame.{noun}.<application>.<session>.<task>…")
    return TaskAddress(parts[2], parts[3], parts[4])


# ---- Sessions, executors, control


def session_events(application: str, session: str) -> str:
    """Live notifications about a session; the sessions bucket is the truth."""
    return f"flame.session.{application}.{session}"


def all_session_events() -> str:
    """Live notifications about every session, its executors included."""
    return "flame.session.*.*"


def node_events(node: str) -> str:
    """Live notifications about a node; ``*`` for all."""
    return f"flame.node.{node}"


def application_events(application: str) -> str:
    """Live notifications about an application; ``*`` for all."""
    return f"flame.application.{application}"


def all_task_events() -> str:
    """Everything that happens to any task."""
    return "flame.event.*.*.*.*"


def control(application: str, session: str) -> str:
    """To a session's executors and their managers: report now, stop tasks; see `flame.protocol.supervision.Control`."""
    return f"flame.control.{application}.{session}"


def executor_report(node: str, executor: str) -> str:
    """Where an executor reports to the manager that started it, by request and reply."""
    return f"flame.executor.{node}.{executor}"


def executor_reports(node: str) -> str:
    """All reports to one node's manager."""
    return f"flame.executor.{node}.*"


def log(application: str, session: str, executor: str) -> str:
    """What an executor's service wrote to its standard streams."""
    return f"flame.log.{application}.{session}.{executor}"


class LogAddress(NamedTuple):
    """Whose output it is."""

    application: str
    session: str
    executor: str


def parse_log(subject: str) -> LogAddress:
    """Return whose output a ``flame.log.…`` subject is; raise `MalformedMessage` for any other."""
    return LogAddress(*_parse(subject, "log", 5))


API_SERVICE: Final = "flame"
API_PREFIX: Final = "flame.api"


def api(verb: str) -> str:
    """A verb of the control API, answered by any scheduler."""
    return f"{API_PREFIX}.{verb}"


# ---- Streams, consumers, buckets


def task_stream(application: str) -> str:
    """The stream that holds an application's waiting and running tasks."""
    return f"flame-task-{application}"


def result_stream(application: str) -> str:
    """The stream that holds an application's terminal records."""
    return f"flame-result-{application}"


def chunk_stream(application: str) -> str:
    """The stream that holds what an application's tasks emitted while they ran."""
    return f"flame-chunk-{application}"


def blob_stream(application: str) -> str:
    """The stream that holds the parts of an application's large values."""
    return f"flame-blob-{application}"


def log_stream(application: str) -> str:
    """The stream that holds what an application's services wrote."""
    return f"flame-log-{application}"


def consumer(session: str, epoch: int) -> str:
    """The consumer that a session's executors share during one epoch of its binding."""
    return f"{session}-{epoch}"


def consumer_session(name: str) -> tuple[str, int]:
    """Return the session and epoch in a consumer's name; raise `MalformedMessage` for a foreign name."""
    session, dash, epoch = name.rpartition("-")
    if not dash or not session or not (epoch.isascii() and epoch.isdigit()):
        raise MalformedMessage(f"consumer {_shown(name)}: expected <session>-<epoch>")
    return session, int(epoch)


APPLICATIONS: Final = "flame-applications"
SESSIONS: Final = "flame-sessions"
COMMON_DATA: Final = "flame-common"
NODES: Final = "flame-nodes"
EXECUTORS: Final = "flame-executors"
BINDINGS: Final = "flame-bindings"
ATTEMPTS: Final = "flame-attempts"
LEASES: Final = "flame-leases"
CREDENTIALS: Final = "flame-credentials"
STATE: Final = "flame-state"


def executor_key(node: str, executor: str) -> str:
    """The key of an executor, in the bindings and in the executors bucket."""
    return f"{node}.{executor}"


def node_executors(node: str) -> str:
    """All executor keys of one node."""
    return f"{node}.*"


def task_key(task_subject: str) -> str:
    """The key of a task in buckets and ledgers: ``<application>.<session>.<task>``."""
    return task_subject.removeprefix("flame.task.")


def common_data_key(session: str, version: str) -> str:
    """The key of one version of a session's common data; the session's record names the one in force."""
    return f"{session}.{version}"


_REFERENCE: Final = ".ref"


def common_data_ref_key(application: str, token: str) -> str:
    """The key of a reference to a session's common data, where that is too large for the bucket."""
    return common_data_key(application, token) + _REFERENCE


def is_reference(key: str) -> bool:
    """Whether a key of common data is that of a reference."""
    return key.endswith(_REFERENCE)


def credentials_key(application: str, token: str) -> str:
    """The key of a session's credentials, which its record names."""
    return f"{application}.{token}"


MAX_STATE_KEY: Final = 128


def state_key(session: str, key: object) -> str:
    """The key of one value of a session's state. Sessions' ids have no dot, so one never reaches another's.

    ``key`` is any text of 1 to 128 characters; raises `InvalidName` for anything else.
    """
    if not isinstance(key, str) or not 0 < len(key) <= MAX_STATE_KEY:
        raise InvalidName(f"state: key {_shown(key)}: expected a text of 1 to {MAX_STATE_KEY} characters")
    try:
        return f"{session}.{quote(key, safe='').translate(_TO_KEY)}"
    except UnicodeEncodeError:
        raise InvalidName(f"state: key {_shown(key)}: is no text that UTF-8 could hold") from None


def session_state(session: str) -> str:
    """Every key of one session's state."""
    return f"{session}.>"


def parse_state_key(key: str) -> str:
    """Return which value of its session's state a key of the bucket is."""
    return unquote(key.partition(".")[2].replace("=", "%"))


_TO_KEY: Final = {ord("%"): "=", ord("."): "=2E", ord("~"): "=7E"}
"""From what ``quote`` makes of a text to what a key of a bucket may consist of."""
