"""The scheduler's plan: what it may never do, what it must do, and what it prefers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.protocol import defaults, subjects
from flame.protocol.records import (
    ApplicationRecord,
    ApplicationSpec,
    BindingRecord,
    ExecutorRecord,
    NodeRecord,
    SessionOptions,
    SessionRecord,
)
from flame.protocol.resources import Resources
from flame.protocol.states import ExecutorState, NodeState, SessionState
from flame_services.scheduler import reasons
from flame_services.scheduler.needs import CERTAIN_S
from flame_services.scheduler.plan import Plan, Step, plan, wanted_executors
from flame_services.scheduler.view import Executor, Session, View

NOW = 1000.0
APPLICATION = "app"
DELAY_S = 60.0
MIB = 2**20

# ---- making views


def node(name: str, cpu: float = 4.0, *, memory: int = 2**40, gpu: int = 0, **fields: Any) -> NodeRecord:
    capacity = Resources(cpu, memory, gpu)
    return NodeRecord(name=name, hostname=name, arch="x", os="y", capacity=capacity, started=1.0, **fields)


def attached(name: str, application: str = APPLICATION, *, seats: int = 1) -> NodeRecord:
    return node(name, 0.0, memory=0, application=application, max_executors=seats)


def application(name: str = APPLICATION, **spec: Any) -> ApplicationRecord:
    fields = {"command": "x", "delay_release_s": DELAY_S, "idle_timeout_s": 0, **spec}
    return ApplicationRecord(name=name, spec=ApplicationSpec.model_validate(fields), created=1.0)


def session(name: str, state: SessionState = SessionState.OPEN, **fields: Any) -> SessionRecord:
    options = {name: fields.pop(name) for name in list(fields) if name in SessionOptions.model_fields}
    record = {"id": name, "application": APPLICATION, "options": options, "created": 1.0, **fields}
    return SessionRecord.model_validate({**record, "state": state})


def binding(session_id: str, node_name: str, executor: str, *, leave: bool = False) -> BindingRecord:
    return BindingRecord(
        executor=executor,
        node=node_name,
        application=APPLICATION,
        session=session_id,
        epoch=1,
        consumer=subjects.consumer(session_id, 1),
        leave=leave,
        created=1.0,
    )


def executor(
    bound: BindingRecord, state: ExecutorState = ExecutorState.BOUND, *, idle: bool = False, pending: int = 0
) -> ExecutorRecord:
    return ExecutorRecord(
        id=bound.executor,
        node=bound.node,
        application=bound.application,
        session=bound.session,
        epoch=bound.epoch,
        state=state,
        idle=idle,
        pending=pending,
        created=1.0,
        updated=1.0,
    )


def served(known: Session) -> bool:
    """Whether somebody serves a session and is to go on with that: then nobody listens for its tasks."""
    return any(not bound.leave for bound in known.bindings.values())


def key_of(bound: BindingRecord) -> str:
    return subjects.executor_key(bound.node, bound.executor)


class Cluster:
    """A view under construction, and what becomes of it when plans are carried out."""

    def __init__(self, *nodes: NodeRecord, **spec: Any) -> None:
        self.view = View()
        self.view.put_application(APPLICATION, application(**spec))
        for record in nodes:
            self.view.put_node(record.name, record, NOW)
        self._minted = 0

    def open(self, name: str, *, demand: bool = False, **fields: Any) -> Session:
        made = self.view.put_session(name, session(name, **fields), 1)
        assert made is not None
        made.demand = demand
        self.view.touch(made)
        return made

    def bind(self, session_id: str, node_name: str, *, leave: bool = False) -> BindingRecord:
        self._minted += 1
        bound = binding(session_id, node_name, f"x{self._minted}", leave=leave)
        self.view.put_binding(key_of(bound), bound)
        return bound

    def report(
        self,
        bound: BindingRecord,
        state: ExecutorState = ExecutorState.BOUND,
        *,
        idle_for_s: float | None = None,
        pending: int = 0,
    ) -> None:
        record = executor(bound, state, idle=idle_for_s is not None, pending=pending)
        self.view.put_executor(key_of(bound), record, NOW - (1.0 if idle_for_s is None else idle_for_s))

    def plan(self, now: float = NOW) -> Plan:
        return plan(self.view, now)

    def steps(self, now: float = NOW) -> dict[str, Step]:
        return {step.session: step for step in self.plan(now).steps}

    def carry_out(self, steps: Iterable[Step]) -> None:
        """Do to the view what the carrier's writes would, with nothing else happening."""
        view = self.view
        for step in steps:
            record = view.sessions[step.session]
            for key in step.reap:
                view.put_binding(key, None)
            if step.replace:
                for key, bound in list(record.bindings.items()):
                    known = view.nodes.get(bound.node)
                    if known is None or known.state is NodeState.NOT_READY:
                        view.put_binding(key, None)
            for key in step.leave:
                view.put_binding(key, view.bindings[key].changed(leave=True))
            for name in step.bind:
                self.bind(step.session, name)
            if served(record):
                record.demand = False
                view.touch(record)
            if step.settle:
                view.put_session(step.session, record.record.changed(settled=True), record.revision + 1)


