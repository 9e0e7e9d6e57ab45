"""Lifecycles as tables. A move that a table doesn't have raises `IllegalTransition` and changes nothing.

A table maps a state and what happened to the next state. The diagrams of the documentation are drawn from
these tables, so a rule is written here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Generic, TypeVar

from flame.errors import IllegalTransition


class ApplicationState(StrEnum):
    """Whether an application takes new sessions."""

    ENABLED = "enabled"
    DISABLED = "disabled"


class ApplicationEvent(StrEnum):
    """What an operator does to an application."""

    ENABLE = "enable"
    DISABLE = "disable"


class SessionState(StrEnum):
    """How far a session's life is."""

    OPEN = "open"
    CLOSING = "closing"
    """Takes no new tasks; running ones finish, waiting ones get their records."""
    CLOSED = "closed"
    FAILED = "failed"
    """Its service could not enter it; every task has its record."""


class CloseMode(StrEnum):
    """What becomes of the tasks of a session that is closed. Each goes further than the one before it here."""

    DRAIN = "drain"
    """Waiting tasks run first."""
    CLOSE = "close"
    """Running tasks finish, waiting ones are cancelled."""
    FORCE = "force"
    """Running tasks are stopped, and cancelled like the waiting ones."""


class Placement(StrEnum):
    """Which of the nodes that have room get an executor."""

    SPREAD = "spread"
    """The one with the largest part free."""
    PACK = "pack"
    """The one with the least room that suffices, so that others stay free for large requests."""


class SessionEvent(StrEnum):
    """What happens to a session."""

    CLOSE = "close"
    """A client asked for its end, or it was idle for too long; once more, if that is to go further than before."""
    FAIL = "fail"
    """No executor could enter it."""
    SETTLED = "settled"
    """Every one of its tasks has a terminal record and no executor serves it."""


class TaskState(StrEnum):
    """How far a task's life is."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEED = "succeed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the task has its one record and nothing more will happen to it."""
        return self in _TERMINAL


_TERMINAL = frozenset({TaskState.SUCCEED, TaskState.FAILED, TaskState.CANCELLED})


class TaskEvent(StrEnum):
    """What happens to a task."""

    START = "start"
    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    LOST = "lost"
    """Its executor is gone: it waits again."""
    RETRY = "retry"
    """The service raised, and it may run again: it waits, for a while."""


class ExecutorState(StrEnum):
    """How far an executor's life is. It serves one session and is never given another."""

    STARTING = "starting"
    """Its process was started and has not reported yet."""
    IDLE = "idle"
    """Its process is ready and has no session yet."""
    BINDING = "binding"
    """``on_session_enter`` is running."""
    BOUND = "bound"
    """It takes tasks."""
    UNBINDING = "unbinding"
    """It takes no more tasks; running ones finish, then ``on_session_leave`` runs."""
    RELEASED = "released"
    """Its process is gone."""


class ExecutorEvent(StrEnum):
    """What happens to an executor."""

    READY = "ready"
    ASSIGN = "assign"
    ENTERED = "entered"
    LEAVE = "leave"
    GONE = "gone"
    """The process has ended, whatever the reason."""


class NodeState(StrEnum):
    """What a reader believes of a node, from when it last saw its heartbeat change."""

    READY = "ready"
    UNKNOWN = "unknown"
    """Heartbeats are missing: nothing new is placed there."""
    NOT_READY = "not ready"
    """Given up: its sessions are bound elsewhere."""


class NodeEvent(StrEnum):
    """What a reader sees of a node."""

    BEAT = "beat"
    MISSED = "missed"
    GIVEN_UP = "given up"


S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


