"""The rules of one executor's life."""

from __future__ import annotations

from typing import Any

import pytest

from flame.errors import IllegalTransition
from flame.protocol.codes import ReasonCode
from flame.protocol.messages import TaskFault
from flame.protocol.records import BindingRecord
from flame.protocol.states import ExecutorState
from flame.protocol.supervision import ExecutorReport
from flame_services.executor_manager import reasons
from flame_services.executor_manager.life import GO_S, SILENT_S, Life, Limits, notable
from flame_services.executor_manager.reasons import Reason

BINDING = BindingRecord(
    executor="e1", node="n1", application="app", session="s1", epoch=3, consumer="s1-3", created=1.0
)
LIMITS = Limits(ready_s=60, enter_s=300, leave_s=10)
FAULT = TaskFault("task_failed", "no key", "ValueError", "Traceback:\nValueError: no key")

IDLE, BINDING_STATE, BOUND, UNBINDING, RELEASED = (
    ExecutorState.IDLE,
    ExecutorState.BINDING,
    ExecutorState.BOUND,
    ExecutorState.UNBINDING,
    ExecutorState.RELEASED,
)


def report(state: ExecutorState, **fields: Any) -> ExecutorReport:
    found = ExecutorReport(state, 7)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def life_in(state: ExecutorState) -> Life:
    """Return an executor that has got so far in order."""
    life = Life(BINDING, LIMITS, 1.0)
    life.start(1.0)
    if state is not ExecutorState.STARTING:
        life.identify(7, 0.5)
        life.hear(report(IDLE), 2.0)
    if state in (BINDING_STATE, BOUND, UNBINDING):
        life.assign(2.0)
    if state in (BOUND, UNBINDING):
        life.hear(report(BOUND), 3.0)
    if state is UNBINDING:
        life.hear(report(UNBINDING, running=1), 4.0)
    assert life.state is state
    life.take_changes()
    return life


def because(text: str) -> Reason:
    return Reason(ReasonCode.STUCK, text)


def told(life: Life) -> list[ExecutorState]:
    return [record.state for record in life.take_changes()]


def limit(life: Life) -> tuple[float, str] | None:
    return None if life.deadline is None else (life.deadline.after_s, life.deadline.cause.text)


class TestInOrder:
    def test_every_state_is_told_once_and_each_step_has_its_limit(self) -> None:
        life = Life(BINDING, LIMITS, 1.0)
        life.start(1.0)
        assert told(life) == [ExecutorState.STARTING]
        assert limit(life) == (60, "not ready within 60 s")
        life.identify(7, 0.5)
        life.hear(report(IDLE), 2.0)
        assert limit(life) is None
        life.assign(2.0)
        assert told(life) == [IDLE, BINDING_STATE]
        assert limit(life) == (300, "on_session_enter took longer than 300 s")
        life.hear(report(BOUND), 3.0)
        assert limit(life) is None
        life.leaving = True
        life.hear(report(BOUND, running=1), 4.0)
        assert limit(life) is None, "running tasks may finish"
        life.hear(report(UNBINDING, running=1), 5.0)
        assert limit(life) is None
        life.hear(report(UNBINDING), 6.0)
        assert limit(life) == (10 + GO_S, "on_session_leave took longer than 10 s")
        life.hear(report(RELEASED, succeeded=4), 7.0)
        assert limit(life) == (GO_S, "did not end after it had left")
        life.end(0, "", 8.0)
        assert list(dict.fromkeys(told(life))) == [BOUND, UNBINDING, RELEASED]
        assert (life.record.clean, life.record.entered, life.record.reason) == (True, True, "")
        assert (life.record.pid, life.record.process_started, life.record.succeeded) == (7, 0.5, 4)
        assert limit(life) is None

    @pytest.mark.parametrize("state", [BINDING_STATE, BOUND, UNBINDING])
    def test_a_report_that_comes_twice_changes_nothing(self, state: ExecutorState) -> None:
        life = life_in(state)
        life.hear(report(state, running=int(state is UNBINDING)), 9.0)
        assert told(life) == []

    def test_being_ready_may_be_said_again_until_the_answer_arrives(self) -> None:
        life = life_in(BINDING_STATE)
        before = life.deadline
        life.hear(report(IDLE), 9.0)
        life.assign(9.0)
        assert told(life) == []
        assert life.deadline is before, "the time for entering runs from the first answer"

    def test_a_limit_is_not_set_anew_by_a_repeated_report(self) -> None:
        life = life_in(UNBINDING)
        life.hear(report(UNBINDING), 5.0)
        before = life.deadline
        life.hear(report(UNBINDING), 9.0)
        assert life.deadline is before

    @pytest.mark.parametrize(
        ("state", "reported"),
        [
            (ExecutorState.STARTING, BINDING_STATE),
            (ExecutorState.STARTING, BOUND),
            (ExecutorState.STARTING, UNBINDING),
            (IDLE, BOUND),
            (IDLE, UNBINDING),
            (BINDING_STATE, UNBINDING),
            (BOUND, IDLE),
            (BOUND, BINDING_STATE),
            (BOUND, ExecutorState.STARTING),
            (UNBINDING, BOUND),
        ],
    )
    def test_a_report_out_of_order_is_refused(self, state: ExecutorState, reported: ExecutorState) -> None:
        life = life_in(state)
        before = life.record
        with pytest.raises(IllegalTransition):
            life.hear(report(reported), 9.0)
        assert life.record is before