# ---- any view

quarters = st.integers(1, 8).map(lambda n: n / 4)
megabytes = st.integers(0, 8).map(lambda n: n * 64 * MIB)
requests = st.builds(Resources, cpu=quarters, memory=megabytes, gpu=st.integers(0, 1))
capacities = st.builds(Resources, cpu=st.integers(0, 16).map(lambda n: n / 4), memory=megabytes, gpu=st.integers(0, 2))


Fact = tuple[Any, ...]
"""A method of `View` and its arguments, and what is known of a session besides its record."""


@st.composite
def sessions_and_what_is_known_beside(draw: st.DrawFn, name: str, nodes: list[str]) -> Fact:
    state = draw(st.sampled_from([SessionState.OPEN, SessionState.OPEN, *SessionState]))
    record = session(
        name,
        state,
        settled=state is SessionState.CLOSED or (state is SessionState.FAILED and draw(st.booleans())),
        created=float(draw(st.integers(1, 3))),
        priority=draw(st.integers(0, 2)),
        resources=draw(requests),
        min_instances=(own_least := draw(st.none() | st.integers(0, 3))),
        max_instances=draw(st.none() | st.integers(max(1, own_least or 0), 6)),
    )
    beside = {
        "demand": draw(st.booleans()),
        "busy": draw(st.sampled_from([False, False, False, True])),
        "retry_at": draw(st.sampled_from([0.0, 0.0, NOW, NOW + 0.5])),
        "avoid": draw(st.sampled_from(["", *nodes])),
    }
    return name, record, beside


@st.composite
def facts(draw: st.DrawFn) -> dict[str, list[Fact]]:
    """Make the records of a cluster, by kind."""
    minimum = draw(st.integers(0, 3))
    spec = {
        "min_instances": minimum,
        "max_instances": draw(st.integers(max(1, minimum), 5)),
        "delay_release_s": draw(st.sampled_from([0.0, 1.0, DELAY_S])),
    }
    names = [f"n{number}" for number in range(draw(st.integers(0, 4)))]
    nodes: list[Fact] = []
    for name in names:
        capacity = draw(capacities)
        record = node(
            name,
            capacity.cpu,
            memory=capacity.memory,
            gpu=capacity.gpu,
            stopping=draw(st.booleans()),
            application=draw(st.sampled_from(["", "", "", APPLICATION, "other"])),
            max_executors=draw(st.sampled_from([0, 1, 1, 2])),
        )
        nodes.append((name, record, NOW - draw(st.sampled_from([0.0, 0.0, 0.0, 6.0, 16.0]))))
    sessions = [
        draw(sessions_and_what_is_known_beside(f"s{number}", names)) for number in range(draw(st.integers(0, 6)))
    ]
    bindings: list[Fact] = []
    executors: list[Fact] = []
    for number in range(draw(st.integers(0, 10)) if sessions else 0):
        session_id = draw(st.sampled_from(sessions))[0]
        place = draw(st.sampled_from([*names, *names, "gone"]))
        bound = binding(session_id, place, f"x{number}", leave=draw(st.sampled_from([False, False, True])))
        bindings.append((key_of(bound), bound))
        state = draw(st.none() | st.sampled_from([ExecutorState.BOUND, ExecutorState.BOUND, *ExecutorState]))
        if state is not None:
            idle, pending = draw(st.booleans()), draw(st.integers(0, 20))
            seen = NOW - draw(st.sampled_from([0.0, 0.5, 30.0, 61.0]))
            executors.append((key_of(bound), executor(bound, state, idle=idle, pending=pending), seen))
    return {"spec": [(spec,)], "nodes": nodes, "sessions": sessions, "bindings": bindings, "executors": executors}


