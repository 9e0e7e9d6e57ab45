"""Which changes are announced, as what, and that nobody is held up by it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flame.broker.memory import MemoryServer
from flame.broker.seam import LiveMessage
from flame.errors import BrokerUnavailable
from flame.protocol import subjects, topology
from flame.protocol.codes import ReasonCode
from flame.protocol.events import ClusterEvent, Noun
from flame.protocol.records import (
    ApplicationRecord,
    ApplicationSpec,
    BindingRecord,
    ExecutorRecord,
    NodeRecord,
    SessionRecord,
)
from flame.protocol.resources import Resources
from flame.protocol.states import ApplicationState, CloseMode, ExecutorState, NodeState, SessionState
from flame_services.scheduler import herald as herald_module
from flame_services.scheduler.changes import (
    Judgement,
    application_event,
    executor_event,
    node_event,
    session_event,
)
from flame_services.scheduler.herald import Herald
from flame_services.scheduler.planner import Planner
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View
from tests.support.virtual_time import run_virtually

APPLICATION = ApplicationRecord(name="a", spec=ApplicationSpec(command="x"), created=5.0)
OPEN = SessionRecord(id="s", application="a", created=10.0)
CLOSING = OPEN.changed(state=SessionState.CLOSING, close_mode=CloseMode.DRAIN)
CLOSED = CLOSING.changed(state=SessionState.CLOSED, settled=True, ended=20.0)
FAILED = OPEN.changed(state=SessionState.FAILED, ended=30.0, reason="no such luck", code=ReasonCode.RETRY_LIMIT)
STARTING = ExecutorRecord(
    id="x", node="n", application="a", session="s", epoch=1, state=ExecutorState.STARTING, created=1.0, updated=2.0
)
BOUND = STARTING.changed(state=ExecutorState.BOUND, entered=True, updated=3.0)
RELEASED = STARTING.changed(
    state=ExecutorState.RELEASED, clean=False, updated=4.0, reason="it broke", code=ReasonCode.ENTER_FAILED
)
READY = Judgement(NodeState.READY, stopping=False)
UNKNOWN = Judgement(NodeState.UNKNOWN, stopping=False)
GIVEN_UP = Judgement(NodeState.NOT_READY, stopping=False)


def told(event: ClusterEvent | None) -> tuple[str, str, str] | None:
    return None if event is None else (event.event, event.before, event.state)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, OPEN, ("open", "", "open")),
        (OPEN, OPEN.changed(epoch=3, succeeded=9, counted=("x",)), None),
        (OPEN, CLOSING, ("closing", "open", "closing")),
        (CLOSING, CLOSING.changed(close_mode=CloseMode.FORCE), ("closing", "closing", "closing")),
        (CLOSING, CLOSED, ("closed", "closing", "closed")),
        (OPEN, CLOSED, ("closed", "open", "closed")),
        (OPEN, FAILED, ("failed", "open", "failed")),
        (FAILED, FAILED.changed(settled=True), ("settled", "failed", "failed")),
        (CLOSED, None, ("removed", "closed", "")),
        (None, None, None),
    ],
)
def test_a_change_of_a_session(
    before: SessionRecord | None, after: SessionRecord | None, expected: tuple[str, str, str] | None
) -> None:
    assert told(session_event(before, after)) == expected


def test_an_event_of_a_session_says_why_and_when() -> None:
    event = session_event(OPEN, FAILED)
    assert event is not None
    assert (event.reason, event.code, event.at) == ("no such luck", "retry_limit", 30.0)
    assert (event.application, event.session, event.id) == ("a", "s", "s")
    created = session_event(None, OPEN)
    assert created is not None
    assert created.at == 10.0


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, APPLICATION, ("enabled", "", "enabled")),
        (APPLICATION, APPLICATION, None),
        (
            APPLICATION,
            APPLICATION.changed(spec=ApplicationSpec(command="y"), updated=6.0),
            ("updated", "enabled", "enabled"),
        ),
        (APPLICATION, APPLICATION.changed(state=ApplicationState.DISABLED), ("disabled", "enabled", "disabled")),
        (APPLICATION, None, ("removed", "enabled", "")),
        (None, None, None),
    ],
)
def test_a_change_of_an_application(
    before: ApplicationRecord | None, after: ApplicationRecord | None, expected: tuple[str, str, str] | None
) -> None:
    assert told(application_event(before, after)) == expected


@pytest.mark.parametrize(
    ("before", "after", "expected", "code"),
    [
        (None, STARTING, ("starting", "", "starting"), ""),
        (STARTING, STARTING.changed(pid=7), None, ""),
        (STARTING, BOUND, ("bound", "starting", "bound"), ""),
        (BOUND, BOUND.changed(succeeded=7, running=1), None, ""),
        (STARTING, RELEASED, ("released", "starting", "released"), ReasonCode.ENTER_FAILED),
        (RELEASED, None, None, ""),
        (BOUND, None, ("released", "bound", "released"), ReasonCode.UNBOUND),
        (None, None, None, ""),
    ],
)
def test_a_change_of_an_executor(
    before: ExecutorRecord | None,
    after: ExecutorRecord | None,
    expected: tuple[str, str, str] | None,
    code: str,
) -> None:
    event = executor_event(before, after, node_lost=False)
    assert told(event) == expected
    if event is not None:
        assert event.code == code
        assert (event.node, event.session, event.executor) == ("n", "s", "x")


def test_an_executor_whose_node_is_lost_says_so() -> None:
    event = executor_event(BOUND, None, node_lost=True)
    assert event is not None
    assert event.code == ReasonCode.NODE_LOST


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, READY, ("ready", "", "ready")),
        (READY, READY, None),
        (READY, UNKNOWN, ("unknown", "ready", "unknown")),
        (UNKNOWN, GIVEN_UP, ("not ready", "unknown", "not ready")),
        (GIVEN_UP, READY, ("ready", "not ready", "ready")),
        (READY, Judgement(NodeState.READY, stopping=True), ("stopping", "ready", "ready")),
        (Judgement(NodeState.READY, stopping=True), READY, ("ready", "ready", "ready")),
        (READY, None, ("removed", "ready", "")),
    ],
)
def test_a_change_of_a_node(
    before: Judgement | None, after: Judgement | None, expected: tuple[str, str, str] | None
) -> None:
    assert told(node_event("n", before, after)) == expected


class Listener:
    """Keeps every event that is published in a cluster."""

    def __init__(self) -> None:
        self.broker = MemoryServer().connect("listener")
        self.events: list[ClusterEvent] = []

    async def start(self) -> None:
        for subject in (subjects.all_session_events(), subjects.node_events("*"), subjects.application_events("*")):
            await self.broker.subscribe(subject, self._on_event)

    def _on_event(self, message: LiveMessage) -> None:
        self.events.append(ClusterEvent.decode(message.data))

    def told(self) -> list[tuple[str, str, str]]:
        """What was announced, by noun, id and event."""
        return [(event.noun.value, event.id, event.event) for event in self.events]


def test_every_change_that_a_store_learns_of_is_announced_once_and_in_order() -> None:
    async def program() -> None:
        listener = Listener()
        await listener.start()
        broker = listener.broker
        for bucket in topology.buckets():
            await broker.ensure_bucket(bucket)
        view = View()
        store = Store(broker, view)
        await store.start()
        await store.sessions.create("early", OPEN.changed(id="early"))
        herald = store.herald = Herald(broker, view)
        await store.applications.create("a", APPLICATION)
        await store.sessions.create("s", OPEN)
        binding = BindingRecord(
            executor="x", node="n", application="a", session="s", epoch=1, consumer="s-1", created=1.0
        )
        await store.nodes.put(
            "n",
            NodeRecord(name="n", hostname="h", arch="x", os="y", capacity=Resources(4, 2**30, 0), started=1.0),
        )
        await store.bindings.create("n.x", binding)
        for record in (STARTING, STARTING.changed(pid=3), BOUND, BOUND.changed(succeeded=3), RELEASED):
            await store.executors.put("n.x", record)
        await store.bindings.delete("n.x")
        await store.executors.delete("n.x")
        await store.sessions.put("s", CLOSING)
        for data in (b"rubbish", CLOSED.encode()):
            await broker.bucket(subjects.SESSIONS).put("s", data)
            await store.sessions.refresh("s")
        await store.nodes.delete("n")
        await store.applications.delete("a")
        await asyncio.sleep(1)  # of virtual time: the watches have said everything again
        await herald.stop()
        assert listener.told() == [
            ("application", "a", "enabled"),
            ("session", "s", "open"),
            ("node", "n", "ready"),
            ("executor", "x", "starting"),
            ("executor", "x", "bound"),
            ("executor", "x", "released"),
            ("session", "s", "closing"),
            ("session", "s", "closed"),
            ("node", "n", "removed"),
            ("application", "a", "removed"),
        ]
        records = [SessionRecord.decode(event.record) for event in listener.events if event.noun is Noun.SESSION]
        assert records[:2] == [OPEN, CLOSING]
        await store.stop()

    run_virtually(program())


def test_a_failed_attempt_says_which_it_is_and_why() -> None:
    async def program() -> list[ClusterEvent]:
        listener = Listener()
        await listener.start()
        view = View()
        view.put_application("a", APPLICATION)
        view.put_session("s", OPEN, 1)
        view.put_binding(
            "n.x",
            BindingRecord(executor="x", node="n", application="a", session="s", epoch=1, consumer="s-1", created=1.0),
        )
        view.put_executor("n.x", RELEASED, 0.0)
        herald = Herald(listener.broker, view)
        again = OPEN.changed(bind_failures=2)
        session = view.put_session("s", again, 2)
        assert session is not None
        session.retry_at = asyncio.get_running_loop().time() + 1.5
        herald.session(OPEN, again)
        failed = FAILED.changed(bind_failures=5)
        view.put_session("s", failed, 3)
        herald.session(again, failed)
        await herald.stop()
        await asyncio.sleep(1)
        return listener.events

    retrying, failed = run_virtually(program())
    assert (retrying.event, retrying.state, failed.event) == ("retrying", "open", "failed")
    assert retrying.reason == "attempt 2 of 5 failed, next in 1.5 s: it broke"
    assert (retrying.executor, retrying.node, retrying.code) == ("x", "n", "enter_failed")


def test_what_a_session_waits_for_is_told() -> None:
    async def program() -> list[ClusterEvent]:
        listener = Listener()
        await listener.start()
        view = View()
        session = view.put_session("s", OPEN, 1)
        assert session is not None
        herald = Herald(listener.broker, view)
        for reason in ("needs gpu=1; no node has one", ""):
            session.waits_for = reason
            herald.waits(session)
        await herald.stop()
        await asyncio.sleep(1)
        return listener.events

    events = run_virtually(program())
    assert [(event.event, event.reason) for event in events] == [
        ("waiting", "needs gpu=1; no node has one"),
        ("waiting", ""),
    ]


async def test_a_broker_that_takes_nothing_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(herald_module, "MOST_WAITING", 3)
    taken: list[str] = []
    open_again = asyncio.Event()

    async def publish(subject: str, _data: bytes) -> None:
        await open_again.wait()
        if subject.endswith("2"):
            raise BrokerUnavailable("not now")
        taken.append(subject)

    herald = Herald(cast(Any, SimpleNamespace(publish=publish)), View())
    for number in range(6):
        herald.node(f"n{number}", None, READY)
        await asyncio.sleep(0)  # the first one is under way
    open_again.set()
    await herald.stop()
    assert taken == [subjects.node_events(name) for name in ("n0", "n3", "n4", "n5")]
    await herald.stop()


def test_only_the_scheduler_that_plans_announces() -> None:
    async def program() -> None:
        listener = Listener()
        await listener.start()
        broker = listener.broker
        for bucket in topology.buckets():
            await broker.ensure_bucket(bucket)
        view = View()
        store = Store(broker, view)
        await store.start()
        planner = Planner(broker, view, store, Recorder(broker, store, "scheduler"))
        await store.sessions.create("before", OPEN.changed(id="before"))
        await planner.start()
        await store.sessions.create("while", OPEN.changed(id="while"))
        await planner.stop()
        await store.sessions.create("after", OPEN.changed(id="after"))
        await asyncio.sleep(1)
        await store.stop()
        assert listener.told() == [("session", "while", "open")]

    run_virtually(program())
