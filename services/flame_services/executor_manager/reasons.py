"""Why an executor ended, as a code and in words: what users read as the reason of a failed session. Pure."""

from __future__ import annotations

import re
import signal
from typing import Final, NamedTuple

from flame.protocol.codes import ReasonCode
from flame.protocol.messages import TaskFault
from flame.protocol.states import ExecutorState

TAIL_LINES: Final = 10
TAIL_BYTES: Final = 2048
UNKNOWN: Final = 256
"""Stands for the status of a process that ended while nobody could tell how: more than any status can be."""


class Reason(NamedTuple):
    """Why an executor ended: for programs, and in words."""

    code: ReasonCode
    text: str

    def with_tail(self, tail: str) -> Reason:
        """Add what the process wrote last to standard error, on the lines after the first."""
        return self._replace(text=f"{self.text}\nthe end of its stderr:\n{tail}") if tail else self


_WHEN: Final = {
    ExecutorState.STARTING: "before it was ready",
    ExecutorState.IDLE: "before it had a session",
    ExecutorState.BINDING: "while entering the session",
    ExecutorState.BOUND: "while bound",
    ExecutorState.UNBINDING: "while leaving the session",
}
_EARLY: Final = (ExecutorState.STARTING, ExecutorState.IDLE)
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def ended_by_itself(status: int, state: ExecutorState) -> Reason:
    """Say how a process ended that nobody ended; ``status`` is negative after a signal."""
    when = _WHEN.get(state, "")
    if status == UNKNOWN:
        return Reason(_ended(state), f"ended {when}; how is not known, its template being gone")
    if status < 0:
        code = ReasonCode.ENDED_EARLY if state in _EARLY else ReasonCode.KILLED
        return Reason(code, f"killed by signal {_signal(-status)} {when}")
    # A shell, or `uv run`, tells of its child's signal like this.
    as_after = f" (as after {_signal(status - 128)})" if 128 < status <= 128 + 31 else ""
    return Reason(_ended(state), f"exited with status {status}{as_after} {when}")


def service_ended(pid: int, state: ExecutorState) -> Reason:
    """Say that the service is gone, but not the program that started it."""
    text = f"its service, process {pid}, ended {_WHEN.get(state, '')}; the command that started it did not"
    return Reason(_ended(state), text)


def enter_failed(fault: TaskFault) -> Reason:
    """Say what ``on_session_enter`` raised; the traceback is on the lines after the first."""
    text = "\n".join(filter(None, (_fault(fault), fault.traceback.rstrip())))
    return Reason(ReasonCode.ENTER_FAILED, text)


def leave_failed(fault: TaskFault) -> Reason:
    """Say what ``on_session_leave`` raised."""
    return Reason(ReasonCode.LEAVE_FAILED, f"leaving the session failed: {_fault(fault)}")


def not_ready(limit_s: float) -> Reason:
    """Say that the service did not report in time."""
    return Reason(ReasonCode.NOT_READY, f"not ready within {limit_s:g} s")


def enter_too_long(limit_s: float) -> Reason:
    """Say that ``on_session_enter`` did not end."""
    return Reason(ReasonCode.ENTER_FAILED, f"on_session_enter took longer than {limit_s:g} s")


def leave_too_long(limit_s: float) -> Reason:
    """Say that ``on_session_leave`` did not end."""
    return Reason(ReasonCode.LEAVE_FAILED, f"on_session_leave took longer than {limit_s:g} s")


def mute(limit_s: float) -> Reason:
    """Say that nothing was heard any more."""
    return Reason(ReasonCode.STUCK, f"it ran no task and did not report for {limit_s:g} s")


def out_of_memory(used: int, limit: int) -> Reason:
    """Say that more memory was used than was asked for; ``used`` of 0 is not known."""
    how_much = f"{mebibytes(used)} of memory" if used else "more memory"
    return Reason(ReasonCode.OUT_OF_MEMORY, f"used {how_much}, asked for {mebibytes(limit)}")


def mebibytes(amount: int) -> str:
    """Write an amount of memory in the unit that requests are mostly written in, rounded up."""
    return f"{-(-amount // 1024**2)}m"


def last_lines(data: bytes) -> str:
    """Return the last lines of some output as plain text: no colours, no control characters."""
    text = data[-TAIL_BYTES:].decode("utf-8", "replace")
    if len(data) > TAIL_BYTES:
        text = text.lstrip("\ufffd")  # the rest of a character that was cut
    text = _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n")))
    lines = [line.rstrip() for line in text.strip().split("\n")]
    return "\n".join(lines[-TAIL_LINES:])


def _ended(state: ExecutorState) -> ReasonCode:
    return ReasonCode.ENDED_EARLY if state in _EARLY else ReasonCode.EXITED


def _fault(fault: TaskFault) -> str:
    return ": ".join(filter(None, (fault.type, fault.message)))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
