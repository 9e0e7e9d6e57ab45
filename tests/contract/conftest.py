"""The implementations of the seam that must all behave alike, and what the suite needs of each."""

from __future__ import annotations

import asyncio
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

LIMIT_S = 15.0
"""How long a test waits for what must happen; far more than it takes."""

T = TypeVar("T")


class Side(Protocol):
    """The other side of the seam: something to connect to, that can be cut off."""

    async def connect(self) -> Broker:
        """Return a new connection. It is closed after the test."""

    def cut_off(self) -> AbstractAsyncContextManager[None]:
        """Break every connection; on leaving the context, return when all are there again. What is stored stays."""


class _Connections:
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
        """On leaving, return when every open connection has been made again."""
        waits: list[asyncio.Event] = []
        forgets: list[Callable[[], None]] = []
        for broker in self._open:
            if broker.connected:
                waits.append(asyncio.Event())
                forgets.append(broker.on_reconnect(waits[-1].set))
        yield
        async with asyncio.timeout(LIMIT_S):
            for event in waits:
                await event.wait()
        for forget in forgets:
            forget()


class JetStreamSide:
    """A nats-server of the module's own; it is cut off by killing it, which loses its consumers."""

    def __init__(self, server: EmbeddedBroker) -> None:
        self._server = server
        self.connections = _Connections()

    async def connect(self) -> Broker:
        return self.connections.keep(await connect(self._server.endpoint, name="contract"))

    @asynccontextmanager
    async def cut_off(self) -> AsyncIterator[None]:
        async with self.connections.all_reconnect():
            self._server.kill()
            try:
                yield
            finally:
                await self._server.start()


class MemorySide:
    """The in-memory broker."""

    def __init__(self) -> None:
        self._server = MemoryServer()
        self.connections = _Connections()

    async def connect(self) -> Broker:
        return self.connections.keep(self._server.connect())

    @asynccontextmanager
    async def cut_off(self) -> AsyncIterator[None]:
        async with self.connections.all_reconnect():
            self._server.interrupt()
            try:
                yield
            finally:
                self._server.restore()


@pytest.fixture(scope="module", params=["jetstream", "memory"])
def implementation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What a side is made of: a server for the module, where there is one."""
    if request.param == "memory":
        yield MemorySide
        return
    server = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=tmp_path_factory.mktemp("broker")))
    asyncio.run(server.start())
    pid, guard = server.pid, server.guard_pid
    yield lambda: JetStreamSide(server)
    server.kill()
    for process in (pid, guard):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.fixture
async def side(implementation: Callable[[], Any]) -> AsyncIterator[Side]:
    """Something to connect to."""
    made = implementation()
    yield made
    await made.connections.close()


@pytest.fixture
async def broker(side: Side) -> Broker:
    """A connection."""
    return await side.connect()


@pytest.fixture
async def other(side: Side) -> Broker:
    """Another connection to the same broker."""
    return await side.connect()


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
        try:
            async with asyncio.timeout(LIMIT_S):
                while not enough(self.all):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"heard only {self.all}") from None
        return self.all

    async def number(self, count: int) -> list[T]:
        """Return the first ``count`` that were heard."""
        return (await self.until(lambda heard: len(heard) >= count))[:count]
