"""When a session that nobody serves is noticed to have a task that may be started: at once, in time, or not at all."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

import pytest

from flame.broker.memory import Faults, MemoryServer
from flame.protocol import subjects, topology
from flame.protocol.messages import Attempts, TaskMessage, TaskOptions
from flame.protocol.records import ApplicationRecord, ApplicationSpec, BindingRecord, SessionRecord
from flame.protocol.states import CloseMode, SessionState
from flame_services.scheduler.demand import LOOKS_S, Demand
from flame_services.scheduler.view import View
from tests.support.virtual_time import run_virtually

APP = "app"
SESSION = "s"
SOON_S = 0.1
"""What anything that happens at once takes at most."""


class Site:
    """A session that nobody serves, and who listens for its tasks."""

    def __init__(self, **spec: float) -> None:
        self.server = MemoryServer()
        self.broker = self.server.connect("scheduler")
        self.client = self.server.connect("client")
        self.view = View()
        self.demands = 0
        self.demand = Demand(self.broker, self.view, self._on_demand)
        self.spec = ApplicationSpec(command="x", **spec)  # type: ignore[arg-type]
        self.record = SessionRecord(id=SESSION, application=APP, created=time.time())
        self._revision = 0

    def _on_demand(self) -> None:
        self.demands += 1

    async def start(self) -> None:
        for bucket in topology.buckets():
            await self.broker.ensure_bucket(bucket)
        await self.broker.ensure_stream(topology.task_stream(APP))
        self.view.put_application(APP, ApplicationRecord(name=APP, spec=self.spec, created=1.0))
        self.put(self.record)
        await self.demand.start()
        await asyncio.sleep(SOON_S)

    def put(self, record: SessionRecord) -> None:
        """Have the view hold this of the session."""
        self._revision += 1
        self.record = record
        self.view.put_session(SESSION, record, self._revision)
        self.demand.review(SESSION)

    def serve(self) -> None:
        """Have an executor serve the session."""
        binding = BindingRecord(
            executor="x", node="n", application=APP, session=SESSION, epoch=1, consumer="s-1", created=1.0
        )
        self.view.put_binding("n.x", binding)
        self.put(self.record.changed(epoch=1))

    def leave(self) -> None:
        """Have it leave."""
        self.view.put_binding("n.x", None)
        self.demand.review(SESSION)

    async def store(self, task: str, delay_s: float | None = None) -> None:
        options = None if delay_s is None else TaskOptions(delay_s=delay_s)
        data = TaskMessage(b"", options=options).encode()
        await self.client.store(subjects.task(APP, SESSION, task), data, 5)

    async def attempts(self, task: str, attempts: Attempts) -> None:
        await self.client.bucket(subjects.ATTEMPTS).put(f"{APP}.{SESSION}.{task}", attempts.encode())

    @property
    def found(self) -> bool:
        return self.view.sessions[SESSION].demand

    async def found_after(self, limit_s: float = 3600) -> float:
        """Return how long it takes until the session is marked."""
        begun = time.time()
        while not self.found:
            await asyncio.sleep(0.01)
            if time.time() - begun > limit_s:
                raise AssertionError(f"not found within {limit_s:g} s")
        return time.time() - begun

    async def stop(self) -> None:
        await self.demand.stop()
        await self.broker.close()
        await self.client.close()


def at_site(test: Callable[[Site], Awaitable[None]], **spec: float) -> None:
    async def program() -> None:
        site = Site(**spec)
        await test(site)
        await site.stop()

    run_virtually(program(), limit_s=24 * 3600)


def test_a_task_is_noticed_at_once() -> None:
    async def test(site: Site) -> None:
        await site.start()
        assert not site.found
        await site.store("t")
        assert await site.found_after() < SOON_S
        assert site.demands == 1

    at_site(test)


def test_a_task_that_was_there_before_is_noticed_at_once() -> None:
    async def test(site: Site) -> None:
        await site.broker.ensure_stream(topology.task_stream(APP))
        await site.store("t")
        await site.start()
        assert site.found

    at_site(test)


def test_a_task_is_noticed_although_nothing_was_heard_of_it() -> None:
    async def test(site: Site) -> None:
        site.server.faults = Faults(lose_live=1)
        await site.start()
        await site.store("t")
        assert await site.found_after() < LOOKS_S[-1] + SOON_S

    at_site(test)


@pytest.mark.parametrize("by", ["task", "application"])
def test_a_delayed_task_is_noticed_when_it_may_be_started(by: str) -> None:
    async def test(site: Site) -> None:
        await site.start()
        await site.store("t", 100 if by == "task" else None)
        assert 99 < await site.found_after() < 100 + SOON_S

    at_site(test, delay_s=0 if by == "task" else 100)


def test_a_delay_counts_from_when_the_task_was_stored() -> None:
    async def test(site: Site) -> None:
        await site.broker.ensure_stream(topology.task_stream(APP))
        await site.store("t", 100)
        await asyncio.sleep(60)
        await site.start()
        assert 39 < await site.found_after() < 40 + SOON_S

    at_site(test)


def test_a_task_that_is_due_at_once_does_not_wait_for_those_before_it() -> None:
    async def test(site: Site) -> None:
        await site.start()
        for number in range(20):
            await site.store(f"late{number}", 1000)
        await asyncio.sleep(50)
        assert not site.found
        await site.store("now", 0)
        assert await site.found_after() < SOON_S

    at_site(test, delay_s=500)


def test_the_first_of_many_delayed_tasks_counts() -> None:
    async def test(site: Site) -> None:
        await site.broker.ensure_stream(topology.task_stream(APP))
        for task, delay_s in (("a", 300), ("b", 200), ("c", 400)):
            await site.store(task, delay_s)
        await site.start()
        await site.store("d", 250)
        assert 199 < await site.found_after() < 200 + SOON_S

    at_site(test)


def test_delayed_tasks_are_remembered_when_a_session_is_served_meanwhile() -> None:
    async def test(site: Site) -> None:
        await site.start()
        await site.store("t", 100)
        site.serve()
        await asyncio.sleep(50)
        assert not site.found
        site.leave()
        assert 49 < await site.found_after() < 50 + SOON_S

    at_site(test)


def test_a_task_that_was_taken_away_meanwhile_binds_nobody() -> None:
    async def test(site: Site) -> None:
        await site.start()
        await site.store("t", 100)
        await site.store("later", 300)
        await site.client.purge(subjects.task_stream(APP), subjects.task(APP, SESSION, "t"))
        assert 299 < await site.found_after() < 300 + SOON_S

    at_site(test)


def test_a_task_that_is_to_be_tried_again_later_is_noticed_then() -> None:
    async def test(site: Site) -> None:
        await site.start()
        site.serve()
        await site.store("t")
        await site.attempts("t", Attempts(raised=1, not_before=time.time() + 30))
        site.leave()
        assert 29 < await site.found_after() < 30 + SOON_S

    at_site(test)


def test_a_task_that_an_executor_was_lost_with_is_noticed_at_once() -> None:
    async def test(site: Site) -> None:
        await site.start()
        site.serve()
        await site.store("t")
        await site.attempts("t", Attempts(lost=1))
        site.leave()
        assert await site.found_after() < SOON_S

    at_site(test)


def test_what_is_no_task_is_noticed_too() -> None:
    async def test(site: Site) -> None:
        await site.start()
        await site.client.store(subjects.task(APP, SESSION, "t"), b"rubbish", 5)
        assert await site.found_after() < SOON_S

    at_site(test, delay_s=500)


def test_a_delayed_task_that_nobody_heard_of_is_found_by_a_recheck() -> None:
    async def test(site: Site) -> None:
        await site.start()
        await site.store("first", 1000)
        await asyncio.sleep(2 * sum(LOOKS_S))
        site.server.faults = Faults(lose_live=1)
        await site.store("t", 100)
        await asyncio.sleep(60)
        site.demand.recheck(SESSION)
        assert 39 < await site.found_after() < 40 + SOON_S

    at_site(test)


def test_a_session_that_drains_is_listened_for_and_one_that_closes_is_not() -> None:
    async def test(site: Site) -> None:
        await site.start()
        site.put(site.record.changed(state=SessionState.CLOSING, close_mode=CloseMode.DRAIN))
        await site.store("t", 100)
        assert 99 < await site.found_after() < 100 + SOON_S
        site.put(site.record.changed(close_mode=CloseMode.CLOSE))
        assert not site.found
        await asyncio.sleep(200)
        assert not site.found
        assert list(site.demand.holding()) == []

    at_site(test)


def test_a_session_is_idle_only_when_it_is_known_to_hold_no_task() -> None:
    async def test(site: Site) -> None:
        await site.start()
        session = site.view.sessions[SESSION]
        assert site.view.idle_limit(session) == site.record.created + site.spec.idle_timeout_s
        await site.store("t", 100)
        await asyncio.sleep(SOON_S)
        assert site.view.idle_limit(session) == math.inf
        await site.client.purge(subjects.task_stream(APP), subjects.task(APP, SESSION, "t"))
        await asyncio.sleep(100)
        assert site.view.idle_limit(session) == site.record.created + site.spec.idle_timeout_s

    at_site(test)


def test_a_session_is_not_idle_while_its_tasks_can_not_be_looked_for() -> None:
    async def test(site: Site) -> None:
        await site.start()
        site.serve()
        site.server.faults = Faults(lose_requests=1)
        site.leave()
        await asyncio.sleep(5)
        assert site.view.sessions[SESSION].holds_tasks

    at_site(test)


def test_a_session_whose_task_is_gone_is_listened_for_again() -> None:
    async def test(site: Site) -> None:
        await site.start()
        await site.store("t")
        await site.found_after()
        await site.client.purge(subjects.task_stream(APP), subjects.task(APP, SESSION, "t"))
        site.demand.withdraw(SESSION)
        await asyncio.sleep(SOON_S)
        assert not site.found
        await site.store("u")
        assert await site.found_after() < SOON_S

    at_site(test)


def test_sessions_with_tasks_that_nobody_serves_are_known() -> None:
    async def test(site: Site) -> None:
        await site.start()
        assert list(site.demand.holding()) == []
        await site.store("t", 100)
        await asyncio.sleep(SOON_S)
        assert list(site.demand.holding()) == [SESSION]
        await site.found_after()
        assert list(site.demand.holding()) == [SESSION]
        site.serve()
        assert not site.found
        assert list(site.demand.holding()) == []

    at_site(test)
