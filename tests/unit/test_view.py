"""The scheduler's view: what it makes of records as they come and go, in any order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flame.protocol import defaults
from flame.protocol.records import BindingRecord
from flame.protocol.resources import Resources
from flame.protocol.states import ExecutorState, NodeState, SessionState
from flame_services.scheduler.plan import plan
from flame_services.scheduler.view import View
from tests.support.simulation import rebuilt
from tests.unit.test_plan import APPLICATION, NOW, application, binding, executor, key_of, node, session

SESSIONS, NODES, EXECUTORS = ("s1", "s2", "s3"), ("n1", "n2"), ("x1", "x2", "x3", "x4")


class AnyOrder(RuleBasedStateMachine):
    """Records of everything come and go; the indexes of the view must never drift from what they index."""

    def __init__(self) -> None:
        super().__init__()
        self.view = View()
        self.revision = 0
        self.now = NOW + 200

    @rule(
        name=st.sampled_from(SESSIONS),
        state=st.sampled_from(SessionState),
        settled=st.booleans(),
        cpu=st.integers(1, 4),
    )
    def put_session(self, name: str, state: SessionState, settled: bool, cpu: int) -> None:
        self.revision += 1
        known = self.view.sessions.get(name)
        # What a session asks for is fixed when it is created.
        asks = known.record.options.resources if known else Resources(cpu=cpu / 4)
        record = session(name, state, settled=settled and state is not SessionState.OPEN, resources=asks)
        self.view.put_session(name, record, self.revision)

    @rule(name=st.sampled_from(SESSIONS))
    def drop_session(self, name: str) -> None:
        self.revision += 1
        self.view.put_session(name, None, self.revision)

    @rule(
        name=st.sampled_from(NODES),
        at=st.floats(0, 100),
        stopping=st.booleans(),
        serves=st.sampled_from(["", "", APPLICATION, "other"]),
    )
    def put_node(self, name: str, at: float, stopping: bool, serves: str) -> None:
        record = node(name, stopping=stopping, application=serves, max_executors=1)
        self.view.put_node(name, record, NOW + at)

    @rule(name=st.sampled_from(NODES))
    def drop_node(self, name: str) -> None:
        self.view.put_node(name, None, NOW)

    @rule(
        session_id=st.sampled_from(SESSIONS),
        place=st.sampled_from(NODES),
        name=st.sampled_from(EXECUTORS),
        leave=st.booleans(),
    )
    def put_binding(self, session_id: str, place: str, name: str, leave: bool) -> None:
        bound = binding(session_id, place, name, leave=leave)
        self.view.put_binding(key_of(bound), bound)

    @rule(place=st.sampled_from(NODES), name=st.sampled_from(EXECUTORS))
    def drop_binding(self, place: str, name: str) -> None:
        self.view.put_binding(f"{place}.{name}", None)

    @rule(place=st.sampled_from(NODES), name=st.sampled_from(EXECUTORS), state=st.sampled_from(ExecutorState))
    def put_executor(self, place: str, name: str, state: ExecutorState) -> None:
        bound = binding("s1", place, name)
        self.view.put_executor(key_of(bound), executor(bound, state), NOW)

    @rule(name=st.sampled_from(SESSIONS), demand=st.booleans())
    def find_demand(self, name: str, demand: bool) -> None:
        known = self.view.sessions.get(name)
        if known is not None:
            known.demand = demand
            self.view.touch(known)

    @rule(least=st.integers(0, 2), most=st.integers(2, 3), limit=st.none() | st.integers(1, 3))
    def put_application(self, least: int, most: int, limit: int | None) -> None:
        self.view.put_application(
            APPLICATION, application(min_instances=least, max_instances=most, max_executors=limit)
        )

    @rule(after_s=st.floats(0, 100))
    def begin_steps(self, after_s: float) -> None:
        self.now += after_s
        scratch = rebuilt(self.view)
        for view in (self.view, scratch):
            view.planned(plan(view, self.now))
        assert waits(self.view) == waits(scratch)

    @rule(name=st.sampled_from(SESSIONS))
    def finish_step(self, name: str) -> None:
        self.view.done(name)

    @rule(at=st.floats(0, 200))
    def age_nodes(self, at: float) -> None:
        self.view.age_nodes(NOW + at)

    @invariant()
    def a_session_knows_its_bindings(self) -> None:
        for name, known in self.view.sessions.items():
            assert known.bindings == {key: b for key, b in self.view.bindings.items() if b.session == name}

    @invariant()
    def a_node_knows_what_is_used(self) -> None:
        for name, known in self.view.nodes.items():
            placed: dict[str, BindingRecord] = {key: b for key, b in self.view.bindings.items() if b.node == name}
            assert set(known.bindings) == set(placed)
            assert known.used == sum_of(known.bindings.values())
            if not placed:
                assert known.used == Resources()
            for key, bound in placed.items():
                if bound.session in self.view.sessions:
                    assert known.bindings[key] == self.view.request_of(bound.session)

    @invariant()
    def only_known_sessions_are_looked_at(self) -> None:
        assert set(self.view.due(NOW + 1e9)) <= set(self.view.sessions)

    @invariant()
    def every_index_is_as_if_made_from_scratch(self) -> None:
        assert indexes(self.view) == indexes(rebuilt(self.view))

    @invariant()
    def a_plan_is_as_if_everything_was_looked_at(self) -> None:
        made, scratch = plan(self.view, self.now), plan(rebuilt(self.view), self.now)
        assert (made.steps, made.look_again_at) == (scratch.steps, scratch.look_again_at)


def indexes(view: View) -> dict[str, Any]:
    """Return whatever a view makes of records, for comparison with another one."""
    return {
        "nodes": {name: (rounded(n.used), n.bindings, n.pile_of) for name, n in view.nodes.items()},
        "piles": {
            name: {pile: (count, rounded(uses)) for pile, (count, uses) in n.piles.items()}
            for name, n in view.nodes.items()
        },
        "sessions": {name: s.bindings for name, s in view.sessions.items()},
        "coming": view.coming,
        "sessions_of": view.sessions_of,
        "executors_of": view.executors_of,
        "promised": (view.executors_promised, {name: sorted(uses) for name, uses in view.promised_on.items()}),
        "idle limits": view.idle_limits.at,
    }


def rounded(amount: Resources) -> Resources:
    """Leave out what comes from adding up in another order."""
    return amount._replace(cpu=round(amount.cpu, 6))


def waits(view: View) -> dict[str, str]:
    """Return what each session waits for."""
    return {name: known.waits_for for name, known in view.sessions.items()}


def sum_of(amounts: Any) -> Any:
    total = Resources()
    for amount in amounts:
        total = total.plus(amount)
    return pytest.approx(total, abs=1e-9)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=30)


# ---- nodes


def _with_node(seen: float = NOW) -> View:
    view = View()
    view.put_node("n", node("n"), seen)
    return view


@pytest.mark.parametrize(
    ("silent_s", "state"),
    [
        (0.0, NodeState.READY),
        (defaults.NODE_UNKNOWN_S, NodeState.READY),
        (defaults.NODE_UNKNOWN_S + 0.001, NodeState.UNKNOWN),
        (defaults.NODE_GIVEN_UP_S, NodeState.UNKNOWN),
        (defaults.NODE_GIVEN_UP_S + 0.001, NodeState.NOT_READY),
        (1e6, NodeState.NOT_READY),
    ],
)
def test_a_node_is_judged_by_when_it_was_last_heard_of(silent_s: float, state: NodeState) -> None:
    view = _with_node()
    changed = view.age_nodes(NOW + silent_s)
    assert view.nodes["n"].state is state
    assert changed == (state is not NodeState.READY)
    assert not view.age_nodes(NOW + silent_s)


@given(st.lists(st.floats(0, 30), max_size=10))
def test_a_node_that_beats_again_is_ready_whatever_was_thought_of_it(silences: list[float]) -> None:
    view, now = _with_node(), NOW
    for silent_s in silences:
        now += silent_s
        view.age_nodes(now)
        view.put_node("n", node("n"), now)
        assert view.nodes["n"].state is NodeState.READY
        assert not view.age_nodes(now)


def test_nodes_have_a_full_grace_period_after_the_scheduler_was_away() -> None:
    view = _with_node()
    view.forgive_nodes(NOW + 1000)
    view.age_nodes(NOW + 1000 + defaults.NODE_UNKNOWN_S)
    assert view.nodes["n"].state is NodeState.READY


def test_a_node_that_is_stopping_takes_nothing() -> None:
    view = _with_node()
    assert view.nodes["n"].takes
    view.put_node("n", node("n", stopping=True), NOW)
    assert not view.nodes["n"].takes


def test_a_node_that_comes_back_knows_what_is_placed_on_it() -> None:
    view = _with_node()
    view.put_session("s", session("s", resources=Resources(cpu=1.0)), 1)
    bound = binding("s", "n", "x")
    view.put_binding(key_of(bound), bound)
    view.put_node("n", None, NOW)
    view.put_node("n", node("n", cpu=4.0), NOW)
    assert view.nodes["n"].free.cpu == 3.0


def test_what_a_binding_uses_is_right_even_if_its_session_is_heard_of_later() -> None:
    view = _with_node()
    bound = binding("s", "n", "x")
    view.put_binding(key_of(bound), bound)
    view.put_session("s", session("s", resources=Resources(cpu=3.0)), 1)
    assert view.nodes["n"].used.cpu == 3.0
    view.put_binding(key_of(bound), None)
    assert view.nodes["n"].used == Resources()


# ---- sessions


def test_an_older_record_does_not_replace_a_newer_one() -> None:
    view = View()
    view.put_session("s", session("s", SessionState.CLOSING), 5)
    view.put_session("s", session("s", SessionState.OPEN), 4)
    assert view.sessions["s"].record.state is SessionState.CLOSING


def test_what_is_known_beside_a_sessions_record_outlasts_its_changes() -> None:
    view = View()
    first = view.put_session("s", session("s"), 1)
    assert first is not None
    first.crashes, first.busy = 3, True
    assert view.put_session("s", session("s", epoch=1), 2) is first
    assert first.record.epoch == 1


@pytest.mark.parametrize(
    ("application_has", "session_has", "least", "most"),
    [((0, 8), (None, None), 0, 8), ((2, 8), (None, 1), 1, 1), ((2, 8), (5, 100), 5, 8), ((0, 3), (9, None), 3, 3)],
)
def test_a_session_never_has_more_than_its_application_allows(
    application_has: tuple[int, int], session_has: tuple[int | None, int | None], least: int, most: int
) -> None:
    view = View()
    minimum, maximum = application_has
    view.put_application(APPLICATION, application(min_instances=minimum, max_instances=maximum))
    known = view.put_session("s", session("s", min_instances=session_has[0], max_instances=session_has[1]), 1)
    assert known is not None
    assert (view.least(known), view.most(known)) == (least, most)


def test_a_session_that_is_served_has_at_most_what_its_consumer_was_made_for() -> None:
    view = View()
    view.put_application(APPLICATION, application(max_instances=4))
    known = view.put_session("s", session("s", epoch=1), 1)
    assert known is not None
    bound = binding("s", "n", "x").changed(max_executors=4)
    view.put_binding(key_of(bound), bound)
    view.put_application(APPLICATION, application(max_instances=8))
    assert view.most(known) == 4
    view.put_application(APPLICATION, application(max_instances=2))
    assert view.most(known) == 2
    view.put_application(APPLICATION, application(max_instances=8))
    view.put_binding(key_of(bound), None)
    assert view.most(known) == 8
    old = bound.changed(epoch=0)
    view.put_binding(key_of(old), old)
    assert view.most(known) == 8


def test_a_session_that_ended_has_no_least() -> None:
    view = View()
    view.put_application(APPLICATION, application(min_instances=2))
    known = view.put_session("s", session("s", SessionState.CLOSING), 1)
    assert known is not None
    assert view.least(known) == 0


# ---- executors


def test_an_executor_is_idle_since_it_was_first_seen_so() -> None:
    view = View()
    bound = binding("s", "n", "x")
    seen = []
    for after_s, idle in ((0, True), (5, True), (6, False), (7, True)):
        view.put_executor("n.x", executor(bound, idle=idle), NOW + after_s)
        seen.append(view.executors["n.x"].idle_since)
    assert seen == [NOW, NOW, None, NOW + 7]


def test_only_a_bound_executor_is_idle() -> None:
    view = View()
    view.put_executor("n.x", executor(binding("s", "n", "x"), ExecutorState.UNBINDING, idle=True), NOW)
    assert view.executors["n.x"].idle_since is None


def test_the_rate_of_an_executor_is_what_it_finished_since_the_last_report() -> None:
    view = View()
    record = executor(binding("s", "n", "x"))
    view.put_executor("n.x", record, NOW)
    assert view.executors["n.x"].rate == 0.0
    view.put_executor("n.x", record.changed(succeeded=8, failed=2), NOW + 2)
    assert view.executors["n.x"].rate == 5.0
    view.put_executor("n.x", record.changed(succeeded=8, failed=2), NOW + 3)
    assert view.executors["n.x"].rate == 5.0
