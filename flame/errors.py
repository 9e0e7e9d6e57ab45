"""Every exception Flame raises, in one tree.

    FlameError
    ├── ConfigurationError            a setting, file or installation is wrong
    ├── InvalidArgument (ValueError)  a value was refused before anything was done
    │   ├── InvalidInput
    │   ├── InvalidName
    │   ├── MethodNotFound (AttributeError)
    │   ├── Unpicklable
    │   └── PayloadTooLarge
    ├── NotFound (LookupError)
    │   ├── ApplicationNotFound
    │   ├── SessionNotFound
    │   ├── TaskNotFound
    │   ├── ChunksGone
    │   ├── ValueGone
    │   ├── ExecutorNotFound
    │   └── NodeNotFound
    ├── Refused                       the cluster's state doesn't allow it; nothing was done
    │   ├── ApplicationExists
    │   ├── ApplicationDisabled
    │   ├── ApplicationInUse
    │   ├── SessionExists
    │   ├── SessionNotOpen
    │   │   └── SessionFailed
    │   ├── SpecMismatch
    │   ├── TaskEnded
    │   ├── StaleVersion
    │   ├── KeyReused
    │   └── QueueFull
    ├── TaskError                     a task ended, but not with an output; carries the task
    │   ├── TaskFailed
    │   │   ├── InstanceLost
    │   │   └── TaskTimeout
    │   ├── TaskCancelled
    │   ├── TaskExpired
    │   └── SchemaMismatch
    ├── MalformedMessage (ValueError) bytes on the wire are not what the protocol says
    │   └── UnsupportedVersion
    ├── IllegalTransition             a state machine was asked for a move that it doesn't have
    ├── WrongThread (RuntimeError)    called on a thread, or in an event loop, where it can't be
    ├── Unavailable                   may work later; the effect may have happened where the text says so
    │   ├── BrokerUnavailable
    │   └── SchedulerUnavailable
    ├── TimedOut (TimeoutError)       the caller's own time limit passed; the work goes on
    └── InternalError                 a fault of Flame itself

Messages name the thing, what was expected and what was got, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from flame.protocol.codes import ErrorCode

if TYPE_CHECKING:
    from flame.client.task import Task


class FlameError(Exception):
    """Base of everything Flame raises on purpose."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
    """The wire code of this kind of error."""


class ConfigurationError(FlameError):
    """A setting, file or installation is wrong. Nothing was done."""

    code = ErrorCode.INVALID_ARGUMENT


class InvalidArgument(FlameError, ValueError):
    """A value was refused before anything was done."""

    code = ErrorCode.INVALID_ARGUMENT


class InvalidInput(InvalidArgument):
    """A value is not what its type or its schema says; the text names every wrong field. Nothing was sent.

    A service may raise it too, for an input that it will never take: then the task fails with the code
    ``invalid_argument``, and isn't tried again.
    """

    code = ErrorCode.INVALID_ARGUMENT


class InvalidName(InvalidArgument):
    """A name can't be a subject token: it must match ``[A-Za-z0-9_-]{1,64}``."""

    code = ErrorCode.INVALID_NAME


class MethodNotFound(InvalidArgument, AttributeError):
    """The class of an object in the cluster has no method of this name. Other attributes can't be reached."""

    code = ErrorCode.INVALID_ARGUMENT


class Unpicklable(InvalidArgument):
    """A function, an argument or a result can't be taken to another process; the text names it, and what of it.

    Nothing was sent. Of a result it is what the function's call fails with.
    """

    code = ErrorCode.INVALID_ARGUMENT


class PayloadTooLarge(InvalidArgument):
    """An input, output or common data is over the limit of 1 GiB. Nothing was sent."""

    code = ErrorCode.PAYLOAD_TOO_LARGE


class NotFound(FlameError, LookupError):
    """There is no such thing in this cluster."""


class ApplicationNotFound(NotFound):
    """No application of this name is registered."""

    code = ErrorCode.APPLICATION_NOT_FOUND


class SessionNotFound(NotFound):
    """No session of this id exists, or its record has aged out."""

    code = ErrorCode.SESSION_NOT_FOUND


class TaskNotFound(NotFound):
    """The session has no task of this id, or its result has aged out."""

    code = ErrorCode.TASK_NOT_FOUND


class ChunksGone(NotFound):
    """What a task emitted is not kept any more, or not from the start: it is too old, or there is too much of others.

    The task itself is not affected: see its output.
    """

    code = ErrorCode.TASK_NOT_FOUND


class ValueGone(NotFound):
    """A large input, output or common data is not kept any more, or not all of it: the text names what is missing.

    Outputs are kept as long as results, inputs and common data until their session has ended.
    """

    code = ErrorCode.VALUE_GONE

    def __init__(self, message: str, task: Task | None = None) -> None:
        """Keep beside the message the finished task whose output it was, if it was one."""
        super().__init__(message)
        self.task = task


class ExecutorNotFound(NotFound):
    """The cluster has no executor of this id: it has ended and its record is gone, or it never was."""

    code = ErrorCode.EXECUTOR_NOT_FOUND


class NodeNotFound(NotFound):
    """No node of this name has registered with the cluster."""

    code = ErrorCode.NODE_NOT_FOUND


class Refused(FlameError):
    """The cluster's present state doesn't allow it. Nothing was done."""


class ApplicationExists(Refused):
    """An application of this name is registered already."""

    code = ErrorCode.APPLICATION_EXISTS


class ApplicationDisabled(Refused):
    """The application takes no new sessions."""

    code = ErrorCode.APPLICATION_DISABLED