def build(known: dict[str, list[Fact]], order: Callable[[list[Fact]], list[Fact]] = list) -> View:
    """Feed a view with records, those of each kind in any order."""
    view = View()
    view.put_application(APPLICATION, application(**known["spec"][0][0]))
    for session_id, record, beside in order(known["sessions"]):
        made = view.put_session(session_id, record, 1)
        assert made is not None
        for name, value in beside.items():
            setattr(made, name, value)
        if made.record.state is not SessionState.OPEN:
            made.demand = False
        view.touch(made)
    for name, record, seen in order(known["nodes"]):
        view.put_node(name, record, seen)
    for key, record in order(known["bindings"]):
        view.put_binding(key, record)
    for key, record, seen in order(known["executors"]):
        view.put_executor(key, record, seen)
    for made in view.sessions.values():
        if served(made):
            made.demand = False
            view.touch(made)
    view.age_nodes(NOW)
    return view


def views() -> st.SearchStrategy[View]:
    """Make any view that records might add up to, sensible or not."""
    return facts().map(build)


def staying_of(view: View, session_id: str, step: Step | None) -> list[str]:
    reaped = step.reap if step else []
    bound = view.sessions[session_id].bindings
    return [key for key, record in bound.items() if not record.leave and key not in reaped]


def lost_bindings(view: View, session_id: str) -> list[str]:
    def lost(key: str, bound: BindingRecord) -> bool:
        known = view.nodes.get(bound.node)
        ended = key in view.executors and view.executors[key].record.state is ExecutorState.RELEASED
        return not ended and (known is None or known.state is NodeState.NOT_READY)

    return [key for key, bound in view.sessions[session_id].bindings.items() if lost(key, bound)]


def room_is_made(made: Plan) -> bool:
    """Whether somebody may have been told to leave for somebody else."""
    return reasons.ROOM_IS_MADE in made.waits.values()


def free_after(view: View, made: Plan) -> dict[str, Resources]:
    """Return what every node has left once the plan is carried out."""
    free = {name: known.free for name, known in view.nodes.items()}
    for step in made.steps:
        for name in step.bind:
            free[name] = free[name].minus(view.request_of(step.session))
    return free


def seats_after(view: View, made: Plan, name: str) -> float:
    """Return how many more executors a node that serves one application takes once the plan is carried out."""
    record = view.nodes[name].record
    given = sum(step.bind.count(name) for step in made.steps)
    return (record.max_executors or math.inf) - len(view.nodes[name].bindings) - given


# ---- what it may never do


@given(views())
def test_a_plan_changes_nothing(view: View) -> None:
    before = copy.deepcopy(vars(view))
    plan(view, NOW)
    assert vars(view) == before


@given(facts(), st.randoms(use_true_random=False))
def test_a_plan_depends_on_the_view_and_nothing_else(known: dict[str, list[Fact]], random: Any) -> None:
    def shuffled(some: list[Fact]) -> list[Fact]:
        return random.sample(some, len(some))  # type: ignore[no-any-return]

    made = plan(build(known), NOW)
    assert plan(build(known), NOW) == made
    assert _by_session(plan(build(known, shuffled), NOW)) == _by_session(made)


def _by_session(made: Plan) -> Any:
    return made.look_again_at, [
        (s.session, s.replace, set(s.reap), set(s.leave), sorted(s.bind), s.settle) for s in made.steps
    ]


@given(views())
def test_a_node_is_never_given_more_than_it_has(view: View) -> None:
    made = plan(view, NOW)
    free = free_after(view, made)
    for name in {name for step in made.steps for name in step.bind}:
        if view.nodes[name].record.application:
            assert seats_after(view, made, name) >= 0
        else:
            assert all(amount >= -1e-9 for amount in free[name])


@given(views())
def test_a_node_that_serves_one_application_gets_no_session_of_another(view: View) -> None:
    for step in plan(view, NOW).steps:
        for name in step.bind:
            assert view.nodes[name].record.application in ("", view.sessions[step.session].record.application)


@given(views())
def test_a_session_never_has_more_executors_than_it_may(view: View) -> None:
    for step in plan(view, NOW).steps:
        if step.bind:
            present = len(view.sessions[step.session].bindings) - len(step.reap)
            assert present + len(step.bind) <= view.most(view.sessions[step.session])


