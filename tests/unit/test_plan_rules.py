"""Single rules of the plan: limits, all at once or none, who makes room for whom, and why a session waits."""

from __future__ import annotations

import math

import pytest

from flame.protocol.resources import Resources
from flame.protocol.states import CloseMode, ExecutorState, Placement, SessionState
from flame_services.scheduler import reasons
from flame_services.scheduler.plan import Step, plan
from flame_services.scheduler.view import View
from tests.unit.test_plan import APPLICATION, NOW, Cluster, application, attached, key_of, node, served

ONE = Resources(cpu=1)


def full(cpu: float = 4.0, **spec: object) -> Cluster:
    """Return a cluster of one node on which `low` has everything, busy."""
    cluster = Cluster(node("n", cpu=cpu), **spec)
    cluster.open("low", resources=ONE)
    for _ in range(int(cpu)):
        cluster.report(cluster.bind("low", "n"))
    return cluster


# ---- limits


def test_an_application_has_no_more_executors_than_it_may() -> None:
    cluster = Cluster(node("n", cpu=64.0), max_executors=3)
    for name in ("a", "b"):
        cluster.open(name, min_instances=1, demand=True)
        cluster.report(cluster.bind(name, "n"), pending=100)
    assert sum(len(step.bind) for step in cluster.plan().steps) == 1
    cluster.bind("b", "n")
    assert set(cluster.plan().waits.values()) == {"application app has its 3 executors"}


def test_the_cluster_has_no_more_executors_than_it_may() -> None:
    cluster = Cluster(node("n", cpu=64.0))
    cluster.view.max_executors = 2
    for name in ("a", "b", "c"):
        cluster.open(name, demand=True)
    made = cluster.plan()
    assert [step.session for step in made.steps] == ["a", "b"]
    assert made.waits == {"c": "the cluster has its 2 executors"}


def test_what_is_being_bound_counts_before_it_is_known() -> None:
    cluster = Cluster(node("n", cpu=1.0))
    cluster.open("a", demand=True, resources=ONE)
    cluster.view.planned(cluster.plan())
    cluster.open("b", demand=True, resources=ONE)
    assert cluster.plan().steps == []
    cluster.view.done("a")  # and nothing came of it
    assert [step.session for step in cluster.plan().steps] == ["a"]


# ---- all at once


def test_executors_that_begin_together_do_so_or_not_at_all() -> None:
    cluster = Cluster(node("n", cpu=3.0), node("m", cpu=0.5))
    cluster.open("gang", min_instances=4, resources=ONE, created=1.0)
    cluster.open("single", demand=True, resources=ONE, created=2.0)
    made = cluster.plan()
    assert made.steps == [Step("single", bind=["n"])]
    assert made.waits == {"gang": "needs 4 executors at once (min_instances); there is room for 3"}
    cluster.view.put_node("m", node("m", cpu=2.0), NOW)
    assert {name: len(step.bind) for name, step in cluster.steps().items()} == {"gang": 4, "single": 1}


def test_one_of_them_that_is_lost_is_replaced_alone() -> None:
    cluster = Cluster(node("n", cpu=3.0))
    cluster.open("gang", min_instances=4, resources=ONE)
    cluster.bind("gang", "n")
    assert len(cluster.steps()["gang"].bind) == 2


def test_room_is_made_for_all_of_them_or_for_none() -> None:
    cluster = full()
    cluster.open("gang", min_instances=5, resources=ONE, priority=1)
    assert cluster.plan().steps == []
    cluster.view.put_node("m", node("m", cpu=1.0), NOW)
    assert len(cluster.steps()["low"].leave) == 4


# ---- where


def test_executors_are_packed_if_their_application_wants_it() -> None:
    cluster = Cluster(node("a"), node("b"), placement=Placement.PACK)
    cluster.open("s", resources=ONE)
    cluster.bind("s", "b")
    cluster.open("t", min_instances=3, resources=ONE)
    assert cluster.steps()["t"].bind == ["b", "b", "b"]


