"""The cluster in memory that users test with, for tests of the cluster itself: one service, and all its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import flame
import flame.testing
from flame.broker.memory import MemoryBroker, MemoryServer
from flame_services.testing.node import MemoryNode


@dataclass(frozen=True)
class Manager:
    """One node's, to make trouble with."""

    node: MemoryNode

    @property
    def living(self) -> list[str]:
        """The executors that have not ended."""
        return [executor.binding.executor for executor in self.node.living]

    def crash(self, executor: str) -> None:
        """End an executor as if it were killed, with what it was doing."""
        self.node.executors[executor].kill()


class MemoryCluster(flame.testing.MemoryCluster):
    """A scheduler and nodes on one server. What they do takes place on the running loop."""

    def __init__(self, server: MemoryServer, make_service: Callable[[], object], nodes: int = 1) -> None:
        super().__init__(nodes=nodes)
        self.server = server
        self._make_service = make_service

    @property
    def managers(self) -> list[Manager]:
        return [Manager(node) for node in self.nodes.values()]

    async def application(self, name: str = "app", **fields: object) -> str:
        """Register an application of the cluster's one service."""
        return await self.register(self._make_service, name, **fields)

    def broker_of(self, client: flame.Connection) -> MemoryBroker:
        """The connection under a client."""
        assert isinstance(client.broker, MemoryBroker)
        return client.broker
