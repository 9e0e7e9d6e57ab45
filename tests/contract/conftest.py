"""The implementations of the seam that must all behave alike, and what the suite needs of each."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

import pytest

from flame.broker.embedded import EmbeddedBroker, EmbeddedBrokerConfig
from flame.broker.jetstream import connect
from flame.broker.memory import MemoryServer
from flame.broker.seam import Broker
from flame.errors import BrokerUnavailable
from tests.support.proxy import Proxy

LIMIT_S = 15.0
"""How long a test waits for what must happen; far more than it takes."""

T = TypeVar("T")
CutOff = Callable[[], AbstractAsyncContextManager[None]]


class Side(Protocol):
    """The other side of the seam: something to connect to, that can be cut off."""

    async def connect(self) -> Broker:
        """Return a new connection. It is closed after the test."""

    def cut_off(self, *, restart: bool = False) -> AbstractAsyncContextManager[None]:
        """Break every connection; on leaving the context, return when those that are open are there again.

        What is stored stays. ``restart``: the broker itself ends and is started again, and loses its consumers.
        """

    async def close(self) -> None:
        """Close every connection."""


class Connections:
    """The connections of one test."""

    def __init__(self) -> None:
        self._open: list[Broker] = []

    def keep(self, broker: Broker) -> Broker:
        self._open.append(broker)
        return broker

    async def close(self) -> None:
        for broker in self._open:
            await broker.close()

    @asynccontextmanager
    async def all_reconnect(self) -> AsyncIterator[None]:
        """On leaving, return when every connection that is still open has been made again."""
        events = {broker: asyncio.Event() for broker in self._open if not await _closed(broker)}
        forgets = [broker.on_reconnect(event.set) for broker, event in events.items()]
        yield
        for broker, event in events.items():
            if await _closed(broker):
                continue
            try:
                async with asyncio.timeout(LIMIT_S):
                    await event.wait()
            except TimeoutError:
                raise AssertionError("a connection was not made again") from None
        for forget in forgets:
            forget()


async def _closed(broker: Broker) -> bool:
    """Whether a connection is closed for good: one that is only lost takes messages for later."""
    try:
        await broker.publish("nobody.listens", b"")
    except BrokerUnavailable:
        return True
    return False


class JetStreamSide:
    """A nats-server of the module's own."""

    def __init__(self, server: EmbeddedBroker) -> None:
        self._server = server
        self._proxy = Proxy("127.0.0.1", server.port)
        self._opened = False
        self.connections = Connections()

    async def connect(self) -> Broker:
        if not self._opened:
            self._opened = True
            await self._proxy.open()
        return self.connections.keep(await connect(self._proxy.endpoint, name="contract"))

    @asynccontextmanager
    async def cut_off(self, *, restart: bool = False) -> AsyncIterator[None]:
        async with self.connections.all_reconnect():
            await self._proxy.cut()
            if restart:
                self._server.kill()
            try:
                yield
            finally:
                if restart:
                    await self._server.start()
                await self._proxy.open()

    async def close(self) -> None:
        await self.connections.close()
        await self._proxy.cut()


class MemorySide:
    """The in-memory broker."""

    def __init__(self) -> None:
        self._server = MemoryServer()
        self.connections = Connections()

    async def connect(self) -> Broker:
        return self.connections.keep(self._server.connect())

    @asynccontextmanager
    async def cut_off(self, *, restart: bool = False) -> AsyncIterator[None]:
        async with self.connections.all_reconnect():
            self._server.interrupt()
            try:
                yield
            finally:
                for stream in self._server.streams.values() if restart else ():
                    for name in list(stream.consumers):
                        stream.delete_consumer(name)
                self._server.restore()

    async def close(self) -> None:
        await self.connections.close()


@pytest.fixture(scope="module", params=["jetstream", "memory"])
def implementation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What makes the side of a test; a server, where there is one, is the module's."""
    if request.param == "memory":
        yield MemorySide
        return
    server = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=tmp_path_factory.mktemp("broker")))
    asyncio.run(server.start())
    try:
        yield functools.partial(JetStreamSide, server)
    finally:
        processes = (server.pid, server.guard_pid)
        server.kill()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.fixture
async def side(implementation: Callable[[], Side]) -> AsyncIterator[Side]:
    """Something to connect to."""
    made = implementation()
    yield made
    await made.close()


@pytest.fixture
async def broker(side: Side) -> Broker:
    """A connection."""
    return await side.connect()


@pytest.fixture
async def other(side: Side) -> Broker:
    """Another connection to the same broker."""
    return await side.connect()


@pytest.fixture(params=["lost connections", "a restart"])
def cut_off(side: Side, request: pytest.FixtureRequest) -> CutOff:
    """Either way in which everybody can be cut off from the broker for a while."""
    return functools.partial(side.cut_off, restart=request.param == "a restart")


_numbers = itertools.count(1)


@pytest.fixture
def name() -> str:
    """A name that no other test has: of an application, a stream, a bucket or a part of a subject."""
    return f"n{next(_numbers)}"


class Heard(Generic[T]):
    """Keeps what a handler is called with, and waits for it."""

    def __init__(self) -> None:
        self.all: list[T] = []
        self._changed = asyncio.Event()

    def __call__(self, heard: T) -> None:
        self.all.append(heard)
        self._changed.set()

    async def until(self, enough: Callable[[list[T]], bool]) -> list[T]:
        """Return what was heard, once it is enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LIMIT_S):
                while not enough(self.all):
                    self._changed.clear()
                    await self._changed.wait()
        assert enough(self.all), f"heard only {self.all[-50:]}"
        return self.all

    async def number(self, count: int) -> list[T]:
        """Return the first ``count`` that were heard."""
        return (await self.until(lambda heard: len(heard) >= count))[:count]
