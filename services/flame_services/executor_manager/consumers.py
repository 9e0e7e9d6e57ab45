"""Consumers of bound sessions: what they hold, and making one again that the broker has lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from flame.broker.errors import ConsumerConflict, StreamMissing
from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import topology
from flame.protocol.records import BindingRecord
from flame.protocol.supervision import Assignment
from flame_services.executor_manager.assignment import SUPERSEDED, Superseded, current_session

log = get_logger("flame.manager.consumers")

REPAIR_S: Final = 1.0
"""Between two repairs of one consumer."""
_AT_ONCE: Final = 16


@dataclass(slots=True)
class _Repair:
    """The last repair of one consumer."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    done_at: float = float("-inf")
    fence: int = 0


class Consumers:
    """The consumers that this node's executors pull from."""

    def __init__(self, broker: Broker) -> None:
        """Bind to a broker."""
        self._broker = broker
        self._repairs: dict[str, _Repair] = {}

    async def repair(self, binding: BindingRecord, assignment: Assignment) -> Assignment:
        """Make a session's consumer again and return the assignment with the fence that this needs.

        The scheduler would do it, but it may be away. Whatever was stored until now may have been delivered by
        the lost consumer, so all of it is behind the fence. Raises `Superseded` if the session is not this
        binding's any more, and `Unavailable` if that can't be told now.
        """
        repair = self._repairs.setdefault(binding.consumer, _Repair())
        async with repair.lock:
            if time.monotonic() - repair.done_at >= REPAIR_S:
                repair.fence = await self._make_again(binding, assignment)
                repair.done_at = time.monotonic()
        return replace(assignment, fence=repair.fence)

    def forget(self, consumer: str) -> None:
        """Drop what is known of a consumer that nobody here uses any more."""
        self._repairs.pop(consumer, None)

    async def pending(self, consumers: Iterable[tuple[str, str]]) -> dict[str, int]:
        """Count what waits in some consumers (stream, name); those that can't be asked now are left out."""
        limit = asyncio.Semaphore(_AT_ONCE)
        found: dict[str, int] = {}

        async def look(stream: str, name: str) -> None:
            async with limit:
                try:
                    found[name] = (await self._broker.consumer_state(stream, name)).pending
                except FlameError as error:
                    log.debug("backlog unknown", consumer=name, reason=str(error))

        await asyncio.gather(*(look(stream, name) for stream, name in consumers))
        return found

    async def _make_again(self, binding: BindingRecord, assignment: Assignment) -> int:
        await current_session(self._broker, binding)
        usual = topology.session_consumer(
            binding.application, binding.session, binding.epoch, assignment.max_executors, binding.ack_wait_s
        )
        spec = replace(usual, name=binding.consumer)
        try:
            await self._broker.create_consumer(spec)
        except (ConsumerConflict, StreamMissing):
            raise Superseded(SUPERSEDED) from None
        try:
            await current_session(self._broker, binding)
        except Superseded:
            # The scheduler raised the epoch between our look and our creation: its own consumer comes, not ours.
            await self._broker.delete_consumer(spec.stream, spec.name)
            raise
        fence = (await self._broker.stream_state(spec.stream)).last_sequence
        log.info("made a lost consumer again", session=binding.session, consumer=spec.name, fence=fence)
        return fence
