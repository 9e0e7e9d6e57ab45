"""The part of the scheduler that decides: it plans when something changed and carries the plan out.

Exactly one scheduler of a cluster may do this. Today there is one; where there are several, the one that holds the
leader's lease starts a `Planner` and stops it when it loses the lease.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final

from flame.broker.seam import Broker
from flame.cancel import end_task, end_tasks
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import defaults
from flame.protocol.records import SessionRecord
from flame_services.scheduler.carry import Carrier
from flame_services.scheduler.demand import Demand
from flame_services.scheduler.expiry import Expiry
from flame_services.scheduler.herald import Herald
from flame_services.scheduler.nodes import NodeJudge
from flame_services.scheduler.plan import plan
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.steps import Step
from flame_services.scheduler.store import Store
from flame_services.scheduler.sweep import Sweep
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

AT_ONCE: Final = 64
"""Steps under way at most."""
RETRY_S: Final = 0.5
"""After a step that could not be finished, before anything else is done about its session."""


class Planner:
    """Plans and carries out until it is stopped."""

    def __init__(
        self, broker: Broker, view: View, store: Store, recorder: Recorder, ack_wait_s: float = defaults.ACK_WAIT_S
    ) -> None:
        """Decide over ``view``, which ``store`` keeps."""
        self._broker = broker
        self._view = view
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._steps: set[asyncio.Task[None]] = set()
        self._settling: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._herald = Herald(broker, view)
        self._demand = Demand(broker, view, self.wake)
        self._sweep = Sweep(broker, view, store, self._demand.recheck, self._settle_orphans)
        self._expiry = Expiry(broker, view, store, recorder, self._demand.holding, self._demand.withdraw)
        self._carrier = Carrier(broker, view, store, recorder, self._demand.review, ack_wait_s)
        self._nodes = NodeJudge(broker, view, store, self._herald, self.wake)
        store.on_session = self._on_session
        store.on_change = self.wake

    def wake(self) -> None:
        """Something changed: plan soon."""
        self._changed.set()

    async def start(self) -> None:
        """Begin to plan; the view must hold everything by now."""
        self._store.herald = self._herald  # what the view holds already is nothing new
        self._nodes.forgive()
        self._forget = self._broker.on_reconnect(self._reconnected)
        await self._demand.start()
        self._sweep.start()
        self._expiry.start()
        self._carrier.start()
        self._task = asyncio.create_task(self._go_on(), name="planner")
        self.wake()

    async def stop(self) -> None:
        """Decide nothing more; steps under way are finished, within a limit."""
        task, self._task = self._task, None
        if task is not None:
            self._forget()
            await end_task(task)
        for part in (self._nodes, self._sweep, self._expiry, self._demand, self._carrier):
            await part.stop()
        if self._steps:
            _, late = await asyncio.wait(self._steps, timeout=defaults.REQUEST_TIMEOUT_S)
            await end_tasks(late)
        self._store.herald = None
        await self._herald.stop()

    async def failed(self) -> str:
        """Return why planning ended by itself, if it ever does."""
        if self._task is None:
            return "the planner was not started"
        task = self._task
        await asyncio.wait([task])
        return f"the planner ended: {'cancelled' if task.cancelled() else repr(task.exception())}"

    async def _go_on(self) -> None:
        while True:
            self._changed.clear()
            now = self._loop.time()
            self._nodes.judge(now)
            self._view.wall_ahead_s = time.time() - now
            decided = plan(self._view, now)
            for session in self._view.planned(decided):
                self._herald.waits(session)
            for step in decided.steps:
                self._begin(step)
            wait_s = min(defaults.NODE_HEARTBEAT_S, decided.look_again_at - now)
            if not math.isfinite(wait_s) or wait_s > 0:
                try:
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
                except TimeoutError:
                    continue
            await asyncio.sleep(0)  # let what arrived together be planned together

    def _begin(self, step: Step) -> None:
        task = self._loop.create_task(self._carry_out(step), name=f"step {step.session}")
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)

    async def _carry_out(self, step: Step) -> None:
        try:
            if not await self._finished(step):
                await asyncio.sleep(RETRY_S)
        finally:
            self._view.done(step.session)
            self.wake()

    async def _finished(self, step: Step) -> bool:
        session = self._view.sessions.get(step.session)
        if session is not None and not self._store.readable(session.record.application, session.id):
            return False
        try:
            async with self._places:
                await self._store.settle_doubts()
                return await self._carrier.carry_out(step)
        except Exception:
            log.exception("a step failed", session=step.session)
            return False

    def _on_session(self, session_id: str, _record: SessionRecord | None) -> None:
        session = self._view.sessions.get(session_id)
        if session is None or not session.busy:
            self._demand.review(session_id)

    def _settle_orphans(self, application: str, session_id: str) -> None:
        if session_id in self._settling:
            return
        self._settling.add(session_id)
        task = self._loop.create_task(self._settle_orphans_of(application, session_id))
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)

    async def _settle_orphans_of(self, application: str, session_id: str) -> None:
        try:
            await self._carrier.settle_late(application, session_id)
        except FlameError as error:
            log.warning("could not give up tasks of a session that is over", session=session_id, error=str(error))
        finally:
            self._settling.discard(session_id)

    def _reconnected(self) -> None:
        self._nodes.forgive()
        self.wake()
