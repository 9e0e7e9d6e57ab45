"""Why an executor ended, in words: what users read as the reason of a failed session. Pure."""

from __future__ import annotations

import re
import signal
from typing import Final

from flame.protocol.messages import TaskFault
from flame.protocol.states import ExecutorState

TAIL_LINES: Final = 10
TAIL_BYTES: Final = 2048
UNKNOWN: Final = 256
"""Stands for the status of a process that ended while nobody could tell how: more than any status can be."""

_WHEN: Final = {
    ExecutorState.STARTING: "before it was ready",
    ExecutorState.IDLE: "before it had a session",
    ExecutorState.BINDING: "while entering the session",
    ExecutorState.BOUND: "while bound",
    ExecutorState.UNBINDING: "while leaving the session",
}
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def ended_by_itself(status: int, state: ExecutorState) -> str:
    """Say how a process ended that nobody ended; ``status`` is negative after a signal."""
    when = _WHEN.get(state, "")
    if status == UNKNOWN:
        return f"ended {when}; how is not known, its template being gone"
    if status < 0:
        return f"killed by signal {_signal(-status)} {when}"
    # A shell, or `uv run`, tells of its child's signal like this.
    as_after = f" (as after {_signal(status - 128)})" if 128 < status <= 128 + 31 else ""
    return f"exited with status {status}{as_after} {when}"


def service_ended(pid: int, state: ExecutorState) -> str:
    """Say that the service is gone, but not the program that started it."""
    return f"its service, process {pid}, ended {_WHEN.get(state, '')}; the command that started it did not"


def enter_failed(fault: TaskFault) -> str:
    """Say what ``on_session_enter`` raised; the traceback is on the lines after the first."""
    return "\n".join(filter(None, (_fault(fault), fault.traceback.rstrip())))


def leave_failed(fault: TaskFault) -> str:
    """Say what ``on_session_leave`` raised."""
    return f"leaving the session failed: {_fault(fault)}"


def with_tail(reason: str, tail: str) -> str:
    """Add what the process wrote last to standard error."""
    return f"{reason}; the end of its stderr:\n{tail}" if tail else reason


def last_lines(data: bytes) -> str:
    """Return the last lines of some output as plain text: no colours, no control characters."""
    text = data[-TAIL_BYTES:].decode("utf-8", "replace")
    if len(data) > TAIL_BYTES:
        text = text.lstrip("\ufffd")  # the rest of a character that was cut
    text = _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    lines = [line.rstrip() for line in text.strip().split("\n")]
    return "\n".join(lines[-TAIL_LINES:])


def _fault(fault: TaskFault) -> str:
    return ": ".join(filter(None, (fault.type, fault.message)))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
