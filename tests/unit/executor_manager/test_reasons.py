"""Reasons, as users read them."""

from __future__ import annotations

import pytest

from flame.protocol.messages import TaskFault
from flame.protocol.states import ExecutorState
from flame_services.executor_manager import reasons


@pytest.mark.parametrize(
    ("status", "state", "text"),
    [
        (3, ExecutorState.STARTING, "exited with status 3 before it was ready"),
        (-9, ExecutorState.BOUND, "killed by signal SIGKILL while bound"),
        (-11, ExecutorState.BINDING, "killed by signal SIGSEGV while entering the session"),
        (-64, ExecutorState.BOUND, "killed by signal SIGRTMAX while bound"),
        (-50, ExecutorState.BOUND, "killed by signal 50 while bound"),
        (137, ExecutorState.BOUND, "exited with status 137 (as after SIGKILL) while bound"),
        (128, ExecutorState.BOUND, "exited with status 128 while bound"),
        (0, ExecutorState.UNBINDING, "exited with status 0 while leaving the session"),
    ],
)
def test_how_a_process_ended(status: int, state: ExecutorState, text: str) -> None:
    assert reasons.ended_by_itself(status, state) == text


def test_what_was_raised_needs_no_type_or_traceback() -> None:
    assert reasons.enter_failed(TaskFault("c", "text")) == "text"
    assert reasons.enter_failed(TaskFault("c", "", "KeyError")) == "KeyError"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"\n\n  \n", ""),
        (b"one\r\ntwo  \n\n", "one\ntwo"),
        (b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07text\x00\x08", "red text"),
        (b"10%\r20%\r30%", "10%\n20%\n30%"),
        ("\n".join(f"line {n}" for n in range(30)).encode(), "\n".join(f"line {n}" for n in range(20, 30))),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_the_last_lines_are_plain_text(data: bytes, text: str) -> None:
    assert reasons.last_lines(data) == text


def test_the_last_lines_are_short_and_begin_with_a_whole_character() -> None:
    text = reasons.last_lines("é".encode() * 5000 + b"x")
    assert len(text.encode()) <= reasons.TAIL_BYTES
    assert set(text) == {"é", "x"}
