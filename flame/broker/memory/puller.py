"""Taking tasks from a consumer of the in-memory server, with the same exchanges as on JetStream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import Final

from flame.broker.errors import ConsumerMissing
from flame.broker.memory.calls import Calls
from flame.broker.memory.consumer import Pull
from flame.broker.seam import Delivery
from flame.errors import BrokerUnavailable, FlameError

_GRACE_S: Final = 1.0
"""After this long past its time a request without an answer is taken for lost."""


class MemoryPuller:
    """One executor's side of a consumer. One burst at a time; nothing stands between two bursts."""

    def __init__(self, calls: Calls, stream: str, consumer: str) -> None:
        """Take from a consumer of a stream."""
        self._calls = calls
        self._stream = stream
        self._consumer = consumer
        self._what = f"pull from {stream}/{consumer}"
        self._arrived: list[Delivery] = []
        self._signal: asyncio.Future[None] | None = None
        self._ended = True
        """No request is under way."""
        self._asked = 0
        """How many requests were made; the last one is what is under way."""
        self._missing = ""
        self._stopped = False
        self._closed = False
        self._pulls: list[Pull] = []
        self.forget: Callable[[], None] = lambda: None
        """Takes the connection's listener for reconnects back."""

    async def burst(self, most: int, wait_s: float) -> list[Delivery]:
        """See `flame.broker.seam.Puller.burst`."""
        if not self._arrived and not self._stopped:
            self._ask(1, wait_s)
            while not self._arrived and not self._ended:
                await self._sign(wait_s + _GRACE_S)
        if self._missing and not self._arrived:
            missing, self._missing = self._missing, ""
            raise ConsumerMissing(f"{self._what}: {missing}")
        if self._arrived and not self._stopped:
            more = min(most - len(self._arrived), self._arrived[-1].pending)
            if more > 0:
                wanted = len(self._arrived) + more
                self._ask(more, 0.0)
                while len(self._arrived) < wanted and not self._ended:
                    await self._sign(_GRACE_S)
                self._ended = True
        arrived, self._arrived = self._arrived, []
        return arrived

    def interrupt(self) -> None:
        """End a wait: the request that stood is gone with the connection."""
        self._ended = True
        self._wake()

    async def stop(self) -> list[Delivery]:
        """See `flame.broker.seam.Puller.stop`."""
        if not self._stopped:
            self._stopped = True
            self.forget()
            if self._calls.link.connected:
                # Answered after everything that was sent before. Interrupted, that is redelivered after its lease.
                with contextlib.suppress(FlameError):
                    await self._calls.ask(self._what, self._withdraw)
            self._closed = True
            self.interrupt()
        arrived, self._arrived = self._arrived, []
        return arrived

    # ---- at the server

    def _withdraw(self) -> None:
        for pull in self._pulls:
            pull.close()
        self._pulls.clear()

    def _place(self, number: int, most: int, wait_s: float) -> None:
        if self._ended or number != self._asked:
            return  # it waited for the connection longer than anybody waits for it
        pull = Pull(self._calls.link, most, self._take, partial(self._end, number))
        consumer = None
        stream = self._calls.server.streams.get(self._stream)
        if stream is not None:
            consumer = stream.consumers.get(self._consumer)
        if consumer is None:
            pull.close("nobody answers for it")
            return
        self._pulls = [*(other for other in self._pulls if other.stands), pull]
        consumer.pull(pull, wait_s)

    # ---- here

    def _ask(self, most: int, wait_s: float) -> None:
        self._ended = False
        self._asked += 1
        number = self._asked
        try:
            self._calls.send(self._what, lambda: self._place(number, most, wait_s))
        except BrokerUnavailable:
            self._ended = True
            raise

    def _take(self, delivery: Delivery) -> None:
        if not self._closed:
            self._arrived.append(delivery)
            self._wake()

    def _end(self, number: int, missing: str) -> None:
        if number == self._asked:
            self._missing = missing
            self.interrupt()

    async def _sign(self, limit_s: float) -> None:
        """Wait for anything to arrive; what takes longer than ``limit_s`` has ended."""
        self._signal = asyncio.get_running_loop().create_future()
        timer = self._calls.server.clock.call_later(limit_s, self.interrupt)
        try:
            await self._signal
        finally:
            timer.cancel()
            self._signal = None

    def _wake(self) -> None:
        if self._signal is not None and not self._signal.done():
            self._signal.set_result(None)
