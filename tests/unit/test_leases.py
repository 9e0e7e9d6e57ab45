"""Which deliveries an executor may take for its own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.protocol import defaults
from flame.service.leases import Leases

ACK_WAIT_S = 10.0
CERTAIN_S = 8.0


def _held(*handles: str, now: float = 0.0) -> Leases:
    leases = Leases(ACK_WAIT_S)
    for handle in handles:
        leases.take(handle, now)
    return leases


def test_a_lease_is_held_while_that_is_certain() -> None:
    leases = _held("a")
    assert leases.holds("a", 0.0)
    assert leases.holds("a", CERTAIN_S - 0.001)
    assert not leases.holds("a", CERTAIN_S)
    assert not leases.holds("a", 1000.0)


def test_what_was_never_taken_is_not_held() -> None:
    assert not _held("a").holds("b", 0.0)


def test_a_lease_that_ended_is_not_held() -> None:
    leases = _held("a", "b")
    leases.end("a")
    leases.end("a")
    leases.end("never taken")
    assert not leases.holds("a", 0.0)
    assert leases.holds("b", 0.0)
    assert len(leases) == 1


def test_an_extended_lease_lasts_from_its_extension() -> None:
    leases = _held("a")
    assert list(leases.due(5.0, age_s=2.0)) == ["a"]
    assert leases.holds("a", 5.0 + CERTAIN_S - 0.001)
    assert not leases.holds("a", 5.0 + CERTAIN_S)


def test_a_young_lease_is_not_extended_yet() -> None:
    leases = _held("a")
    assert list(leases.due(1.9, age_s=2.0)) == []
    assert not leases.holds("a", CERTAIN_S)


def test_a_lease_that_may_have_run_out_is_forgotten_and_never_extended() -> None:
    leases = _held("a")
    assert list(leases.due(CERTAIN_S, age_s=2.0)) == []
    assert len(leases) == 0
    assert list(leases.due(CERTAIN_S + 1, age_s=0.0)) == []


def test_a_lease_whose_extension_could_not_be_sent_is_as_old_as_before() -> None:
    leases = _held("a", "b")
    sent: list[str] = []

    def extend(handle: str) -> None:
        if sent:
            raise ConnectionError(handle)
        sent.append(handle)

    with pytest.raises(ConnectionError):
        list(map(extend, leases.due(5.0, age_s=2.0)))
    (extended,) = sent
    (other,) = {"a", "b"} - {extended}
    assert leases.holds(extended, CERTAIN_S)
    assert not leases.holds(other, CERTAIN_S)


def test_a_lease_that_ends_while_its_extension_is_sent_stays_ended() -> None:
    leases = _held("a")
    for handle in leases.due(5.0, age_s=2.0):
        leases.end(handle)
    assert len(leases) == 0


def test_a_lease_may_be_taken_while_others_are_extended() -> None:
    leases = _held("a", "b")
    for handle in leases.due(5.0, age_s=2.0):
        leases.take(f"after {handle}", 5.0)
    assert len(leases) == 4


def test_everything_can_be_forgotten() -> None:
    leases = _held("a", "b")
    leases.forget_all()
    assert len(leases) == 0
    assert not leases.holds("a", 0.0)


def test_extensions_come_often_enough_to_keep_a_lease_certain() -> None:
    leases = Leases(defaults.ACK_WAIT_S)
    leases.take("a", 0.0)
    now = 0.0
    for _ in range(100):
        now += defaults.LEASE_EXTENSION_S
        assert list(leases.due(now, defaults.LEASE_EXTENSION_S)) == ["a"]


@given(st.lists(st.floats(0, 20), min_size=1, max_size=30))
def test_a_lease_is_held_exactly_until_a_gap_is_too_long(gaps: list[float]) -> None:
    leases = _held("a")
    now, last, alive = 0.0, 0.0, True
    for gap in gaps:
        now += gap
        alive = alive and now - last < CERTAIN_S
        assert leases.holds("a", now) == alive
        list(leases.due(now, age_s=0.0))
        last = now if alive else last
