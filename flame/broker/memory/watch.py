"""Following a bucket of the in-memory server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from flame.broker.memory.calls import Calls
from flame.broker.memory.clock import Timer
from flame.broker.seam import Entry, EntryHandler, Listener
from flame.broker.told import ToldKeys
from flame.cancel import end_task
from flame.errors import FlameError
from flame.logs import get_logger

log = get_logger("flame.broker.memory")

HEARTBEAT_S: Final = 2.0
"""A lost change is noticed after this long, if no other change shows it before."""
REPAIR_S: Final = 60.0
"""Everything is read again after this long: that a value ran out of time is told nobody."""
_RETRY_S: Final = 0.5


class MemoryWatch:
    """Follows the keys that match a pattern."""

    def __init__(
        self,
        calls: Calls,
        bucket: str,
        pattern: str,
        handler: EntryHandler,
        on_repair: Listener | None,
        on_reconnect: Callable[[Listener], Callable[[], None]],
    ) -> None:
        """Say what to follow; `start` begins."""
        self._calls = calls
        self._bucket = bucket
        self._pattern = pattern
        self._what = f"watch {bucket}.{pattern}"
        self._on_repair = on_repair
        self._clock = calls.server.clock
        self._chance = calls.server.chance
        self._told = ToldKeys(handler)
        self._missed = False
        """Known to the server only: a change did not arrive."""
        self._repairing: asyncio.Task[None] | None = None
        self._again = False
        self._timer: Timer | None = None
        self._stopped = False
        self._forget = on_reconnect(self._repair)

    async def start(self) -> None:
        """Return when everything that is there was handled."""
        try:
            await self._calls.ask(self._what, self._read)
        except BaseException:
            await self.stop()
            raise
        self._wait()

    async def stop(self) -> None:
        """See `flame.broker.seam.Subscription.stop`."""
        self._stopped = True
        self._forget()
        if self._timer is not None:
            self._timer.cancel()
        table = self._calls.server.tables.get(self._bucket)
        if table is not None:
            table.unfollow(self._change)
        task, self._repairing = self._repairing, None
        await end_task(task)

    # ---- at the server

    def _read(self) -> None:
        """Send what there is, then every change."""
        table = self._calls.server.table(self._bucket)
        if self._stopped:
            return
        self._missed = False
        table.follow(self._pattern, self._change)
        found, revision = table.entries(self._pattern), table.revision
        self._calls.link.deliver(lambda: self._take(found, revision))

    def _change(self, entry: Entry) -> None:
        """Send a change, or that one was lost: what comes after that one must not be taken for all there is."""
        if self._missed:
            self._calls.link.deliver(self._repair)
        elif self._chance.happens(self._chance.faults.lose_live):
            self._missed = True
            self._clock.call_later(HEARTBEAT_S, self._heartbeat)
        else:
            self._calls.link.deliver(lambda: self._on_entry(entry))

    def _heartbeat(self) -> None:
        if self._missed:
            self._calls.link.deliver(self._repair)

    # ---- here

    def _take(self, found: list[Entry], revision: int) -> None:
        for entry in found:
            self._on_entry(entry)
        if not self._stopped:
            self._told.tell_gone({entry.key for entry in found}, revision)

    def _on_entry(self, entry: Entry) -> None:
        if not self._stopped:
            self._told.tell(entry)

    # ---- repair

    def _wait(self) -> None:
        if not self._stopped:
            self._timer = self._clock.call_later(REPAIR_S, self._repair)

    def _repair(self) -> None:
        """Read everything again."""
        if self._stopped or self._calls.link.closed:
            return
        self._again = True
        if self._repairing is None:
            if self._timer is not None:
                self._timer.cancel()
            self._repairing = asyncio.get_running_loop().create_task(self._read_again(), name=self._what)

    async def _read_again(self) -> None:
        while self._again:
            self._again = False
            try:
                await self._calls.ask(self._what, self._read)
            except FlameError as error:
                log.debug("watch interrupted", what=self._what, error=str(error))
                self._again = not self._calls.link.closed
                await self._pause()
            else:
                if self._on_repair is not None and not self._stopped:
                    try:
                        self._on_repair()
                    except Exception:
                        log.exception("a listener for repairs failed", what=self._what)
        self._repairing = None
        self._wait()

    async def _pause(self) -> None:
        passed = asyncio.Event()
        self._clock.call_later(_RETRY_S, passed.set)
        await passed.wait()