@given(views())
def test_nothing_is_placed_on_a_node_that_takes_nothing(view: View) -> None:
    for step in plan(view, NOW).steps:
        for name in step.bind:
            assert view.nodes[name].state is NodeState.READY
            assert not view.nodes[name].record.stopping


@given(views())
def test_a_session_with_a_step_under_way_is_left_alone(view: View) -> None:
    assert not [step for step in plan(view, NOW).steps if view.sessions[step.session].busy]


@given(views())
def test_a_session_that_ended_gets_no_executor(view: View) -> None:
    for step in plan(view, NOW).steps:
        if view.sessions[step.session].record.state is not SessionState.OPEN:
            assert not step.bind


@given(views())
def test_only_a_session_that_ended_and_has_no_executor_is_settled(view: View) -> None:
    made = {step.session: step for step in plan(view, NOW).steps}
    for session_id, known in view.sessions.items():
        due = known.unsettled and not known.bindings and not known.busy
        assert due == (session_id in made and made[session_id].settle)


@given(views())
def test_nothing_is_bound_before_the_back_off_is_over(view: View) -> None:
    made = plan(view, NOW)
    for step in made.steps:
        if step.bind:
            assert view.sessions[step.session].retry_at <= NOW


@given(views())
def test_an_executor_that_was_told_to_leave_is_not_told_again(view: View) -> None:
    for step in plan(view, NOW).steps:
        assert not [key for key in step.leave if view.bindings[key].leave]
        assert not set(step.leave) & set(step.reap)
        assert len(set(step.leave)) == len(step.leave)


@given(views())
def test_an_open_session_keeps_its_executors_until_they_were_idle_for_the_delay(view: View) -> None:
    made = plan(view, NOW)
    for step in made.steps:
        known = view.sessions[step.session]
        if known.record.state is SessionState.OPEN and not step.replace and not room_is_made(made):
            for key in step.leave:
                idle_since = view.executors[key].idle_since
                assert idle_since is not None
                assert NOW - idle_since >= view.spec_of(known).delay_release_s


@given(views())
def test_an_open_session_keeps_as_many_executors_as_it_has_at_least(view: View) -> None:
    made = plan(view, NOW)
    for step in made.steps:
        known = view.sessions[step.session]
        if step.leave and known.record.state is SessionState.OPEN and not step.replace and not room_is_made(made):
            assert len(staying_of(view, step.session, step)) - len(step.leave) >= view.least(known)


# ---- what it must do


@given(views())
def test_a_session_with_a_waiting_task_is_served_wherever_there_is_room(view: View) -> None:
    made = plan(view, NOW)
    steps = {step.session: step for step in made.steps}
    free = free_after(view, made)
    for session_id, known in view.sessions.items():
        step = steps.get(session_id, Step(session_id))
        full = len(known.bindings) - len(step.reap) >= view.most(known)
        alone = served(known) or view.least(known) < 2
        ready = known.retry_at <= NOW and not full and not step.replace and known.record.state is SessionState.OPEN
        if known.demand and not known.busy and ready and alone and not room_is_made(made):
            request = view.request_of(session_id)
            roomy = [
                name
                for name, room in free.items()
                if view.nodes[name].takes and view.nodes[name].record.application == "" and request.fits_in(room)
            ]
            roomy += [
                name
                for name, there in view.nodes.items()
                if there.takes and there.record.application == APPLICATION and seats_after(view, made, name) > 0
            ]
            assert step.bind or not roomy


@given(views())
def test_what_has_ended_is_reaped_and_what_is_lost_is_replaced(view: View) -> None:
    made = {step.session: step for step in plan(view, NOW).steps}
    for session_id, known in view.sessions.items():
        if known.busy:
            continue
        step = made.get(session_id, Step(session_id))
        ended = {
            key
            for key in known.bindings
            if key in view.executors and view.executors[key].record.state is ExecutorState.RELEASED
        }
        assert set(step.reap) == ended
        assert step.replace == bool(lost_bindings(view, session_id))
        if step.replace:
            assert not step.bind
            gone = set(lost_bindings(view, session_id))
            assert set(step.leave) == set(staying_of(view, session_id, step)) - gone


