"""What a benchmark is given: its folder, its scale, and contestants to measure."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import servers
from benchmarks.cluster import FlameCluster, FlameSession
from benchmarks.floor.session import FloorSession
from benchmarks.processes import Lifetime
from benchmarks.scale import Scale
from benchmarks.servers import Servers

ECHO = "echo"
"""The application whose tasks do nothing."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One run. Every cluster and every floor that is made here gets a new folder, and so new streams."""

    folder: Path
    scale: Scale
    lifetime: Lifetime
    say: Callable[[str], None]
    """Tells whoever waits what is going on."""
    peers_python: str
    """The interpreter that has the other systems installed."""
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @asynccontextmanager
    async def flame(self, **options: str) -> AsyncIterator[FlameCluster]:
        """Run Flame on an embedded broker; the options are the broker's."""
        async with servers.embedded(self._new_folder(), **options) as broker, self.flame_on(broker) as cluster:
            yield cluster

    @asynccontextmanager
    async def flame_on(self, broker: Servers) -> AsyncIterator[FlameCluster]:
        """Run Flame on a broker, with the application `ECHO`."""
        async with FlameCluster(broker, self.lifetime, self._new_folder()) as cluster:
            await cluster.register(ECHO, "echo", max_instances=100, warm_instances=1)
            yield cluster

    @asynccontextmanager
    async def floor(self, executors: int, **options: str) -> AsyncIterator[FloorSession]:
        """Run the floor on an embedded broker."""
        async with servers.embedded(self._new_folder(), **options) as broker, self.floor_on(broker, executors) as floor:
            yield floor

    def floor_on(self, broker: Servers, executors: int) -> FloorSession:
        """Return a floor on a broker; entering it starts it."""
        return FloorSession(broker, self.lifetime, self._new_folder(), executors=executors)

    @asynccontextmanager
    async def both(self, executors: int, **options: str) -> AsyncIterator[tuple[FlameSession, FloorSession]]:
        """Run a session of Flame and the floor, each on its own broker."""
        async with (
            self.floor(executors, **options) as floor,
            self.flame(**options) as cluster,
            cluster.session(ECHO, executors=executors) as session,
        ):
            yield session, floor

    def three_servers(self) -> AbstractAsyncContextManager[Servers]:
        """Run three servers."""
        return servers.three(self._new_folder())

    def _new_folder(self) -> Path:
        folder = self.folder / str(next(self._numbers))
        folder.mkdir()
        return folder