# ---- making room


def test_just_as_many_leave_as_are_needed_and_the_idle_first() -> None:
    cluster = full()
    idle = cluster.bind("low", "n")
    cluster.view.put_node("n", node("n", cpu=5.0), NOW)
    cluster.report(idle, idle_for_s=1)
    cluster.open("high", demand=True, priority=1, resources=ONE)
    assert cluster.plan().steps == [Step("low", leave=[key_of(idle)])]
    assert cluster.plan().waits["high"] == reasons.ROOM_IS_MADE


def test_nobody_is_told_to_leave_twice_for_the_same_need() -> None:
    cluster = full()
    cluster.open("high", demand=True, priority=1, resources=Resources(cpu=2))
    first = cluster.plan()
    assert [len(step.leave) for step in first.steps] == [2]
    cluster.carry_out(first.steps)
    assert cluster.plan().steps == []


def test_room_that_is_coming_is_not_given_to_others_bit_by_bit() -> None:
    cluster = full()
    cluster.open("high", demand=True, priority=1, resources=Resources(cpu=2))
    cluster.carry_out(cluster.plan().steps)
    leaving = [key for key, bound in cluster.view.bindings.items() if bound.leave]
    cluster.view.put_binding(leaving[0], None)
    cluster.open("other", demand=True, resources=ONE)
    assert not [step for step in cluster.plan().steps if step.bind]
    cluster.view.put_binding(leaving[1], None)
    assert cluster.steps()["high"].bind == ["n"]


@pytest.mark.parametrize("asks", [Resources(cpu=5), Resources(cpu=1, gpu=1)], ids=str)
def test_nobody_makes_room_for_what_fits_on_no_node(asks: Resources) -> None:
    cluster = full()
    cluster.open("high", demand=True, priority=1, resources=asks)
    assert cluster.plan().steps == []


def test_nobody_makes_room_for_a_session_that_pauses_after_a_failure() -> None:
    cluster = full()
    cluster.open("high", demand=True, priority=1, resources=ONE, bind_failures=2).retry_at = NOW + 1
    made = cluster.plan()
    assert (made.steps, made.look_again_at) == ([], NOW + 1)
    assert made.waits == {"high": "an executor failed to enter 2 of 5 times; it is tried again after a pause"}


def test_a_lower_priority_takes_nothing_from_a_higher_one() -> None:
    cluster = full()
    cluster.open("lower", demand=True, resources=ONE)
    low = cluster.view.sessions["low"].record
    cluster.view.put_session("low", None, 2)
    raised = low.changed(options=low.options.model_copy(update={"priority": 1}))
    cluster.view.put_session("low", raised, 3)
    assert cluster.plan().steps == []


def test_among_equals_who_has_more_than_its_share_makes_room() -> None:
    cluster = full()
    cluster.open("poor", demand=True, resources=ONE)
    assert [(step.session, len(step.leave)) for step in cluster.plan().steps] == [("low", 1)]
    cluster.bind("poor", "n")  # as if more than fits; what matters is who has how much
    cluster.bind("poor", "n")
    cluster.bind("poor", "n")
    cluster.report(cluster.bind("poor", "n"), pending=10)
    assert cluster.plan().steps == []


def test_a_place_under_a_limit_is_made_free_too() -> None:
    cluster = full(max_executors=4)
    cluster.view.put_node("m", node("m"), NOW)
    cluster.open("high", demand=True, priority=1, resources=ONE)
    made = cluster.plan()
    assert [(step.session, len(step.leave)) for step in made.steps] == [("low", 1)]
    cluster.carry_out(made.steps)
    assert cluster.plan().steps == []


# ---- ends