class TestLeaving:
    @pytest.mark.parametrize(
        ("state", "reminded"),
        [(ExecutorState.STARTING, False), (BINDING_STATE, True), (BOUND, True), (UNBINDING, False)],
    )
    def test_it_is_reminded_while_it_does_not_show_that_it_knows(self, state: ExecutorState, reminded: bool) -> None:
        life = life_in(state)
        life.leaving = True
        assert life.must_be_reminded is reminded

    def test_one_that_is_ready_only_now_must_go_at_once(self) -> None:
        life = life_in(ExecutorState.STARTING)
        life.leaving = True
        life.hear(report(IDLE), 2.0)
        assert limit(life) == (GO_S, "did not end when told to leave")
        life.end(0, "", 3.0)
        assert (life.record.clean, life.record.reason) == (True, "")

    def test_one_that_leaves_of_itself_is_leaving(self) -> None:
        life = life_in(BOUND)
        life.hear(report(UNBINDING), 5.0)
        assert life.leaving


class TestCounts:
    def test_are_told_only_when_they_change(self) -> None:
        life = life_in(BOUND)
        life.hear(report(BOUND, succeeded=3, running=1), 4.0)
        life.hear(report(BOUND, succeeded=3, running=1), 5.0)
        assert len(told(life)) == 1
        assert life.record.updated == 4.0

    def test_idleness_is_not_renewed_by_time_alone(self) -> None:
        life = life_in(BOUND)
        life.hear(report(BOUND, idle_s=1.0), 4.0)
        life.hear(report(BOUND, idle_s=6.0), 9.0)
        assert (life.record.idle, life.record.updated) == (True, 4.0)
        assert not life.is_busy

    def test_one_that_has_fallen_silent_is_busy(self) -> None:
        life = life_in(BOUND)
        life.hear(report(BOUND, idle_s=1.0), 4.0)
        busy = []
        for now in (4.0 + SILENT_S, 4.1 + SILENT_S):
            life.note_silence(now)
            busy.append(life.is_busy)
        assert busy == [False, True]
        assert not life.take_changes()[-1].idle

    def test_the_consumers_word_stands_until_the_executor_sees_something_new(self) -> None:
        life = life_in(BOUND)
        life.hear(report(BOUND, pending=50), 4.0)
        life.note_backlog(10, 5.0)
        life.hear(report(BOUND, pending=50), 6.0)
        assert life.record.pending == 10
        life.hear(report(BOUND, pending=49), 7.0)
        assert life.record.pending == 49

    def test_an_idle_one_has_no_backlog(self) -> None:
        life = life_in(BOUND)
        life.note_backlog(10, 5.0)
        life.hear(report(BOUND, idle_s=1.0), 6.0)
        assert life.record.pending == 0

    @pytest.mark.parametrize(
        ("old", "new", "is_notable"),
        [(0, 0, False), (0, 1, True), (1, 0, True), (100, 119, False), (100, 120, True), (100, 80, True), (1, 2, True)],
    )
    def test_a_backlog_is_told_if_it_changed_notably(self, old: int, new: int, is_notable: bool) -> None:
        assert notable(old, new) is is_notable
        life = life_in(BOUND)
        life.note_backlog(old, 4.0)
        life.take_changes()
        life.note_backlog(new, 5.0)
        assert bool(life.take_changes()) is is_notable


