"""What an executor has taken and not finished: its deliveries, their leases, and the ledger that its manager reads."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence

from flame.broker.seam import Broker, Delivery
from flame.errors import BrokerUnavailable, ConfigurationError
from flame.ledger import Ledger
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.supervision import Assignment
from flame.service.leases import Leases

log = get_logger("flame.executor")


class Holdings:
    """The deliveries of one executor, from when they are taken to when they are finished, handed back or lost."""

    def __init__(self, broker: Broker, assignment: Assignment) -> None:
        """Hold none; raises nothing if there is no ledger: then the executor keeps its leases itself."""
        self._broker = broker
        self._leases = Leases(assignment.ack_wait_s)
        self._extension_s = defaults.extension_s(assignment.ack_wait_s)
        self._silence_s = defaults.manager_silence_s(assignment.ack_wait_s)
        self._ledger = _open_ledger(assignment.ledger)
        self._slots: dict[str, int] = {}
        """The ledger's slot of each delivery that waits, runs, or whose record is on its way."""
        self.waiting: deque[Delivery] = deque()
        """Taken and not started, in order."""

    def limit(self, most: int) -> int:
        """Return how many of ``most`` deliveries may be taken."""
        return most if self._ledger is None else min(most, self._ledger.room)

    def take(self, taken: Sequence[Delivery], now: float) -> None:
        """Note what was taken, before any of it runs."""
        for delivery in taken:
            self._leases.take(delivery.handle, now)
        if self._ledger is not None:
            self._ledger.tick(now)
            for delivery in taken:
                key = subjects.task_key(delivery.subject)
                self._slots[delivery.handle] = self._ledger.take(delivery.handle, key, now)
        self.waiting.extend(taken)

    def certain(self, handle: str, now: float) -> bool:
        """Whether a delivery is certainly still this executor's, by its own extensions or its manager's."""
        if self._leases.holds(handle, now):
            return True
        ledger = self._ledger
        if ledger is None or self._slots.get(handle, -1) < 0 or not ledger.kept_by_manager(now, self._silence_s):
            return False
        return self._leases.lapses_at(handle) >= ledger.kept_since()

    def start(self, handle: str, now: float, deadline: float) -> bool:
        """Say that a delivery is run now, until ``deadline`` if that is not 0; it must not be if this is ``False``."""
        if self._ledger is None:
            return True
        slot = self._slots.get(handle, -1)
        if slot < 0 or self._ledger.start(slot, now, deadline):
            return True
        del self._slots[handle]  # the ledger has cleared it
        return False

    def end(self, handle: str) -> None:
        """Forget a delivery that is finished, or another's."""
        self._leases.end(handle)
        slot = self._slots.pop(handle, -1)
        if slot >= 0 and self._ledger is not None:
            self._ledger.clear(slot)

    async def finish(self, handle: str) -> None:
        """Acknowledge a delivery whose task has its record, and forget it."""
        self.end(handle)
        with contextlib.suppress(BrokerUnavailable):  # it comes back, and is looked up again
            await self._broker.acknowledge(handle)

    async def hand_back(self, handle: str, delay_s: float = 0.0) -> None:
        """Give a delivery to whoever takes it next, after ``delay_s``, and forget it."""
        ours = self.certain(handle, time.monotonic())
        stolen = self._ledger is not None and self._ledger.stolen(self._slots.get(handle, -1))
        self.end(handle)  # first: what stands in the ledger is extended, and that would end the delay
        if stolen or not ours:
            return  # its manager has done so already, or the broker gives it to another
        with contextlib.suppress(BrokerUnavailable):  # disconnected: its lease runs out
            await self._broker.hand_back(handle, delay_s)

    async def hand_back_waiting(self) -> None:
        """Hand back everything that was not started."""
        while self.waiting:
            await self.hand_back(self.waiting.popleft().handle)

    def tick(self, now: float) -> None:
        """Show that this process's loop turns."""
        if self._ledger is not None:
            self._ledger.tick(now)

    async def keep(self, now: float) -> None:
        """Extend leases that are due for it, unless the manager does so."""
        ledger = self._ledger
        kept_since = (
            ledger.kept_since() if ledger is not None and ledger.kept_by_manager(now, self._silence_s) else None
        )
        try:
            for handle in self._leases.due(now, self._extension_s, kept_since):
                if kept_since is None or self._slots.get(handle, -1) < 0:
                    await self._broker.extend(handle)
        except BrokerUnavailable as error:
            log.debug("could not extend leases", error=str(error))

    def forget_leases(self) -> None:
        """Forget that anything is this executor's: the consumer that it came from is gone."""
        self._leases.forget_all()

    def close(self) -> None:
        """Let go of the ledger."""
        if self._ledger is not None:
            self._ledger.close()


def _open_ledger(path: str) -> Ledger | None:
    if not path:
        return None
    try:
        return Ledger(path)
    except ConfigurationError as error:
        log.warning("without its ledger the executor keeps its leases itself", error=str(error))
        return None
