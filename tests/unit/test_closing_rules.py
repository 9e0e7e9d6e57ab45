"""What a session's record becomes when its end is asked for."""

from __future__ import annotations

import itertools

import pytest

from flame.protocol.codes import ReasonCode
from flame.protocol.records import SessionRecord
from flame.protocol.states import CloseMode, SessionState
from flame_services.scheduler.closing import closing

OPEN = SessionRecord(id="s", application="app", created=1.0)


@pytest.mark.parametrize("mode", CloseMode)
def test_an_open_session_begins_to_close_as_asked(mode: CloseMode) -> None:
    record = closing(OPEN, mode, "why", ReasonCode.IDLE_TIMEOUT)
    assert (record.state, record.close_mode) == (SessionState.CLOSING, mode)
    assert (record.reason, record.code) == ("why", "idle_timeout")


@pytest.mark.parametrize(("first", "then"), list(itertools.product(CloseMode, CloseMode)))
def test_of_two_modes_the_one_that_goes_further_counts(first: CloseMode, then: CloseMode) -> None:
    order = [CloseMode.DRAIN, CloseMode.CLOSE, CloseMode.FORCE]
    record = closing(closing(OPEN, first, "first"), then, "then", ReasonCode.UNREGISTERED)
    assert record.close_mode is max(first, then, key=order.index)
    assert (record.state, record.reason, record.code) == (SessionState.CLOSING, "first", "")


@pytest.mark.parametrize("state", [SessionState.CLOSED, SessionState.FAILED])
def test_one_that_has_ended_stays_as_it_is(state: SessionState) -> None:
    ended = OPEN.changed(state=state, close_mode=CloseMode.DRAIN)
    assert closing(ended, CloseMode.FORCE, "why", ReasonCode.UNREGISTERED) == ended