@given(views())
def test_every_executor_of_a_session_that_ended_is_told_to_leave(view: View) -> None:
    made = {step.session: step for step in plan(view, NOW).steps}
    for session_id, known in view.sessions.items():
        if known.record.state is SessionState.OPEN or known.busy:
            continue
        step = made.get(session_id, Step(session_id))
        gone = set(lost_bindings(view, session_id))
        assert set(step.leave) == set(staying_of(view, session_id, step)) - gone


@given(views())
def test_it_looks_again_in_time_for_what_waits_for_a_time(view: View) -> None:
    made = plan(view, NOW)
    assert made.look_again_at > NOW
    for session_id, known in view.sessions.items():
        if known.demand and not known.busy and known.retry_at > NOW and not lost_bindings(view, session_id):
            assert made.look_again_at <= known.retry_at, session_id


@given(views())
def test_sessions_that_are_not_looked_at_need_nothing(view: View) -> None:
    made = plan(view, NOW)
    view.changed = set(view.sessions)
    assert plan(view, NOW) == made


@settings(max_examples=200)
@given(views())
def test_plans_that_are_carried_out_come_to_rest(view: View) -> None:
    cluster = Cluster()
    cluster.view = view
    cluster._minted = 1000
    for _ in range(5):
        cluster.carry_out(cluster.plan().steps)
    assert cluster.plan().steps == []


@given(views())
def test_an_executor_that_was_just_bound_is_waited_for(view: View) -> None:
    cluster = Cluster()
    cluster.view = view
    cluster._minted = 1000
    made = cluster.plan()
    cluster.carry_out(made.steps)
    bound_before = {step.session for step in made.steps if step.bind}
    assert not [step for step in cluster.plan().steps if step.session in bound_before and (step.bind or step.leave)]


# ---- what it does in particular


def test_a_session_that_needs_nothing_gets_nothing() -> None:
    cluster = Cluster(node("n"))
    cluster.open("s")
    assert cluster.plan() == Plan([], math.inf)
    assert cluster.view.changed == set()


def test_a_waiting_task_gets_one_executor() -> None:
    cluster = Cluster(node("n"))
    cluster.open("s", demand=True)
    assert cluster.plan().steps == [Step("s", bind=["n"])]


def test_a_session_has_its_least_from_the_beginning_and_without_a_task() -> None:
    cluster = Cluster(node("n"), min_instances=3)
    cluster.open("s")
    cluster.open("own", min_instances=1)
    assert {name: len(step.bind) for name, step in cluster.steps().items()} == {"s": 3, "own": 1}


def test_a_session_that_fits_nowhere_does_not_keep_others_waiting() -> None:
    cluster = Cluster(node("n", cpu=1.0))
    cluster.open("huge", demand=True, priority=1000, resources=Resources(cpu=64))
    cluster.open("gpu", demand=True, priority=1000, resources=Resources(cpu=0.1, gpu=1))
    cluster.open("small", demand=True, resources=Resources(cpu=1))
    assert cluster.plan().steps == [Step("small", bind=["n"])]


def test_a_higher_priority_is_served_first() -> None:
    cluster = Cluster(node("n", cpu=1.0))
    for name, priority in (("low", 0), ("high", 2), ("middle", 1)):
        cluster.open(name, demand=True, priority=priority, resources=Resources(cpu=1))
    assert list(cluster.steps()) == ["high"]


def test_among_equals_who_has_less_is_served_first() -> None:
    cluster = Cluster(node("n", cpu=2.0))
    cluster.open("rich", min_instances=2, created=1.0, resources=Resources(cpu=1))
    cluster.open("poor", min_instances=1, created=2.0, resources=Resources(cpu=1))
    cluster.bind("rich", "n")
    assert list(cluster.steps()) == ["poor"]


def test_among_equals_who_came_first_is_served_first() -> None:
    cluster = Cluster(node("n", cpu=1.0))
    cluster.open("second", demand=True, created=2.0, resources=Resources(cpu=1))
    cluster.open("first", demand=True, created=1.0, resources=Resources(cpu=1))
    assert list(cluster.steps()) == ["first"]


def test_places_are_shared_out_in_turns() -> None:
    cluster = Cluster(node("n", cpu=6.0))
    for name in ("a", "b"):
        cluster.open(name, resources=Resources(cpu=1))
        cluster.report(cluster.bind(name, "n"), pending=100)
    assert {name: len(step.bind) for name, step in cluster.steps().items()} == {"a": 2, "b": 2}


