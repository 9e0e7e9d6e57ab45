"""The fixtures that pytest has wherever Flame is installed. They need pytest-asyncio, in either of its modes.

======================  =======================================================================================
``flame_service``       a function that opens a session of a service in this process
``flame_memory``        the cluster in this process that it opens it in, a `flame.testing.MemoryCluster`
``flame_events``        what happens there, a `flame.testing.EventLog`
``flame_clock``         the time there, a `flame.testing.VirtualClock`: whoever asks for it has virtual time
``flame_cluster``       a cluster of real processes, a `flame.testing.EmbeddedCluster`, one for all tests of a run
======================  =======================================================================================

A test of a service, of what it does when it fails, and of one as a program::

    async def test_answers(flame_service):
        session = await flame_service(Agent, b"You said:")
        assert (await session.invoke(b"hello")).output == b"You said: hello"

    async def test_is_tried_again(flame_service, flame_clock, flame_events):
        session = await flame_service(Flaky, max_attempts=3, retry_backoff_s=60)
        task = await session.create_task(b"x")
        await flame_events.expect(task=task, state="succeed", within_s=300)
        assert flame_clock.elapsed > 60

    async def test_as_a_program(flame_cluster):
        await flame_cluster.register("agent.py")
        async with await flame.create_session("agent") as session:
            await session.invoke(b"hello")

What a `MemoryCluster` is made with can be said by a marker, ``@pytest.mark.flame_memory(nodes=2)``, and what the
`EmbeddedCluster` is made with by a fixture of the whole run, ``flame_cluster_options``, that returns a dict.

``-p no:flame`` switches all this off. Nothing but pytest is loaded before a test asks for one of the fixtures.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from flame.client.session import Session
    from flame.testing.clock import VirtualClock
    from flame.testing.embedded import EmbeddedCluster
    from flame.testing.events import EventLog
    from flame_services.testing.cluster import MemoryCluster

F = TypeVar("F", bound=Callable[..., Any])


def _fixture(function: F) -> Any:
    """Mark an asynchronous fixture; without pytest-asyncio it says what is missing when it is asked for."""
    try:
        from pytest_asyncio import fixture  # noqa: PLC0415  # it may not be there
    except ImportError:
        pass
    else:
        return fixture(function)

    def missing() -> None:
        pytest.fail(f"the fixture {function.__name__} needs pytest-asyncio: pip install pytest-asyncio", pytrace=False)

    missing.__doc__ = function.__doc__
    return pytest.fixture(name=function.__name__)(missing)


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marker means."""
    config.addinivalue_line(
        "markers", "flame_memory(**options): what the test's flame.testing.MemoryCluster is made with, such as nodes=2"
    )


@pytest.fixture
def flame_clock() -> VirtualClock:
    """The time of the test's ``flame_memory``: virtual, from the cluster's start to its end.

    Example::

        async def test_gives_up(flame_service, flame_clock):
            session = await flame_service(Slow, timeout_s=60)
            task = await session.create_task(b"")
            await flame_clock.advance(59)
            assert not task.done()
            await flame_clock.advance(2)
            assert task.done()
    """
    from flame.testing.clock import VirtualClock  # noqa: PLC0415  # only where it is used

    return VirtualClock()


@_fixture
async def flame_memory(request: pytest.FixtureRequest) -> AsyncIterator[MemoryCluster]:
    """A cluster in this process, started; see `flame.testing.MemoryCluster`.

    Example::

        @pytest.mark.flame_memory(nodes=2)
        async def test_survives_its_executor(flame_memory):
            await flame_memory.register(Agent, "agent")
            session = await flame_memory.create_session("agent")
            task = await session.create_task(b"sleep")
            flame_memory.kill_executor(flame_memory.executors[0])
            assert (await task).attempt == 2
    """
    from flame.testing import MemoryCluster  # noqa: PLC0415  # only where it is used

    options: dict[str, Any] = {}
    for marker in request.node.iter_markers("flame_memory"):
        options = {**marker.kwargs, **options}  # the closest one counts
    if "flame_clock" in request.fixturenames:
        options.setdefault("clock", request.getfixturevalue("flame_clock"))
    async with MemoryCluster(**options) as cluster:
        yield cluster


@_fixture
async def flame_events(flame_memory: MemoryCluster) -> AsyncIterator[EventLog]:
    """What happens in the test's ``flame_memory`` from its beginning on; see `flame.testing.EventLog`.

    Example::

        async def test_fails(flame_service, flame_events):
            session = await flame_service(Broken)
            await flame_events.expect(session=session, state="failed", code="retry_limit")
    """
    async with flame_memory.events() as events:
        yield events


OpenSession = Callable[..., Awaitable["Session"]]


@pytest.fixture
def flame_service(flame_memory: MemoryCluster) -> OpenSession:
    """A function that opens a session of a service in the test's ``flame_memory``.

    ``await flame_service(service, common_data=b"", *, name=None, **spec)`` returns a `flame.Session`. The arguments are
    those of `MemoryCluster.register`; asked for the same service again it opens another session of it.

    Example::

        async def test_two_sessions(flame_service):
            one = await flame_service(Agent, b"one", concurrency=4)
            two = await flame_service(Agent, b"two", concurrency=4)
    """
    registered: dict[str | None, tuple[object, dict[str, Any], str]] = {}

    async def open_session(
        service: object, common_data: bytes = b"", *, name: str | None = None, **spec: Any
    ) -> Session:
        known = next((app for what, how, app in registered.values() if what is service and how == spec), None)
        if known is None or name not in (None, known):
            known = await flame_memory.register(service, name, **spec)
            registered[known] = (service, spec, known)
        return await flame_memory.create_session(known, common_data)

    return open_session


@pytest.fixture(scope="session")
def flame_cluster_options() -> dict[str, Any]:
    """What the run's `flame.testing.EmbeddedCluster` is made with; override it in ``conftest.py``."""
    return {}


@pytest.fixture(scope="session")
def _flame_cluster(
    tmp_path_factory: pytest.TempPathFactory, flame_cluster_options: dict[str, Any]
) -> Iterator[EmbeddedCluster]:
    """One cluster for all tests of the run."""
    from flame.testing.embedded import EmbeddedCluster  # noqa: PLC0415  # only where it is used

    options = {"folder": tmp_path_factory.mktemp("flame-cluster"), **flame_cluster_options}
    cluster = EmbeddedCluster(**options).start_blocking()
    try:
        yield cluster
    finally:
        cluster.stop_blocking()


@pytest.fixture
def flame_cluster(
    _flame_cluster: EmbeddedCluster, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[EmbeddedCluster]:
    """A cluster of real processes; `flame.connect` and the like, and programs that the test starts, find it.

    All tests of a run share it. What a test registers by its ``register`` is unregistered after the test.

    Example::

        async def test_as_a_program(flame_cluster):
            await flame_cluster.register("agent.py")
            async with await flame.create_session("agent", b"You said:") as session:
                assert (await session.invoke(b"hello")).output == b"You said: hello"
    """
    monkeypatch.setenv("FLAME_ENDPOINT", _flame_cluster.endpoint)
    failed = request.session.testsfailed
    yield _flame_cluster
    _flame_cluster.clear_blocking()
    if request.session.testsfailed > failed:
        print(_flame_cluster.logs())  # noqa: T201  # pytest shows it with the failure
