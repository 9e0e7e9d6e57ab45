"""The stocks of all applications on a node, as the cluster's register of applications changes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from flame.broker.seam import Entry
from flame.logs import get_logger
from flame.protocol.records import ApplicationRecord, decode_record
from flame.protocol.supervision import ExecutorReport
from flame_services.executor_manager.assignment import Registered
from flame_services.executor_manager.berth import Berths
from flame_services.executor_manager.stock import Stock

log = get_logger("flame.manager.stock")

TICK_S: Final = 1.0
_STOP_S: Final = 3.0
GONE: Final = "its application was registered anew, or is not any more"
STOPPING: Final = "the executor manager is stopping"


class Stocks:
    """One stock for each application that is in use here."""

    def __init__(self, berths: Berths) -> None:
        """Begin with none."""
        self._berths = berths
        self._stocks: dict[str, Stock] = {}
        self._revisions: dict[str, int] = {}
        """Of the newest record of an application that was seen."""
        self._registered: dict[str, Registered] = {}
        self._closing: set[Stock] = set()
        self._stopped = False
        self.given: dict[str, str] = {}
        """The executors that processes started ahead have become, by the names that they were started with."""

    def on_application(self, entry: Entry) -> None:
        """Take note of a change in the register: what was kept ready for another registration ends."""
        if entry.revision < self._revisions.get(entry.key, 0):
            return
        self._revisions[entry.key] = entry.revision
        record = decode_record(ApplicationRecord, entry.value) if entry.value is not None else None
        if record is None:
            self._registered.pop(entry.key, None)
        else:
            self._registered[entry.key] = Registered(record, entry.revision)
        known = self._stocks.get(entry.key)
        if known is not None and (record is None or not known.is_for(record)):
            self._close(known, GONE)
        if record is not None and record.spec.warm_instances and not self._stopped:
            self._stock(record).tend()

    def registered(self, application: str) -> Registered | None:
        """Return an application as it was when last heard of; ``None`` if it is not registered."""
        return self._registered.get(application)

    def of(self, application: Registered) -> Stock:
        """Return the stock of an application, as it was read."""
        record = application.record
        if application.revision < self._revisions.get(record.name, 0) or self._stopped:
            known = self._stocks.get(record.name)
            if known is not None and known.is_for(record):
                return known
            outdated = Stock(self._berths, record)
            outdated.close(STOPPING if self._stopped else GONE)
            return outdated
        self._revisions[record.name] = application.revision
        return self._stock(record)

    def _stock(self, record: ApplicationRecord) -> Stock:
        known = self._stocks.get(record.name)
        if known is not None and not known.is_for(record):
            self._close(known, GONE)
            known = None
        if known is None:
            known = self._stocks[record.name] = Stock(self._berths, record)
        return known

    def _close(self, stock: Stock, reason: str) -> None:
        self._stocks.pop(stock.record.name, None)
        self._closing.add(stock)
        stock.close(reason)

    async def wait_in(self, name: str, report: ExecutorReport) -> bool:
        """Hold the answer to a report back if it comes from a process that no executor has; tell whether it goes on.

        ``False``: it is to ask again.
        """
        for stock in self._stocks.values():
            warm = stock.warm(name)
            if warm is not None:
                return await warm.hold(report)
        return True

    async def run(self) -> None:
        """Keep ready what should be, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            for stock in tuple(self._stocks.values()):
                stock.tend()
            self._closing = {stock for stock in self._closing if not stock.is_gone}

    def close(self) -> None:
        """Keep nothing ready any more."""
        self._stopped = True
        for stock in tuple(self._stocks.values()):
            self._close(stock, STOPPING)

    async def stop(self) -> None:
        """End all that was kept ready. Nothing is left when this returns, and nothing if it is cancelled."""
        self.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    for stock in self._closing:
                        await stock.gone()
        finally:
            for stock in self._closing:
                stock.kill()
