"""Who is given up when nodes are silent: those that are gone, and nobody while it is the broker that is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flame.errors import BrokerUnavailable
from flame.protocol import defaults
from flame.protocol.records import NodeRecord
from flame.protocol.resources import Resources
from flame.protocol.states import NodeState
from flame_services.scheduler.nodes import BETWEEN_S, NodeJudge
from flame_services.scheduler.view import View
from tests.support.virtual_time import run_virtually

ROUND_S = 0.1


class Cluster:
    """A node that beats, a broker that may be away, and a watch that may have gone deaf."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.view = View()
        self.beats = True
        self.heard = True
        self.answer_s: float | None = 0.0
        """How long the broker takes to answer; ``None``: it doesn't."""
        self.connected = True
        self.reads = 0
        self._beat = 0
        self.application = ""
        store = SimpleNamespace(nodes=SimpleNamespace(refresh=self._read, delete=self._delete))
        self.announced: list[NodeState] = []
        herald = SimpleNamespace(node=lambda _name, _before, after: self.announced.append(after.state))
        self.judge = NodeJudge(cast(Any, self), self.view, cast(Any, store), cast(Any, herald), lambda: None)
        self._feed()

    def _feed(self) -> None:
        node = NodeRecord(
            name="n",
            hostname="h",
            arch="x",
            os="y",
            capacity=Resources(1, 1, 0),
            started=1.0,
            beat=self._beat,
            application=self.application,
        )
        self.view.put_node("n", node, self.loop.time())

    async def _read(self, _name: str) -> None:
        self.reads += 1
        if self.answer_s is None:
            await asyncio.sleep(12)
            raise BrokerUnavailable("no answer in time")
        await asyncio.sleep(self.answer_s)
        if self.view.nodes["n"].record.beat != self._beat:
            self._feed()

    async def _delete(self, name: str) -> None:
        self.view.put_node(name, None, self.loop.time())

    async def run(self, seconds: float) -> set[NodeState]:
        """Let time pass and return every state that the node was in."""
        seen = set()
        end = self.loop.time() + seconds
        while self.loop.time() < end:
            if self.beats and self.answer_s is not None:
                self._beat += 1
                if self.heard:
                    self._feed()
            self.judge.judge(self.loop.time())
            if "n" not in self.view.nodes:
                break
            seen.add(self.view.nodes["n"].state)
            await asyncio.sleep(ROUND_S)
        return seen


def test_a_node_that_is_gone_is_given_up_in_time() -> None:
    async def program() -> None:
        cluster = Cluster()
        cluster.beats = False
        assert NodeState.NOT_READY not in await cluster.run(defaults.NODE_GIVEN_UP_S)
        assert NodeState.NOT_READY in await cluster.run(1)
        assert cluster.reads == 2
        assert cluster.announced == [NodeState.UNKNOWN, NodeState.NOT_READY]
        await cluster.judge.stop()

    run_virtually(program())


def test_a_node_that_was_one_attached_process_is_forgotten_when_it_is_given_up() -> None:
    async def program() -> None:
        cluster = Cluster()
        cluster.application = "app"
        await cluster.run(5)
        cluster.beats = False
        await cluster.run(60)
        assert cluster.view.nodes == {}
        await cluster.judge.stop()

    run_virtually(program())


def test_a_node_that_is_not_heard_but_beats_is_kept() -> None:
    async def program() -> None:
        cluster = Cluster()
        cluster.heard = False
        assert NodeState.NOT_READY not in await cluster.run(60)
        await cluster.judge.stop()

    run_virtually(program())


@pytest.mark.parametrize("away_s", [10, 14, 16, 25, 100])
@pytest.mark.parametrize("answer_s", [None, 2.0])
def test_nobody_is_given_up_for_the_brokers_silence(away_s: float, answer_s: float | None) -> None:
    async def program() -> None:
        cluster = Cluster()
        await cluster.run(5)
        cluster.answer_s = answer_s
        cluster.heard = False
        assert NodeState.NOT_READY not in await cluster.run(away_s)
        cluster.answer_s = 0.0
        assert NodeState.NOT_READY not in await cluster.run(BETWEEN_S)  # its first beat is on its way
        cluster.heard = True
        assert await cluster.run(60) <= {NodeState.READY, NodeState.UNKNOWN}
        assert cluster.view.nodes["n"].state is NodeState.READY
        await cluster.judge.stop()

    run_virtually(program())


def test_nobody_is_judged_while_disconnected() -> None:
    async def program() -> None:
        cluster = Cluster()
        cluster.beats = cluster.connected = False
        assert await cluster.run(60) == {NodeState.READY}
        assert cluster.reads == 0
        cluster.judge.forgive()
        cluster.connected = True
        assert NodeState.NOT_READY not in await cluster.run(defaults.NODE_GIVEN_UP_S - 1)
        await cluster.judge.stop()

    run_virtually(program())
