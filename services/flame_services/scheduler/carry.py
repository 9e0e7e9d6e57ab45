"""Carrying out one step of a plan.

Everything can be done again: a scheduler that ends between two writes leaves what the next one finds and finishes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.records import BindingRecord
from flame.protocol.states import SessionState
from flame_services.scheduler.ending import Ending
from flame_services.scheduler.epochs import Epochs, current_binding
from flame_services.scheduler.left_over import LeftOver
from flame_services.scheduler.plan import lost
from flame_services.scheduler.reap import Reaper
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.steps import Step
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import Session, View

log = get_logger("flame.scheduler")


class Carrier:
    """Turns steps into writes."""

    def __init__(
        self,
        broker: Broker,
        view: View,
        store: Store,
        recorder: Recorder,
        review: Callable[[str], None],
        ack_wait_s: float,
    ) -> None:
        """Write through ``store``; call ``review`` for every session that a step was about."""
        self._broker = broker
        self._view = view
        self._store = store
        self._review = review
        self._ack_wait_s = ack_wait_s
        self._epochs = Epochs(broker, store, ack_wait_s)
        self._reaper = Reaper(broker, view, store)
        self._ending = Ending(broker, view, store, recorder)
        self._left_over = LeftOver(view, recorder)

    def start(self) -> None:
        """Begin to count what was written and not counted. Steps are carried out only when asked for."""
        self._left_over.start()

    async def stop(self) -> None:
        """Do nothing by itself any more."""
        await self._left_over.stop()

    async def carry_out(self, step: Step) -> bool:
        """Carry a step out and tell whether it is finished.

        What is not is tried again by a later plan, since the view still shows the need.
        """
        session = self._view.sessions.get(step.session)
        if session is None:
            return True
        try:
            await self._serve(session, step)
            await self._end(session, step)
        except FlameError as error:
            log.warning("a step could not be finished; it is tried again", session=session.id, error=str(error))
            return False
        finally:
            self._review(session.id)
        return True

    async def settle_late(self, application: str, session_id: str) -> None:
        """Give tasks their records that were stored although their session is over, or never was."""
        await self._ending.settle_late(application, session_id)

    async def _serve(self, session: Session, step: Step) -> None:
        for key in step.reap:
            await self._reaper.reap(session, key)
        if step.replace:
            await self._epochs.end(session)
        for key in step.leave:
            await self._let_leave(key, force=step.force)
        if step.replace:  # last: while their bindings are there, this step is still to be done
            await self._give_up_lost(session)
        for node in step.bind:
            await self._bind(session, node)

    async def _end(self, session: Session, step: Step) -> None:
        if step.look:
            await self._ending.look(session)
        if step.close_idle:
            await self._ending.close_idle(session)
        if step.settle:
            await self._reaper.count_strays(session)
            await self._ending.settle(session)

    # ---- binding

    async def _bind(self, session: Session, node: str) -> None:
        record = session.record
        if record.state is not SessionState.OPEN and not session.drains:
            return
        results_from = 0
        if record.epoch:  # otherwise there is no record yet that could be another executor's
            results_from = (await self._broker.stream_state(subjects.result_stream(record.application))).last_sequence
        current = current_binding(session)
        if current is None:
            most = self._view.most(session)
            fence = await self._epochs.begin(session, most)
            record = session.record
        else:
            fence, most = current.fence, current.max_executors
        executor = f"x{secrets.token_hex(6)}"
        binding = BindingRecord(
            executor=executor,
            node=node,
            application=record.application,
            session=record.id,
            epoch=record.epoch,
            consumer=subjects.consumer(record.id, record.epoch),
            fence=fence,
            ack_wait_s=self._ack_wait_s,
            resources=record.options.resources,
            max_executors=most,
            application_revision=self._store.applications.revision(record.application),
            common_data_key=record.common_data_key,
            common_data_version=record.common_data_version,
            credentials_key=record.credentials_key,
            results_from=results_from,
            created=time.time(),
        )
        await self._store.bindings.create(subjects.executor_key(node, executor), binding)
        log.info("bound", session=record.id, node=node, executor=executor, epoch=record.epoch)

    async def _let_leave(self, key: str, *, force: bool) -> None:
        binding = self._view.bindings.get(key)
        if binding is None or (binding.leave and (binding.force or not force)):
            return
        await self._store.bindings.put(key, binding.changed(leave=True, force=binding.force or force))
        log.info("told to leave", session=binding.session, executor=binding.executor, force=force)

    async def _give_up_lost(self, session: Session) -> None:
        """Give up the executors of lost nodes, which can't reach the session's tasks any more."""
        keys = [key for key, binding in session.bindings.items() if lost(self._view, binding)]
        await self._reaper.give_up(session, keys)
