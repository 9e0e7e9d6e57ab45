"""Error codes: what a control API reply or a task's record says went wrong.

A code is part of the wire format and never changes its meaning. `flame.errors` has an exception for each.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Why something was refused or failed."""

    INVALID_ARGUMENT = "invalid_argument"
    """A value is malformed, of the wrong type or out of range."""
    INVALID_NAME = "invalid_name"
    """A name is not a legal subject token."""
    PAYLOAD_TOO_LARGE = "payload_too_large"
    """An input, output or common data is over the inline limit."""
    APPLICATION_NOT_FOUND = "application_not_found"
    APPLICATION_EXISTS = "application_exists"
    APPLICATION_DISABLED = "application_disabled"
    APPLICATION_IN_USE = "application_in_use"
    """It still has sessions that have not ended."""
    SESSION_NOT_FOUND = "session_not_found"
    SESSION_EXISTS = "session_exists"
    SESSION_NOT_OPEN = "session_not_open"
    """It is closing or closed."""
    SESSION_FAILED = "session_failed"
    """Its service could not be started or could not enter the session."""
    SPEC_MISMATCH = "spec_mismatch"
    """The session exists with another specification than the one asked for."""
    TASK_NOT_FOUND = "task_not_found"
    EXECUTOR_NOT_FOUND = "executor_not_found"
    NODE_NOT_FOUND = "node_not_found"
    TASK_FAILED = "task_failed"
    """The service raised, or the task was given up with its session."""
    TASK_CANCELLED = "task_cancelled"
    TASK_EXPIRED = "task_expired"
    """Neither waiting nor recorded: its result's age limit has passed."""
    QUEUE_FULL = "queue_full"
    """The application's task stream is at its limit."""
    UNSUPPORTED_VERSION = "unsupported_version"
    """The other side speaks a newer wire format."""
    UNAVAILABLE = "unavailable"
    """The cluster could not do it now; the same call may succeed later."""
    INTERNAL = "internal"
    """A fault of Flame itself; the scheduler's log has the details."""
