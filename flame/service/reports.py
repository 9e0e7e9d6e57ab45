"""What an executor tells its manager, and what it is told in return."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from typing import Final

from flame.broker.errors import NoResponders, NotAcknowledged
from flame.broker.seam import Broker, LiveMessage, Subscription
from flame.cancel import end_task
from flame.errors import BrokerUnavailable, MalformedMessage
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.supervision import LEAVE, WAIT, Control, ExecutorReport, Orders

log = get_logger("flame.executor")

LOOK_S: Final = 1.0
"""How often the executor looks whether there is something new to tell."""
SOON_S: Final = 0.1
"""After the last task: what is at rest is told soon."""
REPEAT_S: Final = 5.0
"""How often it reports although there is nothing new."""
PAUSE_S: Final = 0.1
"""Between two reports at least."""
TIMEOUT_S: Final = 2.0


class Reporter:
    """Reports to the manager: at once when woken, otherwise when something changed."""

    def __init__(self, broker: Broker, node: str, executor: str, snapshot: Callable[[], ExecutorReport]) -> None:
        """Report what ``snapshot`` returns."""
        self._broker = broker
        self._node = node
        self.rename(executor)
        self._snapshot = snapshot
        self._woken = asyncio.Event()
        self._urgent = asyncio.Event()
        self._last: ExecutorReport | None = None
        self._soon: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._controls: Subscription | None = None

    def rename(self, executor: str) -> None:
        """Report as another executor from now on."""
        self._subject = subjects.executor_report(self._node, executor)
        self._executor = executor

    async def first_report(self) -> Orders:
        """Report to be told of a session, and return when there is one, or none to come."""
        while (orders := await self.report(patient=True)).want == WAIT:
            pass
        return orders

    async def report(self, *, patient: bool = False) -> Orders:
        """Report now and return the manager's answer, however long that takes: managers restart."""
        pause_s = PAUSE_S
        warned = False
        while True:
            report = self._snapshot()
            report.patient = patient
            try:
                answer = await self._broker.request(self._subject, report.encode(), TIMEOUT_S)
                orders = Orders.decode(answer)
            except (NoResponders, NotAcknowledged, BrokerUnavailable, MalformedMessage) as error:
                if not warned:
                    log.warning("the executor manager does not answer; still trying", error=str(error))
                    warned = True
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, TIMEOUT_S)
            else:
                self._last = report
                return orders

    async def start(
        self,
        application: str,
        session: str,
        on_orders: Callable[[Orders], None],
        on_cancel: Callable[[Collection[str]], None],
        on_common_data: Callable[[int], None],
    ) -> None:
        """Go on reporting; ``on_orders`` gets every answer.

        ``on_cancel`` gets the tasks that are cancelled, and ``on_common_data`` the version of common data that was
        changed.
        """

        def on_control(message: LiveMessage) -> None:
            try:
                control = Control.decode(message.data)
            except MalformedMessage as error:
                log.warning("unreadable control message", error=str(error))
                return
            if control.executor not in ("", self._executor):
                return
            if control.cancel:
                on_cancel(control.cancel)
            elif control.common_data_version:
                on_common_data(control.common_data_version)
            else:
                self.wake_now()

        self._controls = await self._broker.subscribe(subjects.control(application, session), on_control)
        self._task = asyncio.create_task(self._go_on(on_orders), name="reports")
        self._task.add_done_callback(lambda task: self._check(task, on_orders))

    def _check(self, task: asyncio.Task[None], on_orders: Callable[[Orders], None]) -> None:
        """Leave if reporting has failed: an executor that hears of nothing could never be told to."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("reporting failed; leaving the session", executor=self._executor, exc_info=error)
            on_orders(Orders(LEAVE))

    def wake(self) -> None:
        """Report soon: at once, or a moment after the last report."""
        self._woken.set()

    def wake_now(self) -> None:
        """Report at once: the manager waits for it."""
        self._urgent.set()
        self._woken.set()

    def look_soon(self) -> None:
        """Report shortly, if there is something new then."""
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(SOON_S, self._look)

    def _look(self) -> None:
        self._soon = None
        if self._news():
            self.wake()

    async def stop(self) -> None:
        """Report no more by itself."""
        if self._soon is not None:
            self._soon.cancel()
        task, self._task = self._task, None
        await end_task(task)
        if self._controls is not None:
            await self._controls.stop()

    async def _go_on(self, on_orders: Callable[[Orders], None]) -> None:
        loop = asyncio.get_running_loop()
        reported = loop.time()
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._woken.wait()
            except TimeoutError:
                if not self._news() and loop.time() - reported < REPEAT_S:
                    continue
            self._woken.clear()
            self._urgent.clear()
            on_orders(await self.report())
            reported = loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await self._urgent.wait()

    def _news(self) -> bool:
        last, now = self._last, self._snapshot()
        if last is None:
            return True
        return _gist(last) != _gist(now)


def _gist(report: ExecutorReport) -> tuple[object, ...]:
    """Return what is worth a report if it changes."""
    counts = (report.succeeded, report.failed, report.cancelled)
    return (report.state, counts, report.running > 0, report.pending, report.idle_s > 0)