def test_executors_are_spread_over_the_nodes() -> None:
    cluster = Cluster(node("a"), node("b"), node("c"), node("d"))
    cluster.open("s", min_instances=4)
    assert sorted(cluster.steps()["s"].bind) == ["a", "b", "c", "d"]


def test_the_node_where_the_last_attempt_failed_is_avoided_while_there_is_another() -> None:
    cluster = Cluster(node("big", cpu=64.0), node("small", cpu=1.0))
    cluster.open("s", demand=True).avoid = "big"
    assert cluster.steps()["s"].bind == ["small"]
    cluster.view.put_node("small", None, NOW)
    assert cluster.steps()["s"].bind == ["big"]


@pytest.mark.parametrize("silent_s", [defaults.NODE_UNKNOWN_S + 0.1, defaults.NODE_GIVEN_UP_S + 0.1])
def test_a_node_that_went_silent_gets_nothing_new(silent_s: float) -> None:
    cluster = Cluster(node("n"))
    cluster.open("s", demand=True)
    cluster.view.age_nodes(NOW + silent_s)
    assert cluster.plan().steps == []


def test_a_node_that_is_missed_for_a_moment_keeps_its_executors() -> None:
    cluster = Cluster(node("n"))
    cluster.open("s")
    cluster.report(cluster.bind("s", "n"))
    cluster.view.age_nodes(NOW + defaults.NODE_UNKNOWN_S + 0.1)
    assert cluster.plan().steps == []


def test_the_executors_of_a_lost_node_are_replaced_and_then_bound_elsewhere() -> None:
    cluster = Cluster(node("lost"), node("alive"))
    cluster.open("s")
    cluster.report(cluster.bind("s", "lost"))
    cluster.view.age_nodes(NOW + defaults.NODE_GIVEN_UP_S + 0.1)
    cluster.view.put_node("alive", node("alive"), NOW + 20)
    assert cluster.plan().steps == [Step("s", replace=True)]
    cluster.carry_out(cluster.plan().steps)
    cluster.view.sessions["s"].demand = True
    cluster.view.touch(cluster.view.sessions["s"])
    assert cluster.plan().steps == [Step("s", bind=["alive"])]


def test_executors_elsewhere_leave_too_when_a_node_is_lost_since_they_share_its_consumer() -> None:
    cluster = Cluster(node("alive"))
    cluster.open("s")
    cluster.report(cluster.bind("s", "lost"))
    survivor = cluster.bind("s", "alive")
    cluster.report(survivor)
    assert cluster.plan().steps == [Step("s", replace=True, leave=[key_of(survivor)])]


def test_an_idle_executor_leaves_when_the_delay_is_over_and_not_before() -> None:
    cluster = Cluster(node("n"))
    cluster.open("s")
    bound = cluster.bind("s", "n")
    cluster.report(bound, idle_for_s=DELAY_S - 1)
    assert cluster.plan() == Plan([], NOW + 1)
    assert cluster.plan(NOW + 1).steps == [Step("s", leave=[key_of(bound)])]


def test_the_executor_that_was_idle_longest_leaves_first() -> None:
    cluster = Cluster(node("n"))
    cluster.open("s", min_instances=1)
    short, long = cluster.bind("s", "n"), cluster.bind("s", "n")
    cluster.report(short, idle_for_s=DELAY_S)
    cluster.report(long, idle_for_s=DELAY_S + 1)
    assert cluster.plan().steps == [Step("s", leave=[key_of(long)])]


def test_an_executor_that_has_ended_is_reaped_and_replaced_at_once_if_it_is_needed() -> None:
    cluster = Cluster(node("n"), min_instances=1)
    cluster.open("s")
    bound = cluster.bind("s", "n")
    cluster.report(bound, ExecutorState.RELEASED)
    assert cluster.plan().steps == [Step("s", reap=[key_of(bound)], bind=["n"])]


def test_a_task_that_comes_while_the_last_executor_leaves_gets_a_new_one_at_once() -> None:
    cluster = Cluster(node("n"))
    cluster.open("s", demand=True)
    leaving = cluster.bind("s", "n", leave=True)
    cluster.report(leaving)
    assert cluster.plan().steps == [Step("s", bind=["n"])]