def test_who_is_closed_by_force_is_told_so_even_if_it_leaves_already() -> None:
    cluster = Cluster(node("n"))
    cluster.open("s", state=SessionState.CLOSING, close_mode=CloseMode.FORCE)
    leaving, staying = cluster.bind("s", "n", leave=True), cluster.bind("s", "n")
    assert cluster.plan().steps == [Step("s", leave=[key_of(leaving), key_of(staying)], force=True)]
    for bound in (leaving, staying):
        cluster.view.put_binding(key_of(bound), bound.changed(leave=True, force=True))
    assert cluster.plan().steps == []


def test_a_draining_session_is_served_until_a_look_found_nothing() -> None:
    cluster = Cluster(node("n"))
    known = cluster.open("s", state=SessionState.CLOSING, close_mode=CloseMode.DRAIN, demand=True)
    assert cluster.plan().steps == [Step("s", bind=["n"])]
    bound = cluster.bind("s", "n")
    known.demand = False
    cluster.report(bound)
    assert cluster.plan().steps == []
    cluster.report(bound, idle_for_s=0)
    assert cluster.plan().steps == [Step("s", look=True)]
    cluster.view.planned(cluster.plan())
    cluster.view.done("s")
    assert cluster.plan().steps == []
    assert cluster.plan().look_again_at == NOW + 1
    known.drained = True
    cluster.view.touch(known)
    assert cluster.plan().steps == [Step("s", leave=[key_of(bound)])]
    cluster.view.put_binding(key_of(bound), None)
    assert cluster.plan().steps == [Step("s", settle=True)]


def test_a_session_is_closed_at_its_idle_limit_by_the_wall_clock() -> None:
    cluster = Cluster(node("n"), idle_timeout_s=60)
    cluster.view.wall_ahead_s = 5000.0
    cluster.open("s", created=NOW + 5000.0)
    assert cluster.plan().steps == []
    assert cluster.plan().look_again_at == NOW + 60
    assert cluster.plan(NOW + 60).steps == [Step("s", close_idle=True)]
    cluster.open("busy", created=1.0, demand=True)
    assert not cluster.steps()["busy"].close_idle


# ---- why


@pytest.mark.parametrize(
    ("asks", "reason"),
    [
        (Resources(cpu=1, gpu=1), "needs gpu=1; no node has one"),
        (Resources(cpu=4, memory=8 * 2**30), "needs cpu=4, mem=8g; the most any node has is cpu=2, mem=4g"),
        (Resources(cpu=2, memory=4 * 2**30), "needs cpu=2, mem=4g; no node has all of it"),
        (Resources(cpu=2, memory=2**30), "needs cpu=2, mem=1g; no node has that much free now"),
    ],
    ids=str,
)
def test_a_session_says_what_it_needs_and_is_not_there(asks: Resources, reason: str) -> None:
    cluster = Cluster(node("a", cpu=2.0, memory=2**30), node("b", cpu=1.0, memory=4 * 2**30))
    cluster.open("first", priority=1, resources=Resources(cpu=1))
    cluster.report(cluster.bind("first", "a"))
    cluster.open("s", demand=True, resources=asks)
    assert cluster.plan().waits == {"s": reason}


def test_without_a_node_that_is_said() -> None:
    cluster = Cluster()
    cluster.open("s", demand=True)
    assert cluster.plan().waits == {"s": "no node is ready"}


def test_news_of_what_sessions_wait_for_come_once() -> None:
    cluster = Cluster()
    for name in ("a", "b"):
        cluster.open(name, demand=True)
    view = cluster.view
    assert sorted(known.id for known in view.planned(plan(view, NOW))) == ["a", "b"]
    assert view.planned(plan(view, NOW)) == []
    view.put_node("n", node("n", cpu=0.01), NOW)
    assert sorted(known.id for known in view.planned(plan(view, NOW))) == ["a", "b"]
    assert "no node has" in view.sessions["a"].waits_for or "the most any node has" in view.sessions["a"].waits_for
    view.put_node("m", node("m"), NOW)
    assert sorted(known.id for known in view.planned(plan(view, NOW))) == ["a", "b"]
    assert [known.waits_for for known in view.sessions.values()] == ["", ""]