class TestTheEnd:
    @pytest.mark.parametrize(
        ("state", "status", "reason"),
        [
            (ExecutorState.STARTING, 3, "exited with status 3 before it was ready\nthe end of its stderr:\nwords"),
            (IDLE, 0, "exited with status 0 before it had a session\nthe end of its stderr:\nwords"),
            (BINDING_STATE, 1, "exited with status 1 while entering the session\nthe end of its stderr:\nwords"),
            (BOUND, -9, "killed by signal SIGKILL while bound\nthe end of its stderr:\nwords"),
            (UNBINDING, 0, "exited with status 0 while leaving the session\nthe end of its stderr:\nwords"),
        ],
    )
    def test_that_nobody_asked_for_is_not_clean(self, state: ExecutorState, status: int, reason: str) -> None:
        life = life_in(state)
        life.end(status, "words", 9.0)
        assert (life.record.clean, life.record.reason) == (False, reason)
        assert life.record.entered is (state in (BOUND, UNBINDING))
        assert life.state is RELEASED

    def test_after_a_failed_enter_tells_what_was_raised(self) -> None:
        life = life_in(BINDING_STATE)
        life.hear(report(BINDING_STATE, error=FAULT), 3.0)
        assert life.leaving
        assert not life.must_be_reminded
        assert limit(life) == (GO_S, "did not end after it had failed to enter")
        life.give_up(because("did not end after it had failed to enter"))
        life.end(-9, "noise", 9.0)
        assert life.record.reason == "ValueError: no key\nTraceback:\nValueError: no key"
        assert (life.record.clean, life.record.entered) == (False, False)

    def test_after_a_failed_leave_tells_what_was_raised(self) -> None:
        life = life_in(UNBINDING)
        life.hear(report(RELEASED, error=FAULT), 5.0)
        life.end(1, "noise", 9.0)
        assert life.record.reason == "leaving the session failed: ValueError: no key"
        assert not life.record.clean

    def test_by_our_limit_tells_which_and_the_last_words(self) -> None:
        life = life_in(ExecutorState.STARTING)
        life.give_up(because("not ready within 60 s"))
        life.give_up(because("something later"))
        life.end(-15, "warming up", 9.0)
        assert life.record.reason == "not ready within 60 s\nthe end of its stderr:\nwarming up"
        assert not life.record.clean

    def test_by_our_limit_is_not_made_good_by_leaving_afterwards(self) -> None:
        life = life_in(BINDING_STATE)
        life.give_up(because("on_session_enter took longer than 300 s"))
        life.hear(report(RELEASED), 8.0)
        life.end(0, "", 9.0)
        assert (life.record.clean, life.record.reason) == (False, "on_session_enter took longer than 300 s")

    def test_that_is_nobodys_fault_is_made_good_by_leaving_afterwards(self) -> None:
        life = life_in(BOUND)
        life.give_up(because("the executor manager was stopped"), blameless=True)
        life.hear(report(RELEASED), 8.0)
        life.end(0, "", 9.0)
        assert (life.record.clean, life.record.reason) == (True, "")

    @pytest.mark.parametrize(
        ("state", "clean"), [(ExecutorState.STARTING, True), (BINDING_STATE, True), (BOUND, False)]
    )
    def test_that_is_nobodys_fault_is_clean_if_nothing_was_entered(self, state: ExecutorState, clean: bool) -> None:
        life = life_in(state)
        life.give_up(because("the executor manager was stopped"), blameless=True)
        life.end(-15, "noise", 9.0)
        assert (life.record.clean, life.record.reason) == (clean, "the executor manager was stopped")

    def test_after_having_left_is_clean_however_it_comes(self) -> None:
        life = life_in(UNBINDING)
        life.hear(report(RELEASED), 5.0)
        life.give_up(because("did not end after it had left"))
        life.end(-9, "noise", 9.0)
        assert (life.record.clean, life.record.reason) == (True, "")


class TestAStartWithASession:
    def test_is_told_late_or_never(self) -> None:
        life = Life(BINDING, LIMITS, 1.0)
        life.identify(7, 0.5)
        life.start_with_session(2.0)
        assert told(life) == []
        assert life.state is BINDING_STATE
        assert limit(life) == (300, "on_session_enter took longer than 300 s")
        life.hear(report(BOUND), 3.0)
        assert told(life) == [BOUND]
        life.tell_entering(4.0)
        assert told(life) == []

    def test_is_told_when_entering_takes_its_time(self) -> None:
        life = Life(BINDING, LIMITS, 1.0)
        life.start_with_session(2.0)
        life.tell_entering(2.1)
        assert told(life) == [BINDING_STATE]

    def test_ends_as_any_other(self) -> None:
        life = Life(BINDING, LIMITS, 1.0)
        life.start_with_session(2.0)
        life.end(-9, "", 3.0)
        assert told(life) == [RELEASED]
        assert life.record.reason == "killed by signal SIGKILL while entering the session"


def test_how_it_was_started_is_told_in_so_many_words() -> None:
    life = Life(BINDING, LIMITS, 1.0)
    life.tell_start("fresh: " + "x" * 1000)
    life.start(1.0)
    [record] = life.take_changes()
    assert record.started == "fresh: " + "x" * 293


def test_an_end_that_nobody_saw() -> None:
    life = life_in(BOUND)
    life.end(reasons.UNKNOWN, "last words", 9.0)
    assert life.record.reason == (
        "ended while bound; how is not known, its template being gone\nthe end of its stderr:\nlast words"
    )