class StateTable(Generic[S, E]):
    """The legal moves of one kind of thing."""

    def __init__(self, noun: str, initial: S, moves: dict[tuple[S, E], S]) -> None:
        """Name the thing and give its first state and its moves."""
        self.noun: Final = noun
        self.initial: Final = initial
        self.moves: Final[Mapping[tuple[S, E], S]] = MappingProxyType(moves)

    def next(self, state: S, event: E) -> S:
        """Return the state after ``event``, or raise `IllegalTransition`."""
        try:
            return self.moves[state, event]
        except KeyError:
            legal = ", ".join(sorted({e.value for s, e in self.moves if s == state})) or "nothing"
            raise IllegalTransition(
                f"{self.noun} is {state.value}: {event.value} is not possible, only {legal}"
            ) from None


APPLICATION: Final = StateTable[ApplicationState, ApplicationEvent](
    "application",
    ApplicationState.ENABLED,
    {
        (ApplicationState.ENABLED, ApplicationEvent.DISABLE): ApplicationState.DISABLED,
        (ApplicationState.DISABLED, ApplicationEvent.ENABLE): ApplicationState.ENABLED,
    },
)

SESSION: Final = StateTable[SessionState, SessionEvent](
    "session",
    SessionState.OPEN,
    {
        (SessionState.OPEN, SessionEvent.CLOSE): SessionState.CLOSING,
        (SessionState.OPEN, SessionEvent.FAIL): SessionState.FAILED,
        (SessionState.CLOSING, SessionEvent.CLOSE): SessionState.CLOSING,
        (SessionState.CLOSING, SessionEvent.FAIL): SessionState.FAILED,
        (SessionState.CLOSING, SessionEvent.SETTLED): SessionState.CLOSED,
    },
)

TASK: Final = StateTable[TaskState, TaskEvent](
    "task",
    TaskState.PENDING,
    {
        (TaskState.PENDING, TaskEvent.START): TaskState.RUNNING,
        (TaskState.PENDING, TaskEvent.CANCEL): TaskState.CANCELLED,
        (TaskState.PENDING, TaskEvent.FAIL): TaskState.FAILED,
        (TaskState.RUNNING, TaskEvent.SUCCEED): TaskState.SUCCEED,
        (TaskState.RUNNING, TaskEvent.FAIL): TaskState.FAILED,
        (TaskState.RUNNING, TaskEvent.CANCEL): TaskState.CANCELLED,
        (TaskState.RUNNING, TaskEvent.LOST): TaskState.PENDING,
        (TaskState.RUNNING, TaskEvent.RETRY): TaskState.PENDING,
    },
)

EXECUTOR: Final = StateTable[ExecutorState, ExecutorEvent](
    "executor",
    ExecutorState.STARTING,
    {
        (ExecutorState.STARTING, ExecutorEvent.READY): ExecutorState.IDLE,
        (ExecutorState.IDLE, ExecutorEvent.ASSIGN): ExecutorState.BINDING,
        (ExecutorState.BINDING, ExecutorEvent.ENTERED): ExecutorState.BOUND,
        (ExecutorState.BOUND, ExecutorEvent.LEAVE): ExecutorState.UNBINDING,
        (ExecutorState.STARTING, ExecutorEvent.GONE): ExecutorState.RELEASED,
        (ExecutorState.IDLE, ExecutorEvent.GONE): ExecutorState.RELEASED,
        (ExecutorState.BINDING, ExecutorEvent.GONE): ExecutorState.RELEASED,
        (ExecutorState.BOUND, ExecutorEvent.GONE): ExecutorState.RELEASED,
        (ExecutorState.UNBINDING, ExecutorEvent.GONE): ExecutorState.RELEASED,
    },
)

NODE: Final = StateTable[NodeState, NodeEvent](
    "node",
    NodeState.READY,
    {
        (NodeState.READY, NodeEvent.BEAT): NodeState.READY,
        (NodeState.READY, NodeEvent.MISSED): NodeState.UNKNOWN,
        (NodeState.UNKNOWN, NodeEvent.BEAT): NodeState.READY,
        (NodeState.UNKNOWN, NodeEvent.GIVEN_UP): NodeState.NOT_READY,
        (NodeState.NOT_READY, NodeEvent.BEAT): NodeState.READY,
    },
)
