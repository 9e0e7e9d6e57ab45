"""Judging nodes by their silence, and making sure first that it is theirs.

While the bucket of the nodes has no leader no heartbeat can be written, and when the server that keeps this scheduler's
watch dies none is heard. So before a node is given up, with all that runs there, its record is read from the leader,
twice: an alive manager has written again in between. Where that can't be done at once it is the broker that was away,
and every node gets a full grace period.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from flame.broker.seam import Broker
from flame.cancel import end_task
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import defaults
from flame.protocol.states import NodeState
from flame_services.scheduler.changes import Judgement
from flame_services.scheduler.herald import Herald
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

BETWEEN_S: Final = 3 * defaults.NODE_HEARTBEAT_S
"""Between the two readings."""
DOUBT_S: Final = defaults.NODE_GIVEN_UP_S - BETWEEN_S
"""After this long without a heartbeat its node's record is read."""
ANSWER_S: Final = 1.0
"""A leader that takes longer than this to answer may have been away."""


class NodeJudge:
    """Judges the nodes of a view."""

    def __init__(self, broker: Broker, view: View, store: Store, herald: Herald, on_change: Callable[[], None]) -> None:
        """Announce judgements through ``herald``; call ``on_change`` when nodes were given up."""
        self._broker = broker
        self._view = view
        self._store = store
        self._herald = herald
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._confirming: asyncio.Task[None] | None = None

    def judge(self, now: float) -> None:
        """Take note of who is silent; who is so for too long is given up a little later."""
        if not self._broker.connected:
            return
        self._age(now, give_up=False)
        if self._confirming is None and self._view.silent_nodes(now, DOUBT_S):
            self._confirming = self._loop.create_task(self._confirm(), name="silent nodes")

    def forgive(self) -> None:
        """Give every node a full grace period: it was this scheduler that was away."""
        self._view.forgive_nodes(self._loop.time())

    async def stop(self) -> None:
        """Judge no more."""
        await end_task(self._confirming)

    async def _confirm(self) -> None:
        try:
            if not await self._read_silent():
                return
            await asyncio.sleep(BETWEEN_S)
            if await self._read_silent() and self._age(self._loop.time(), give_up=True):
                self._on_change()
                await self._forget_attached()
        finally:
            self._confirming = None

    async def _forget_attached(self) -> None:
        """Remove nodes that are given up and were one process each: no other will ever be of their names."""
        nodes = self._view.nodes.items()
        gone = [name for name, node in nodes if node.record.application and node.state is NodeState.NOT_READY]
        with contextlib.suppress(FlameError):  # the next time that one is given up
            for name in gone:
                await self._store.nodes.delete(name)

    def _age(self, now: float, *, give_up: bool) -> bool:
        silent = self._view.silent_nodes(now, defaults.NODE_UNKNOWN_S)
        before = {name: Judgement.of(self._view, name) for name in silent}
        changed = self._view.age_nodes(now, give_up=give_up)
        if changed:
            for name, judged in before.items():
                self._herald.node(name, judged, Judgement.of(self._view, name))
        return changed

    async def _read_silent(self) -> bool:
        """Read the records of silent nodes into the view; tell whether the broker was there."""
        silent = self._view.silent_nodes(self._loop.time(), DOUBT_S)
        try:
            async with asyncio.timeout(ANSWER_S):
                await asyncio.gather(*(self._store.nodes.refresh(name) for name in silent))
        except (FlameError, TimeoutError) as error:
            reason = str(error) or f"no answer within {ANSWER_S:g} s"
            log.warning("nodes are silent, but so is the broker: they get more time", nodes=silent, reason=reason)
            self.forgive()
            return False
        return True
