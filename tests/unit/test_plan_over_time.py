"""Plans that are carried out, in virtual time: who gets how much of a cluster, and that it comes to rest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.protocol.resources import Resources
from flame.protocol.states import CloseMode, SessionState
from flame_services.scheduler.view import View
from tests.support.simulation import Simulation

SLOTS = 20


def full_cluster(**spec: object) -> Simulation:
    simulation = Simulation()
    simulation.application("app", **spec)
    for number in range(SLOTS // 4):
        simulation.node(f"n{number}", cpu=4.0)
    return simulation


def test_two_sessions_of_equal_weight_get_equal_shares_of_a_full_cluster() -> None:
    simulation = full_cluster()
    simulation.session("first", math.inf)
    simulation.run(20)
    assert simulation.count("first") == SLOTS
    simulation.session("second", math.inf)
    simulation.run(20)
    assert simulation.count("first") == simulation.count("second") == SLOTS / 2
    simulation.checked = False
    before = {name: load.busy_s for name, load in simulation.loads.items()}
    told = simulation.told_to_leave
    simulation.run(100)
    first, second = (simulation.loads[name].busy_s - before[name] for name in ("first", "second"))
    assert first == pytest.approx(second, rel=0.1)
    assert first + second > 0.95 * SLOTS * 100
    assert simulation.told_to_leave == told


def test_shares_are_in_the_relation_of_weights() -> None:
    simulation = full_cluster(weight=1.0)
    simulation.session("light", math.inf)
    simulation.session("heavy", math.inf, weight=3.0)
    simulation.run(30)
    assert (simulation.count("light"), simulation.count("heavy")) == (SLOTS / 4, SLOTS * 3 / 4)


def test_a_share_is_of_the_resource_of_which_a_session_needs_most() -> None:
    """The example of the paper on dominant resource fairness: 9 processors, 18 GiB."""
    simulation = Simulation()
    simulation.application("app")
    simulation.node("n", cpu=9.0, memory=18 * 2**30)
    simulation.session("a", math.inf, resources=Resources(1.0, 4 * 2**30, 0))
    simulation.session("b", math.inf, resources=Resources(3.0, 2**30, 0))
    simulation.run(30)
    assert (simulation.count("a"), simulation.count("b")) == (3, 2)


def test_a_high_priority_overtakes_and_no_task_is_killed_for_it() -> None:
    simulation = full_cluster()
    simulation.session("low", math.inf, task_s=3.0)
    simulation.run(20)
    simulation.session("high", math.inf, priority=1)
    simulation.run(20)
    assert (simulation.count("low"), simulation.count("high")) == (0, SLOTS)
    assert simulation.told_to_leave == SLOTS  # each once
    low = simulation.loads["low"]
    assert low.busy_s == pytest.approx(low.done * 3.0, rel=0.2)  # every task that was begun was finished


@pytest.mark.parametrize(
    "options",
    [{"max_instances": 2}, {"resources": Resources(5.0, 0, 0)}, {"resources": Resources(1.0, 0, 1)}, {"fails": 10**6}],
    ids=["its maximum", "no node is large enough", "no node has one", "it does not start"],
)
def test_a_low_priority_advances_when_the_high_one_can_not_use_the_room(options: dict[str, object]) -> None:
    simulation = full_cluster()
    simulation.session("high", math.inf, priority=1, **options)  # type: ignore[arg-type]
    simulation.session("low", math.inf)
    simulation.run(30)
    assert simulation.count("low") >= SLOTS - 2
    assert simulation.told_to_leave <= 10  # for each attempt one


def test_what_a_high_priority_leaves_goes_back_to_the_low_one() -> None:
    simulation = full_cluster(delay_release_s=1.0)
    simulation.session("low", math.inf)
    simulation.run(10)
    simulation.session("high", 200, priority=1)
    simulation.run(8)
    assert simulation.count("high") == SLOTS
    simulation.run(30)
    assert (simulation.count("low"), simulation.count("high")) == (SLOTS, 0)


def test_a_thousand_short_tasks_do_not_get_an_executor_each() -> None:
    simulation = full_cluster()
    simulation.session("s", 100, task_s=0.001)
    simulation.run(1)
    simulation.submit("s", 1000)
    simulation.run(2)
    assert simulation.loads["s"].tasks == 0
    assert simulation.bound < 5


def test_a_session_that_drains_works_off_what_waits_and_then_ends() -> None:
    simulation = full_cluster()
    simulation.session("s", 100)
    simulation.run(0.5)
    simulation.close("s", CloseMode.DRAIN)
    simulation.run(30)
    assert simulation.loads["s"].done == 100
    assert simulation.view.sessions["s"].record.state is SessionState.CLOSED


def test_a_session_that_is_closed_finishes_what_runs_and_no_more() -> None:
    simulation = full_cluster(max_instances=4)
    simulation.session("s", 100)
    simulation.run(3)
    simulation.close("s")
    done = simulation.loads["s"].done
    simulation.run(5)
    assert simulation.loads["s"].done - done <= 4
    assert simulation.view.sessions["s"].record.state is SessionState.CLOSED


def test_an_open_session_without_a_task_is_closed_at_its_idle_limit() -> None:
    simulation = full_cluster(idle_timeout_s=60.0)
    simulation.session("s")
    simulation.session("long", idle_timeout_s=120.0)
    simulation.session("never", idle_timeout_s=0)
    for run_s, still_open in ((59, {"s", "long", "never"}), (2, {"long", "never"}), (100, {"never"})):
        simulation.run(run_s)
        known = simulation.view.sessions.values()
        assert {session.id for session in known if session.record.state is SessionState.OPEN} == still_open


# ---- any load

amounts = st.builds(
    Resources,
    cpu=st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]),
    memory=st.sampled_from([0, 1, 4]).map(lambda n: n * 2**30),
    gpu=st.sampled_from([0, 0, 0, 1]),
)


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    """Make a cluster with sessions that have something to do."""
    limit = draw(st.none() | st.integers(1, 12))
    simulation = Simulation(View(max_executors=limit), seed=draw(st.integers(0, 99)))
    for number in range(draw(st.integers(1, 4))):
        cpu, gpu = draw(st.sampled_from([1.0, 2.0, 4.0])), draw(st.sampled_from([0, 0, 2]))
        simulation.node(f"n{number}", cpu, draw(st.sampled_from([2, 8, 64])) * 2**30, gpu)
    for number in range(draw(st.integers(0, 2))):
        seats = draw(st.integers(1, 2))
        simulation.node(f"attached{number}", 0.0, 0, application=draw(st.sampled_from("ab")), max_executors=seats)
    for name in ("a", "b"):
        simulation.application(
            name,
            max_executors=draw(st.none() | st.integers(1, 6)),
            placement=draw(st.sampled_from(["spread", "pack"])),
            delay_release_s=draw(st.sampled_from([0.0, 1.0])),
        )
    for number in range(draw(st.integers(1, 6))):
        simulation.session(
            f"s{number}",
            draw(st.sampled_from([0, 1, 10, math.inf])),
            task_s=draw(st.sampled_from([0.5, 1.0, 3.0])),
            fails=draw(st.sampled_from([0, 0, 2])),
            app=draw(st.sampled_from(["a", "b"])),
            priority=draw(st.sampled_from([0, 0, 1, 2])),
            weight=draw(st.sampled_from([None, 1.0, 2.5])),
            min_instances=draw(st.sampled_from([0, 0, 1, 3])),
            max_instances=draw(st.integers(3, 20)),
            resources=draw(amounts),
        )
    return simulation


@settings(max_examples=15)
@given(simulations(), st.data())
def test_whatever_happens_limits_hold_and_nothing_is_planned_twice(simulation: Simulation, data: st.DataObject) -> None:
    names = sorted(simulation.loads)
    for _ in range(3):
        simulation.run(data.draw(st.floats(0.01, 1)))
        name = data.draw(st.sampled_from(names))
        if simulation.view.sessions[name].record.state is SessionState.OPEN:
            if data.draw(st.booleans()):
                simulation.submit(name, 3)
            else:
                simulation.close(name, data.draw(st.sampled_from(CloseMode)))


@settings(max_examples=8)
@given(simulations())
def test_a_load_that_stays_comes_to_rest(simulation: Simulation) -> None:
    """No executor is told to leave and bound again for ever: sooner or later whoever works goes on working."""
    simulation.checked = False
    for name, load in simulation.loads.items():
        load.tasks, load.fails = math.inf, 0
        simulation.submit(name, 0)
    simulation.run(30)
    bound, told = simulation.bound, simulation.told_to_leave
    simulation.run(10)
    assert (simulation.bound, simulation.told_to_leave) == (bound, told)


@settings(max_examples=8)
@given(simulations())
def test_what_is_free_is_used_by_whoever_can(simulation: Simulation) -> None:
    simulation.checked = False
    for name, load in simulation.loads.items():
        load.tasks, load.fails = math.inf, 0
        simulation.submit(name, 0)
    simulation.run(30)
    view = simulation.view
    for name, session in view.sessions.items():
        spec = view.spec_of(session)
        full = len(session.bindings) >= view.most(session)
        full |= (
            spec.max_executors is not None
            and view.executors_of.get(session.record.application, 0) >= spec.max_executors
        )
        full |= view.max_executors is not None and len(view.bindings) >= view.max_executors
        together = not session.bindings and view.least(session) > 1
        fits = any(
            len(node.bindings) < node.record.max_executors and node.record.application == session.record.application
            if node.record.application
            else session.record.options.resources.fits_in(node.free)
            for node in view.nodes.values()
        )
        assert full or together or not fits, name
        assert session.waits_for or len(session.bindings) >= view.most(session)