def test_what_needs_nothing_costs_nothing() -> None:
    view = View()
    view.put_application(APPLICATION, application())
    cluster = Cluster()
    cluster.view = view
    view.put_node("n", node("n"), NOW)
    for number in range(10):
        cluster.open(f"s{number}")
        cluster.report(cluster.bind(f"s{number}", "n"), ExecutorState.BOUND)
    view.planned(plan(view, NOW))
    assert view.due(NOW + 1000) == []
    assert view.next_due(NOW) == math.inf


# ---- nodes that serve one application


def bound_to(cluster: Cluster, name: str) -> list[str]:
    return next((step.bind for step in cluster.plan().steps if step.session == name), [])


def test_a_process_that_somebody_has_attached_is_taken_first() -> None:
    cluster = Cluster(node("a", cpu=100.0), attached("b"))
    cluster.open("s", demand=True, min_instances=2)
    assert sorted(bound_to(cluster, "s")) == ["a", "b"]
    cluster = Cluster(node("a", cpu=100.0), attached("b"))
    cluster.open("s", demand=True)
    assert bound_to(cluster, "s") == ["b"]


def test_an_attached_process_is_not_tried_again_at_once_where_the_session_just_failed() -> None:
    cluster = Cluster(node("a"), attached("b"))
    cluster.open("s", demand=True).avoid = "b"
    assert bound_to(cluster, "s") == ["a"]
    cluster = Cluster(attached("b"))
    cluster.open("s", demand=True).avoid = "b"
    assert bound_to(cluster, "s") == ["b"]


def test_an_attached_process_serves_whatever_its_session_asks_for() -> None:
    cluster = Cluster(node("a"), attached("b"))
    asks = Resources(0.1, 0, 1)
    cluster.open("s", demand=True, resources=asks)
    assert bound_to(cluster, "s") == ["b"]
    cluster.open("t", demand=True, resources=asks, created=2.0)
    made = cluster.plan()
    assert made.waits == {"t": "needs gpu=1; no node has one"}


def test_who_needs_more_at_once_than_are_attached_is_told_what_no_node_has() -> None:
    cluster = Cluster(node("a"), attached("b"))
    cluster.open("s", min_instances=2, resources=Resources(0.1, 0, 1))
    made = cluster.plan()
    assert (made.steps, made.waits) == ([], {"s": "needs gpu=1; no node has one"})


def test_room_for_those_that_begin_at_once_is_made_besides_what_is_attached() -> None:
    cluster = Cluster(node("a", cpu=1.0), attached("b"))
    low = cluster.open("low", resources=Resources(1.0, 0, 0), max_instances=1)
    bound = cluster.bind("low", "a")
    cluster.report(bound)
    assert served(low)
    cluster.open("high", min_instances=2, priority=1, resources=Resources(1.0, 0, 0))
    made = cluster.plan()
    assert made.waits == {"high": reasons.ROOM_IS_MADE}
    assert [(step.session, step.leave, step.bind) for step in made.steps] == [("low", [key_of(bound)], [])]


def test_an_attached_process_that_is_idle_is_kept_and_never_taken_for_another_session() -> None:
    cluster = Cluster(attached("b"), delay_release_s=0.0)
    cluster.open("s")
    cluster.report(cluster.bind("s", "b"), idle_for_s=1000.0)
    cluster.open("t", demand=True, priority=2)
    made = cluster.plan()
    assert made.steps == []
    assert made.waits == {"t": reasons.NO_COMMON_NODE}


def test_an_attached_process_adds_nothing_to_what_the_cluster_has() -> None:
    cluster = Cluster(node("a", cpu=2.0), attached("b", "other"), attached("c", "other"))
    for number in range(3):
        cluster.open(f"s{number}", demand=True, resources=Resources(1.0, 0, 0), created=float(number))
    made = cluster.plan()
    assert sorted(name for step in made.steps for name in step.bind) == ["a", "a"]
    assert made.waits == {"s2": "needs cpu=1; no node has that much free now"}