class ApplicationInUse(Refused):
    """The application has sessions that have not ended: close them first, or force it."""

    code = ErrorCode.APPLICATION_IN_USE


class SessionExists(Refused):
    """A session with this id exists, or existed and its results have not aged out."""

    code = ErrorCode.SESSION_EXISTS


class SessionNotOpen(Refused):
    """The session is closing or closed and takes no tasks."""

    code = ErrorCode.SESSION_NOT_OPEN


class SessionFailed(SessionNotOpen):
    """The session failed: its service could not be started or could not enter it. The text says why."""

    code = ErrorCode.SESSION_FAILED


class SpecMismatch(Refused):
    """The session is open with another specification than the one asked for."""

    code = ErrorCode.SPEC_MISMATCH


class TaskEnded(Refused):
    """A service emitted a chunk, or told of progress, when the task's run had ended or was told to end."""

    code = ErrorCode.INVALID_ARGUMENT


class StaleVersion(Refused):
    """Something was to be changed if it still has a version, and has another one. The text names both.

    Common data of a session, or a value of its state: read it again, and decide anew.
    """

    code = ErrorCode.STALE_VERSION


class KeyReused(Refused):
    """The key names a task of the session that was created with another input. Nothing was stored."""

    code = ErrorCode.KEY_REUSED


class QueueFull(Refused):
    """The application holds as many waiting tasks as it may. The task was not stored."""

    code = ErrorCode.QUEUE_FULL


class TaskError(FlameError):
    """A task ended without an output. ``task`` is the finished task."""

    def __init__(self, message: str, task: Task) -> None:
        """Keep the finished task beside the message."""
        super().__init__(message)
        self.task = task


class TaskFailed(TaskError):
    """The service raised for this task, or the task was given up; ``task.error.code`` says which.

    ``task_failed``: the service raised. ``session_failed``: it waited when its session failed. ``task_poisoned``: too
    many executors were lost while they ran it. ``out_of_memory``: its executor used more than its session asked for.
    ``payload_too_large``: its output is over the limit. ``value_gone``: its large input is not kept any more.
    ``queue_full``: the broker has no room for its large output. ``invalid_argument``: the service refuses its input.
    ``internal``: a fault of Flame itself.
    """

    code = ErrorCode.TASK_FAILED


class TaskTimeout(TaskFailed):
    """A run of the task took longer than its ``timeout_s``, or its application's, and was stopped.

    Not to be confused with `TimedOut`: that is the caller's own limit, after which the task goes on.
    """

    code = ErrorCode.TASK_TIMEOUT


class InstanceLost(TaskFailed):
    """The object whose method was called was lost with its executor, and with all that it had become.

    It is made anew by its constructor: calls made from now on go on with that one. This call was not run, or not to its
    end; what it did until then may have happened.
    """

    code = ErrorCode.TASK_FAILED


class TaskCancelled(TaskError):
    """The task was cancelled before it produced an output: by a client, or with its session."""

    code = ErrorCode.TASK_CANCELLED


class TaskExpired(TaskError):
    """The task was not started within its ``expires_s``; or its result is older than results are kept, and is gone."""

    code = ErrorCode.TASK_EXPIRED


class SchemaMismatch(TaskError):
    """A task succeeded, but its output is not of the type that this client expects; the text names every wrong field.

    Client and service were written for different types: compare them. ``task.output`` has the output as it came.
    """

    code = ErrorCode.INVALID_ARGUMENT


class MalformedMessage(FlameError, ValueError):
    """Bytes on the wire are not what the protocol says."""

    code = ErrorCode.INVALID_ARGUMENT


class UnsupportedVersion(MalformedMessage):
    """The other side speaks a newer wire format: upgrade this side."""

    code = ErrorCode.UNSUPPORTED_VERSION


class IllegalTransition(FlameError):
    """A state machine was asked for a move that its table doesn't have. Nothing was changed."""


class WrongThread(FlameError, RuntimeError):
    """Called on a thread, or in an event loop, where it can't be: the text says where it can. Nothing was done.

    A call of `flame.sync` on a thread that is needed for its answer would wait for itself; and connections, sessions
    and functions are used in the event loop that they were made in.
    """

    code = ErrorCode.INVALID_ARGUMENT


class Unavailable(FlameError):
    """The cluster can't do it now; the same call may work later."""

    code = ErrorCode.UNAVAILABLE


class BrokerUnavailable(Unavailable):
    """The broker can't be reached, or is no NATS server with JetStream."""


class SchedulerUnavailable(Unavailable):
    """The broker answers but no scheduler does. The request may have been carried out."""


class TimedOut(FlameError, TimeoutError):
    """The caller's own time limit passed. What was asked for goes on."""

    code = ErrorCode.UNAVAILABLE


class InternalError(FlameError):
    """A fault of Flame itself; the log of the program that answered has the details."""


_BY_CODE: dict[str, type[FlameError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        InvalidName,
        PayloadTooLarge,
        ApplicationNotFound,
        ApplicationExists,
        ApplicationDisabled,
        ApplicationInUse,
        SessionNotFound,
        SessionExists,
        SessionNotOpen,
        SessionFailed,
        SpecMismatch,
        StaleVersion,
        KeyReused,
        TaskNotFound,
        ValueGone,
        ExecutorNotFound,
        NodeNotFound,
        QueueFull,
        UnsupportedVersion,
        Unavailable,
        InternalError,
    )
}


def from_code(code: str, message: str) -> FlameError:
    """Return the exception for a wire code; a code of a newer version becomes a plain `FlameError`."""
    return _BY_CODE.get(code, FlameError)(message)
