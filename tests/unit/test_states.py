"""Lifecycles: every move that a table lists works, and no other does."""

from __future__ import annotations

from enum import StrEnum
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import IllegalTransition
from flame.protocol.states import (
    APPLICATION,
    EXECUTOR,
    NODE,
    SESSION,
    TASK,
    ApplicationEvent,
    ApplicationState,
    ExecutorEvent,
    ExecutorState,
    NodeEvent,
    NodeState,
    SessionEvent,
    SessionState,
    StateTable,
    TaskEvent,
    TaskState,
)

Table = StateTable[Any, Any]

TABLES: dict[str, tuple[Table, type[StrEnum], type[StrEnum], set[StrEnum]]] = {
    "application": (APPLICATION, ApplicationState, ApplicationEvent, set()),
    "session": (SESSION, SessionState, SessionEvent, {SessionState.CLOSED, SessionState.FAILED}),
    "task": (TASK, TaskState, TaskEvent, {TaskState.SUCCEED, TaskState.FAILED, TaskState.CANCELLED}),
    "executor": (EXECUTOR, ExecutorState, ExecutorEvent, {ExecutorState.RELEASED}),
    "node": (NODE, NodeState, NodeEvent, set()),
}
"""A table with its states, its events, and the states from which nothing leads."""

pairs = [
    (name, state, event) for name, (_, states, events, _) in TABLES.items() for state, event in product(states, events)
]


@pytest.mark.parametrize(("name", "state", "event"), pairs)
def test_a_listed_move_works_and_every_other_is_refused(name: str, state: StrEnum, event: StrEnum) -> None:
    table = TABLES[name][0]
    before = dict(table.moves)
    if (state, event) in table.moves:
        assert table.next(state, event) is table.moves[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"{name} is {state.value}: {event.value} is not possible, only"):
            table.next(state, event)
    assert dict(table.moves) == before


@pytest.mark.parametrize("name", TABLES)
def test_a_refusal_tells_what_is_possible(name: str) -> None:
    table, states, events, _ = TABLES[name]
    for state, event in product(states, events):
        if (state, event) not in table.moves:
            with pytest.raises(IllegalTransition) as refusal:
                table.next(state, event)
            possible = {e.value for s, e in table.moves if s == state}
            assert set(str(refusal.value).partition(" only ")[2].split(", ")) == (possible or {"nothing"})


@pytest.mark.parametrize("name", TABLES)
def test_every_state_is_reached(name: str) -> None:
    table, states, _, _ = TABLES[name]
    reached = {table.initial}
    while more := {after for (before, _), after in table.moves.items() if before in reached} - reached:
        reached |= more
    assert reached == set(states)


@pytest.mark.parametrize("name", TABLES)
def test_every_event_is_of_use(name: str) -> None:
    table, _, events, _ = TABLES[name]
    assert {event for _, event in table.moves} == set(events)


@pytest.mark.parametrize("name", TABLES)
def test_nothing_leads_out_of_a_last_state_and_out_of_every_other_something_does(name: str) -> None:
    table, states, _, last = TABLES[name]
    assert {state for state, _ in table.moves} == set(states) - last


@pytest.mark.parametrize("name", ["session", "task", "executor"])
def test_an_end_is_reached_from_everywhere(name: str) -> None:
    table, states, _, last = TABLES[name]
    ends = set(last)
    while more := {before for (before, _), after in table.moves.items() if after in ends} - ends:
        ends |= more
    assert ends == set(states)


@pytest.mark.parametrize("name", TABLES)
@given(st.data())
def test_a_life_is_a_walk_through_the_table(name: str, data: st.DataObject) -> None:
    table, states, events, last = TABLES[name]
    state = table.initial
    for event in data.draw(st.lists(st.sampled_from(list(events)), max_size=20)):
        try:
            state = table.next(state, event)
        except IllegalTransition:
            continue
        assert state in states
        if state in last:
            assert not any(before == state for before, _ in table.moves)


def test_a_table_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        SESSION.moves[SessionState.CLOSED, SessionEvent.CLOSE] = SessionState.OPEN  # type: ignore[index]


def test_a_task_is_terminal_exactly_where_its_table_ends() -> None:
    assert {state for state in TaskState if state.terminal} == TABLES["task"][3]


def test_an_executor_takes_tasks_only_after_it_entered_its_session() -> None:
    into_bound = {before for (before, _), after in EXECUTOR.moves.items() if after is ExecutorState.BOUND}
    assert into_bound == {ExecutorState.BINDING}


def test_an_executor_never_gets_a_second_session() -> None:
    assert not [
        1 for (before, _), after in EXECUTOR.moves.items() if after is ExecutorState.IDLE and before != "starting"
    ]


def test_a_process_can_end_at_any_time() -> None:
    living = set(ExecutorState) - {ExecutorState.RELEASED}
    assert {state for state, event in EXECUTOR.moves if event is ExecutorEvent.GONE} == living
