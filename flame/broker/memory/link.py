"""The way between one connection and the server: two pipes that keep their order, and can break."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from flame.broker.memory.clock import Clock
from flame.broker.memory.faults import Chance
from flame.errors import BrokerUnavailable
from flame.logs import get_logger

log = get_logger("flame.broker.memory")

BUFFER_BYTES: Final = 2 * 1024**2
"""What a client keeps for the time when it is connected again; more is refused. NATS's own limit."""

Action = Callable[[], None]


class Link:
    """Carries actions to the server and back, each in a later turn of the loop than it was sent in.

    What is under way when it breaks is lost in both directions. What is sent while it is broken waits.
    """

    def __init__(self, clock: Clock, chance: Chance, on_restored: Action) -> None:
        """Connect; ``on_restored`` is called first thing whenever that had to be done again."""
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._chance = chance
        self._on_restored = on_restored
        self._up: deque[Action] = deque()
        self._down: deque[Action] = deque()
        self._up_due = False
        self._down_due = False
        self._buffered = 0
        self.connected = True
        self.closed = False
        self.lives = 1
        """How often it was connected: what stands at the server belongs to one of its lives."""

    def send(self, action: Action, size: int = 0) -> None:
        """Carry something of ``size`` bytes out at the server.

        Raises `BrokerUnavailable` if the connection is closed, or is broken and too much waits already.
        """
        if self.closed:
            raise BrokerUnavailable("the connection is closed")
        if self.connected and self._chance.happens(self._chance.faults.interrupt):
            self.interrupt()
            self._clock.call_later(self._chance.below(self._chance.faults.longest_interruption_s), self.restore)
        if not self.connected:
            if self._buffered + size > BUFFER_BYTES:
                raise BrokerUnavailable("disconnected, and the buffer for that time is full; it was not sent")
            self._buffered += size
        self._up.append(action)
        self._pump_up_soon()

    def deliver(self, action: Action) -> None:
        """Carry something out at the client, if it is connected."""
        if not self.connected:
            return
        self._down.append(action)
        if not self._down_due:
            self._down_due = True
            self._loop.call_soon(self._pump_down)

    def interrupt(self) -> None:
        """Break."""
        if self.connected:
            self.connected = False
            self._buffered = 0
            self._up.clear()
            self._down.clear()

    def restore(self) -> None:
        """Connect again, unless it is connected or closed."""
        if not self.connected and not self.closed:
            self.connected = True
            self.lives += 1
            self._on_restored()
            self._pump_up_soon()

    def close(self) -> None:
        """Carry out what was sent, if connected, and nothing after that."""
        if self.closed:
            return
        if self.connected:
            self._pump_up()
        self.closed = True
        self.interrupt()

    def _pump_up_soon(self) -> None:
        if self.connected and self._up and not self._up_due:
            self._up_due = True
            self._loop.call_soon(self._pump_up)

    def _pump_up(self) -> None:
        self._up_due = False
        for _ in range(len(self._up) if self.connected else 0):
            if self._up:  # what is carried out may break this link
                self._up.popleft()()

    def _pump_down(self) -> None:
        self._down_due = False
        for _ in range(len(self._down)):
            if not self._down:
                return
            try:
                self._down.popleft()()
            except Exception:
                log.exception("a handler of messages failed")
