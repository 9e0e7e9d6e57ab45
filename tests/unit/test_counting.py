"""Counts of tasks from a view and the streams, and which questions to the broker they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flame.broker.memory import MemoryServer
from flame.protocol import subjects, topology
from flame.protocol.messages import ResultRecord, TaskMessage
from flame.protocol.records import BindingRecord, ExecutorRecord, SessionRecord
from flame.protocol.states import ExecutorState, SessionState, TaskState
from flame_services.scheduler.counts import FEW, count_tasks
from flame_services.scheduler.tally import Tally, read_tallies, tally_lost
from flame_services.scheduler.view import View

X = ExecutorRecord(
    id="x", node="n", application="app", session="s", epoch=1, state=ExecutorState.RELEASED, created=1.0, updated=1.0
)
BOUND = BindingRecord(
    executor="x", node="n", application="app", session="s", epoch=1, consumer="s-1", created=1.0
)  # fmt: skip


class Asked:
    """A connection that notes what is asked of it."""

    def __init__(self, broker: Any) -> None:
        self._broker = broker
        self.questions: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.questions[name] += 1
        return getattr(self._broker, name)


@pytest.fixture
async def broker() -> AsyncIterator[Any]:
    made = MemoryServer().connect()
    for stream in topology.application_streams("app", 1):
        await made.ensure_stream(stream)
    yield Asked(made)
    await made.close()


async def store_results(broker: Any, executor: str, *states: TaskState) -> int:
    """Store records of new tasks; return where the stream ends."""
    last: int = (await broker.stream_state(subjects.result_stream("app"))).last_sequence
    for state in states:
        last += 1
        record = ResultRecord(state, executor=executor)
        await broker.store(subjects.result("app", "s", f"t{last}"), record.encode(), 5.0)
    return last


def session(name: str, **fields: Any) -> SessionRecord:
    return SessionRecord(id=name, application="app", created=1.0, **fields)


async def test_many_sessions_that_hold_nothing_cost_no_question(broker: Any) -> None:
    view = View()
    for number in range(3000):
        state = SessionState.CLOSED if number % 2 else SessionState.OPEN
        view.put_session(f"s{number}", session(f"s{number}", state=state, settled=bool(number % 2), succeeded=7), 1)
    infos = await count_tasks(broker, view, view.sessions.values())
    assert {(info.pending, info.running, info.succeeded) for info in infos} == {(0, 0, 7)}
    assert not broker.questions


async def test_those_that_hold_something_are_counted_together(broker: Any) -> None:
    view = View()
    for number in range(5 * FEW):
        put = view.put_session(f"s{number}", session(f"s{number}"), 1)
        assert put is not None
        if number % 2:
            put.demand = True
            for task in range(number % 3):
                await broker.store(subjects.task("app", f"s{number}", f"t{task}"), TaskMessage(b"").encode(), 5.0)
    broker.questions.clear()
    infos = await count_tasks(broker, view, view.sessions.values())
    assert [info.pending for info in infos] == [number % 3 if number % 2 else 0 for number in range(5 * FEW)]
    assert sum(broker.questions.values()) == 2


async def test_one_session_is_asked_for_whatever_is_known_of_it(broker: Any) -> None:
    view = View()
    view.put_session("s", session("s"), 1)
    await broker.store(subjects.task("app", "s", "t"), TaskMessage(b"").encode(), 5.0)
    [info] = await count_tasks(broker, view, view.sessions.values())
    assert info.pending == 1


async def test_an_executor_that_is_in_its_sessions_record_is_not_counted_twice(broker: Any) -> None:
    view = View()
    view.put_executor("n.x", X.changed(succeeded=3, failed=2, cancelled=1), 0.0)
    view.put_binding("n.x", BOUND)
    for counted, expected in (((), (13, 2, 1)), (("other",), (13, 2, 1)), (("x",), (10, 0, 0))):
        view.put_session("s", session("s", succeeded=10, counted=counted), 1)
        [info] = await count_tasks(broker, view, view.sessions.values())
        assert (info.succeeded, info.failed, info.cancelled) == expected


async def test_records_are_counted_by_who_signed_them(broker: Any) -> None:
    before = await store_results(broker, "x", TaskState.SUCCEED)
    await store_results(broker, "x", TaskState.SUCCEED, TaskState.FAILED)
    await store_results(broker, "", TaskState.CANCELLED, TaskState.FAILED)
    last = await store_results(broker, "y", TaskState.SUCCEED)
    reading = await read_tallies(broker, "app", "s", {"x": before, "": 0, "z": 0})
    assert reading.by_writer == {"x": Tally(1, 1, 0), "": Tally(0, 1, 1), "z": Tally()}
    assert reading.last == last


async def test_what_an_executor_did_not_report_is_added_to_what_it_did(broker: Any) -> None:
    counted_to = await store_results(broker, "x", TaskState.SUCCEED, TaskState.SUCCEED)
    await store_results(broker, "x", TaskState.CANCELLED)
    told = X.changed(succeeded=2, counted_to=counted_to)
    assert (await tally_lost(broker, [BOUND], {"x": told})).by_writer == {"x": Tally(2, 0, 1)}


async def test_of_one_that_does_not_say_up_to_where_it_counted_everything_is_read(broker: Any) -> None:
    await store_results(broker, "x", TaskState.SUCCEED, TaskState.SUCCEED, TaskState.FAILED)
    for told in (X, X.changed(succeeded=1), X.changed(succeeded=2, failed=1)):
        assert (await tally_lost(broker, [BOUND], {"x": told})).by_writer == {"x": Tally(2, 1, 0)}
    aged_out = X.changed(succeeded=5)
    assert (await tally_lost(broker, [BOUND], {"x": aged_out})).by_writer == {"x": Tally(5, 1, 0)}
    assert (await tally_lost(broker, [BOUND], {})).by_writer == {"x": Tally(2, 1, 0)}


async def test_nothing_is_found_of_an_application_that_is_gone(broker: Any) -> None:
    reading = await read_tallies(broker, "gone", "s", {"x": 3})
    assert (reading.by_writer, reading.last) == ({"x": Tally()}, 3)
