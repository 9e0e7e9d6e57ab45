"""On which terms a task runs: pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.protocol import defaults
from flame.protocol.messages import TaskFault, TaskOptions
from flame.protocol.supervision import Assignment
from flame.service.terms import Terms, may_retry, retry_pause_s


def assignment(**fields: object) -> Assignment:
    return Assignment("app", "s", 1, "stream", "s-1", **fields)  # type: ignore[arg-type]


def test_what_a_task_does_not_say_is_its_applications() -> None:
    application = assignment(timeout_s=5.0, expires_s=6.0, delay_s=7.0, max_attempts=8)
    assert Terms.of(application) == Terms(5.0, 6.0, 7.0, 8)
    assert Terms.of(application, TaskOptions(timeout_s=1.0)) == Terms(1.0, 6.0, 7.0, 8)
    assert Terms.of(application, TaskOptions(expires_s=0, delay_s=0, max_attempts=1)) == Terms(5.0, 0, 0, 1)


def test_when_a_task_was_stored_matters_only_if_it_is_delayed_or_expires() -> None:
    assert not Terms.of(assignment()).timed
    assert Terms.of(assignment(), TaskOptions(delay_s=1)).timed
    assert Terms.of(assignment(), TaskOptions(expires_s=1)).timed
    assert not Terms.of(assignment(delay_s=1.0), TaskOptions(delay_s=0)).timed


def test_a_task_is_early_until_its_delay_is_over_and_expires_after_its_time() -> None:
    terms = Terms(0, expires_s=10.0, delay_s=3.0, max_attempts=1)
    assert terms.too_early_s(stored_at=100.0, now=101.0) == 2.0
    assert terms.too_early_s(stored_at=100.0, now=103.5) == 0.0
    assert not terms.expired(stored_at=100.0, now=110.0)
    assert terms.expired(stored_at=100.0, now=110.1)
    assert not Terms(0, 0, 0, 1).expired(stored_at=0.0, now=1e9)


@pytest.mark.parametrize(
    ("retry_on", "fault", "raised", "timeout", "again"),
    [
        ((), "ValueError", 0, False, True),
        ((), "ValueError", 1, False, True),
        ((), "ValueError", 2, False, False),
        (("KeyError",), "ValueError", 0, False, False),
        (("KeyError", "ValueError"), "ValueError", 0, False, True),
        ((), "TaskTimeout", 0, True, False),
        (("ValueError",), "TaskTimeout", 0, True, False),
        (("TaskTimeout",), "TaskTimeout", 0, True, True),
    ],
)
def test_which_runs_are_repeated(
    retry_on: tuple[str, ...], fault: str, raised: int, timeout: bool, again: bool
) -> None:
    application = assignment(max_attempts=3, retry_on=retry_on)
    found = may_retry(application, Terms.of(application), TaskFault("c", "m", fault), raised, timeout=timeout)
    assert found is again


def test_a_task_may_run_once_unless_somebody_says_otherwise() -> None:
    application = assignment()
    assert not may_retry(application, Terms.of(application), TaskFault("c", "m", "ValueError"), 0, timeout=False)
    options = Terms.of(application, TaskOptions(max_attempts=2))
    assert may_retry(application, options, TaskFault("c", "m", "ValueError"), 0, timeout=False)


@given(first_s=st.floats(0, 3600), raised=st.integers(1, 1000), chance=st.floats(0, 1), more=st.floats(0, 1))
def test_pauses_grow_up_to_a_limit(first_s: float, raised: int, chance: float, more: float) -> None:
    pause_s = retry_pause_s(first_s, raised, chance)
    most_s = max(first_s, defaults.BACKOFF_MAX_S)
    assert first_s / 2 <= pause_s <= most_s
    assert pause_s <= 2 ** (raised - 1) * first_s
    assert retry_pause_s(first_s, raised + 1, 0.0) >= retry_pause_s(first_s, raised, 0.0)
    assert retry_pause_s(first_s, raised, max(chance, more)) >= pause_s
