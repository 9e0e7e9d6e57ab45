"""Reasons, as users read them."""

from __future__ import annotations

import pytest

from flame.protocol.messages import TaskFault
from flame.protocol.states import ExecutorState
from flame_services.executor_manager import reasons


@pytest.mark.parametrize(
    ("status", "state", "code", "text"),
    [
        (3, ExecutorState.STARTING, "ended_early", "exited with status 3 before it was ready"),
        (-9, ExecutorState.STARTING, "ended_early", "killed by signal SIGKILL before it was ready"),
        (0, ExecutorState.IDLE, "ended_early", "exited with status 0 before it had a session"),
        (-9, ExecutorState.BOUND, "killed", "killed by signal SIGKILL while bound"),
        (-11, ExecutorState.BINDING, "killed", "killed by signal SIGSEGV while entering the session"),
        (-64, ExecutorState.BOUND, "killed", "killed by signal SIGRTMAX while bound"),
        (-50, ExecutorState.BOUND, "killed", "killed by signal 50 while bound"),
        (137, ExecutorState.BOUND, "exited", "exited with status 137 (as after SIGKILL) while bound"),
        (128, ExecutorState.BOUND, "exited", "exited with status 128 while bound"),
        (0, ExecutorState.UNBINDING, "exited", "exited with status 0 while leaving the session"),
        (
            reasons.UNKNOWN,
            ExecutorState.BOUND,
            "exited",
            "ended while bound; how is not known, its template being gone",
        ),
    ],
)
def test_how_a_process_ended(status: int, state: ExecutorState, code: str, text: str) -> None:
    assert reasons.ended_by_itself(status, state) == (code, text)


def test_what_was_raised_needs_no_type_or_traceback() -> None:
    assert reasons.enter_failed(TaskFault("c", "text")) == ("enter_failed", "text")
    assert reasons.enter_failed(TaskFault("c", "", "KeyError")).text == "KeyError"


@pytest.mark.parametrize(
    ("used", "text"),
    [
        (310 * 2**20, "used 310m of memory, asked for 128m"),
        (128 * 2**20 + 1, "used 129m of memory, asked for 128m"),
        (0, "used more memory, asked for 128m"),
    ],
)
def test_how_much_memory_was_used(used: int, text: str) -> None:
    assert reasons.out_of_memory(used, 128 * 2**20) == ("out_of_memory", text)


def test_a_reason_may_have_a_tail() -> None:
    reason = reasons.not_ready(5).with_tail("last\nwords")
    assert reason.text == "not ready within 5 s\nthe end of its stderr:\nlast\nwords"
    assert reasons.not_ready(5).with_tail("") == ("not_ready", "not ready within 5 s")


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
