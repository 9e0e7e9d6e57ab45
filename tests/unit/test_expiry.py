"""Tasks that expire while nobody serves their session get their records in time, are counted, and cost little."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from flame.broker.memory import MemoryServer
from flame.protocol import subjects, topology
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import Attempts, ResultRecord, TaskMessage, TaskOptions
from flame.protocol.records import ApplicationRecord, ApplicationSpec, BindingRecord, SessionRecord
from flame.protocol.states import TaskState
from flame_services.scheduler import expiry
from flame_services.scheduler.expiry import ROUND_S, Expiry
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View
from tests.support.virtual_time import run_virtually

APP = "app"
IN_TIME_S = 2 * ROUND_S


class Site:
    """Sessions that wait for executors, and who looks after their tasks."""

    def __init__(self, expires_s: float = 0.0) -> None:
        self.broker = MemoryServer().connect("scheduler")
        self.view = View()
        self.store = Store(self.broker, self.view)
        self.holding: Iterable[str] = ["s"]
        recorder = Recorder(self.broker, self.store, "scheduler")
        self.withdrawn: list[str] = []
        self.expiry = Expiry(self.broker, self.view, self.store, recorder, lambda: self.holding, self.withdrawn.append)
        self._spec = ApplicationSpec(command="x", expires_s=expires_s)

    async def start(self) -> None:
        for bucket in topology.buckets():
            await self.broker.ensure_bucket(bucket)
        for stream in topology.application_streams(APP):
            await self.broker.ensure_stream(stream)
        await self.store.start()
        await self.store.applications.create(APP, ApplicationRecord(name=APP, spec=self._spec, created=1.0))
        self.expiry.start()

    async def session(self, name: str, epoch: int = 0) -> None:
        record = SessionRecord(id=name, application=APP, created=time.time(), epoch=epoch)
        await self.store.sessions.create(name, record)

    async def task(self, name: str, expires_s: float | None = None, session: str = "s") -> None:
        options = None if expires_s is None else TaskOptions(expires_s=expires_s)
        data = TaskMessage(b"", options=options).encode()
        await self.broker.store(subjects.task(APP, session, name), data, 5)

    async def waiting(self) -> list[str]:
        stored = await self.broker.subjects(subjects.task_stream(APP), ">")
        return sorted(subjects.parse_task(subject).task for subject in stored)

    async def record(self, name: str) -> ResultRecord | None:
        found = await self.broker.last(subjects.result_stream(APP), subjects.result(APP, "s", name))
        return None if found is None else ResultRecord.decode(found.data)


def at_site(test: Callable[[Site], Awaitable[None]], expires_s: float = 0.0) -> None:
    async def program() -> None:
        site = Site(expires_s)
        await site.start()
        await test(site)
        await site.expiry.stop()
        await site.store.stop()
        await site.broker.close()

    run_virtually(program(), limit_s=24 * 3600)


def test_a_task_fails_when_it_has_expired() -> None:
    async def test(site: Site) -> None:
        await site.session("s")
        await site.task("soon", 10)
        await site.task("later", 30)
        await site.task("never", 0)
        await asyncio.sleep(10 - ROUND_S / 2)
        assert await site.waiting() == ["later", "never", "soon"]
        await asyncio.sleep(IN_TIME_S)
        assert await site.waiting() == ["later", "never"]
        assert site.withdrawn == []
        record = await site.record("soon")
        assert record is not None
        assert record.error is not None
        assert (record.state, record.error.code) == (TaskState.FAILED, ErrorCode.TASK_EXPIRED)
        assert (record.executor, record.attempt, record.started) == ("", 0, 0)
        await asyncio.sleep(20)
        assert await site.waiting() == ["never"]
        session = site.view.sessions["s"].record
        assert (session.failed, session.writer) == (2, "")

    at_site(test)


def test_an_applications_tasks_expire_unless_they_say_otherwise() -> None:
    async def test(site: Site) -> None:
        await site.session("s")
        await site.task("own", 100)
        await site.task("t")
        await asyncio.sleep(10 + IN_TIME_S)
        assert await site.waiting() == ["own"]

    at_site(test, expires_s=10)


def test_a_task_that_was_started_once_does_not_expire() -> None:
    async def test(site: Site) -> None:
        await site.session("s", epoch=3)
        for name in ("started", "waiting"):
            await site.task(name, 10)
        await site.broker.bucket(subjects.ATTEMPTS).put(f"{APP}.s.started", Attempts(raised=1).encode())
        await asyncio.sleep(10 + IN_TIME_S)
        assert await site.waiting() == ["started"]

    at_site(test)


def test_tasks_of_a_session_that_is_served_are_left_to_its_executors() -> None:
    async def test(site: Site) -> None:
        await site.session("s")
        await site.task("t", 10)
        await asyncio.sleep(5)
        binding = BindingRecord(
            executor="x", node="n", application=APP, session="s", epoch=1, consumer="s-1", created=1.0
        )
        await site.store.bindings.create("n.x", binding)
        await asyncio.sleep(60)
        assert await site.waiting() == ["t"]

    at_site(test)


def test_many_tasks_expire_in_time() -> None:
    async def test(site: Site) -> None:
        await site.session("s")
        for number in range(expiry.MOST + 100):
            await site.task(f"t{number}", 60)
        await asyncio.sleep(60 + 2 * IN_TIME_S)
        assert await site.waiting() == []
        assert site.view.sessions["s"].record.failed == expiry.MOST + 100

    at_site(test)


def test_many_sessions_get_their_turns() -> None:
    async def test(site: Site) -> None:
        names = [f"s{number}" for number in range(5 * expiry.IN_TURNS)]
        site.holding = names
        for name in names:
            await site.session(name)
            await site.task(f"t-{name}", 30, name)
        await asyncio.sleep(30 + IN_TIME_S)
        assert await site.waiting() == []
        for name in names:
            await site.task(f"u-{name}", 1, name)
        await asyncio.sleep(6 * ROUND_S)
        assert await site.waiting() == []

    at_site(test)


def test_a_session_whose_tasks_are_gone_waits_no_more() -> None:
    async def test(site: Site) -> None:
        await site.session("s")
        await site.task("expires", 10)
        await site.task("cancelled", 0)
        await site.broker.purge(subjects.task_stream(APP), subjects.task(APP, "s", "cancelled"))
        await asyncio.sleep(5)
        assert site.withdrawn == []
        site.holding = ["s"]
        await asyncio.sleep(5 + IN_TIME_S)
        assert site.withdrawn[:1] == ["s"]

    at_site(test)


def test_nothing_of_sessions_that_wait_no_more_is_remembered() -> None:
    async def test(site: Site) -> None:
        await site.session("s")
        await site.task("t", 30)
        await asyncio.sleep(IN_TIME_S)
        assert list(site.expiry._known) == ["s"]
        site.holding = []
        await asyncio.sleep(IN_TIME_S)
        assert site.expiry._known == {}

    at_site(test)