def test_a_new_executor_waits_for_its_place_until_those_that_leave_are_gone() -> None:
    cluster = Cluster(node("n"), max_instances=1)
    cluster.open("s", demand=True)
    leaving = cluster.bind("s", "n", leave=True)
    cluster.report(leaving)
    assert cluster.plan().steps == []
    cluster.report(leaving, ExecutorState.RELEASED)
    assert cluster.plan().steps == [Step("s", reap=[key_of(leaving)], bind=["n"])]


def test_an_executor_that_leaves_counts_until_it_is_gone() -> None:
    cluster = Cluster(node("n"), max_instances=2)
    cluster.open("s")
    cluster.report(cluster.bind("s", "n"), pending=100)
    leaving = cluster.bind("s", "n", leave=True)
    cluster.report(leaving)
    assert cluster.plan().steps == []
    cluster.report(leaving, ExecutorState.RELEASED)
    assert cluster.plan().steps == [Step("s", reap=[key_of(leaving)], bind=["n"])]


def test_a_session_of_an_application_that_is_gone_can_still_be_ended() -> None:
    cluster = Cluster(node("n"))
    cluster.open("s", state=SessionState.CLOSING)
    cluster.view.put_application(APPLICATION, None)
    assert cluster.plan().steps == [Step("s", settle=True)]


# ---- how many executors a session should have


def known(
    state: ExecutorState = ExecutorState.BOUND, *, idle: bool = False, pending: int = 0, rate: float = 0.0
) -> Executor:
    record = executor(binding("s", "n", "x"), state, idle=idle, pending=pending)
    return Executor(record, rate=rate)


BUSY = known()
IDLE = known(idle=True)
COMING = known(ExecutorState.BINDING)


@pytest.mark.parametrize(
    ("serving", "demand", "wanted"),
    [
        ([], False, 0),
        ([], True, 1),
        ([BUSY], False, 1),
        ([IDLE], False, 0),
        ([None], False, 1),
        ([BUSY, IDLE, IDLE], False, 1),
        ([known(pending=1)], False, 2),
        ([known(pending=3)], False, 4),
        ([known(pending=100)], False, 5),
        ([known(pending=3), COMING, None], False, 4),
        ([known(pending=2), COMING, None], False, 3),
        ([known(pending=3), IDLE], False, 1),
        ([known(pending=100, rate=1000.0)], False, 1),
        ([known(pending=2000, rate=1000.0)], False, 3),
        ([known(pending=100, rate=0.5)], False, 5),
    ],
    ids=repr,
)
def test_a_backlog_that_the_present_executors_can_not_work_off_soon_gets_more(
    serving: list[Executor | None], demand: bool, wanted: int
) -> None:
    assert wanted_executors(least=0, most=5, demand=demand, serving=serving) == wanted


def busy_since(began: float, pending: int = 0, told: float = 0.0) -> Executor:
    """Return a busy executor that began to serve at one time, and said at another how much waits."""
    made = known(pending=pending)
    made.serving_since, made.pending_at = began, told
    return made


@pytest.mark.parametrize(
    ("serving", "now", "wanted"),
    [
        ([busy_since(1.0, 1, told=2.0)], 2.0, 2),
        ([busy_since(1.0, 1, told=2.0), busy_since(3.0)], 3.0, 2),  # the second one has taken it
        ([busy_since(1.0, 5, told=2.0), busy_since(3.0), busy_since(3.1)], 3.2, 6),
        ([busy_since(1.0, 1, told=2.0), busy_since(3.0, 4, told=4.0)], 4.0, 6),
        ([busy_since(1.0), busy_since(2.1, 1, told=2.3), busy_since(2.2)], 2.3, 3),  # what was told was older than that
        ([busy_since(1.0, 1, told=2.0), busy_since(3.0)], 2.0 + CERTAIN_S, 3),  # its manager says so, too
    ],
)
def test_what_those_that_began_since_have_taken_gets_no_further_executor(
    serving: list[Executor | None], now: float, wanted: int
) -> None:
    assert wanted_executors(least=0, most=10, demand=False, serving=serving, now=now) == wanted


@given(
    st.integers(0, 5),
    st.integers(5, 10),
    st.booleans(),
    st.lists(
        st.none() | st.builds(known, st.sampled_from(ExecutorState), idle=st.booleans(), pending=st.integers(0, 50))
    ),
)
def test_a_session_has_neither_less_than_its_least_nor_more_than_its_most(
    least: int, most: int, demand: bool, serving: list[Executor | None]
) -> None:
    assert least <= wanted_executors(least=least, most=most, demand=demand, serving=serving) <= most
