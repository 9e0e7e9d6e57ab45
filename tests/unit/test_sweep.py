"""What a look at everything finds, and what it leaves alone since it can't be read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from flame.broker.memory import MemoryServer
from flame.protocol import defaults, subjects, topology
from flame.protocol.codec import VERSION, pack
from flame.protocol.messages import TaskMessage
from flame.protocol.records import ApplicationRecord, ApplicationSpec, SessionRecord
from flame.protocol.states import SessionState
from flame_services.scheduler.store import Store
from flame_services.scheduler.sweep import SWEEP_S, Sweep
from flame_services.scheduler.view import View
from tests.support.virtual_time import run_virtually

APP = "app"
STREAM = subjects.task_stream(APP)
NEWER = pack({"v": VERSION + 1, "kind": "unheard of"})


class Site:
    """An application, and who sweeps it."""

    def __init__(self) -> None:
        self.broker = MemoryServer().connect("scheduler")
        self.view = View()
        self.store = Store(self.broker, self.view)
        self.rechecked: list[str] = []
        self.orphans: list[str] = []
        self.sweep = Sweep(
            self.broker, self.view, self.store, self.rechecked.append, lambda _, session: self.orphans.append(session)
        )

    async def start(self) -> None:
        for bucket in topology.buckets():
            await self.broker.ensure_bucket(bucket)
        for stream in topology.application_streams(APP):
            await self.broker.ensure_stream(stream)
        application = ApplicationRecord(name=APP, spec=ApplicationSpec(command="x"), created=1.0)
        await self.broker.bucket(subjects.APPLICATIONS).put(APP, application.encode())
        await self.store.start()
        self.sweep.start()

    async def session(self, name: str, **fields: object) -> SessionRecord:
        record = SessionRecord(id=name, application=APP, created=time.time()).changed(**fields)
        await self.store.sessions.create(name, record)
        return record

    async def task(self, session: str) -> None:
        await self.broker.store(subjects.task(APP, session, "t"), TaskMessage(b"").encode(), 5)

    async def consumer(self, session: str, epoch: int) -> None:
        await self.broker.create_consumer(topology.session_consumer(APP, session, epoch, 1))

    async def consumers(self) -> list[str]:
        return sorted(consumer.name for consumer in await self.broker.consumers(STREAM))

    async def swept(self) -> None:
        """Wait until everything was looked at closely."""
        await asyncio.sleep(2.5 * SWEEP_S)


def at_site(test: Callable[[Site], Awaitable[None]]) -> None:
    async def program() -> None:
        site = Site()
        await site.start()
        await test(site)
        await site.sweep.stop()
        await site.store.stop()
        await site.broker.close()

    run_virtually(program())


def test_tasks_of_an_open_session_are_looked_at_again() -> None:
    async def test(site: Site) -> None:
        await site.session("open")
        await site.task("open")
        await site.swept()
        assert (site.rechecked, site.orphans) == (["open"], [])

    at_site(test)


def test_tasks_of_a_session_that_is_over_or_never_was_are_given_up() -> None:
    async def test(site: Site) -> None:
        await site.session("over", state=SessionState.CLOSED, settled=True, ended=time.time())
        await site.task("over")
        await site.task("nobody")
        await site.swept()
        assert sorted(site.orphans) == ["nobody", "over"]

    at_site(test)


def test_a_session_that_can_not_be_read_is_left_alone() -> None:
    async def test(site: Site) -> None:
        await site.broker.bucket(subjects.SESSIONS).put("newer", NEWER)
        await site.task("newer")
        await site.consumer("newer", 1)
        await site.swept()
        assert (site.rechecked, site.orphans) == ([], [])
        assert await site.consumers() == ["newer-1"]

    at_site(test)


def test_a_session_that_is_rewritten_by_a_newer_scheduler_is_left_alone() -> None:
    async def test(site: Site) -> None:
        await site.session("s")
        await site.task("s")
        await site.consumer("s", 1)
        await site.broker.bucket(subjects.SESSIONS).put("s", NEWER)
        await asyncio.sleep(1)
        assert site.view.sessions == {}
        await site.swept()
        assert (site.rechecked, site.orphans) == ([], [])
        assert await site.consumers() == ["s-1"]

    at_site(test)


def test_a_session_with_a_binding_that_can_not_be_read_is_left_alone() -> None:
    async def test(site: Site) -> None:
        await site.session("s", epoch=1)
        await site.task("s")
        await site.consumer("s", 1)
        newer = pack({"v": VERSION + 1, "session": "s"})
        await site.broker.bucket(subjects.BINDINGS).put("n.x", newer)
        await site.swept()
        assert (site.rechecked, site.orphans) == ([], [])
        assert await site.consumers() == ["s-1"]

    at_site(test)


def test_a_session_that_the_watch_has_not_told_of_is_no_orphan() -> None:
    async def test(site: Site) -> None:
        watch = site.store._subscriptions[1]
        await watch.stop()
        record = SessionRecord(id="unheard", application=APP, created=time.time())
        await site.broker.bucket(subjects.SESSIONS).create("unheard", record.encode())
        await site.task("unheard")
        await site.swept()
        assert (site.rechecked, site.orphans) == (["unheard"], [])
        assert site.view.sessions["unheard"].record == record

    at_site(test)


def test_consumers_that_no_session_needs_are_deleted() -> None:
    async def test(site: Site) -> None:
        await site.session("bound", epoch=2)
        await site.consumer("bound", 1)
        await site.consumer("behind", 1)
        await site.consumer("nobody", 1)
        await site.session("behind", epoch=0)
        await site.swept()
        assert await site.consumers() == ["behind-1"]

    at_site(test)


def test_sessions_are_forgotten_when_their_results_have_aged_out() -> None:
    async def test(site: Site) -> None:
        old = time.time() - defaults.RESULT_AGE_S - 1
        await site.store.common_data.put("old.1", b"common")
        await site.session("old", state=SessionState.CLOSED, settled=True, ended=old, common_data_key="old.1")
        await site.session("young", state=SessionState.CLOSED, settled=True, ended=time.time())
        await site.session("open")
        await site.swept()
        assert sorted(site.view.sessions) == ["open", "young"]
        assert await site.store.common_data.get("old.1") is None

    at_site(test)
