"""Carrying out one step of a plan.

Everything can be done again: a scheduler that ends between two writes leaves what the next one finds and finishes.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable

from flame.broker.errors import ConsumerConflict
from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import defaults, subjects, topology
from flame.protocol.records import BindingRecord, ExecutorRecord, SessionRecord
from flame.protocol.states import SESSION, ExecutorState, SessionEvent, SessionState
from flame_services.scheduler.plan import Step, lost
from flame_services.scheduler.settle import settle_tasks
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import Session, View

log = get_logger("flame.scheduler")


def backoff_s(failures: int, random_unit: float) -> float:
    """Return how long to wait after so many failures in a row, with jitter from ``random_unit`` in [0, 1)."""
    if failures <= 0:
        return 0.0
    longest = min(defaults.BACKOFF_MAX_S, defaults.BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 16))
    return longest * (0.5 + random_unit / 2)


class Carrier:
    """Turns steps into writes."""

    def __init__(
        self, broker: Broker, view: View, store: Store, review: Callable[[str], None], ack_wait_s: float
    ) -> None:
        """Write through ``store``; call ``review`` for every session that a step was about."""
        self._broker = broker
        self._view = view
        self._store = store
        self._review = review
        self._ack_wait_s = ack_wait_s
        self._loop = asyncio.get_running_loop()

    async def carry_out(self, step: Step) -> bool:
        """Carry a step out and tell whether it is finished.

        What is not is tried again by a later plan, since the view still shows the need.
        """
        session = self._view.sessions.get(step.session)
        if session is None:
            return True
        try:
            for key in step.reap:
                await self._reap(session, key)
            if step.replace:
                await self._replace(session)
            for key in step.leave:
                await self._let_leave(key)
            for node in step.bind:
                await self._bind(session, node)
            if step.settle:
                await self._settle(session)
        except FlameError as error:
            log.warning("a step could not be finished; it is tried again", session=session.id, error=str(error))
            return False
        finally:
            self._review(session.id)
        return True

    # ---- binding

    async def _bind(self, session: Session, node: str) -> None:
        record = session.record
        if record.state is not SessionState.OPEN:
            return
        # One that is leaving will do: its consumer is there until the last of the epoch has left.
        current = next((b for b in session.bindings.values() if b.epoch == record.epoch), None)
        if current is None or session.epoch_over:
            most = self._view.most(session)
            fence = await self._open_epoch(session, most)
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
            max_executors=most,
            application_revision=self._store.applications.revision(record.application),
            common_data_key=record.common_data_key,
            created=time.time(),
        )
        await self._store.bindings.create(subjects.executor_key(node, executor), binding)
        log.info("bound", session=record.id, node=node, executor=executor, epoch=record.epoch)

    async def _open_epoch(self, session: Session, most: int) -> int:
        """Raise the session's epoch, replace its consumer, and return up to where deliveries may have run before.

        The consumer is for at most that many executors.

        The epoch is written first: from then on nobody makes the old consumer again, and once that is deleted no
        executor of the old epoch can take or finish anything.
        """
        old = session.record
        stream = subjects.task_stream(old.application)
        new = old.changed(epoch=old.epoch + 1)
        await self._store.sessions.update(old.id, new, session.revision)
        fence = 0
        if old.epoch:
            await self._broker.delete_consumer(stream, subjects.consumer(old.id, old.epoch))
            fence = (await self._broker.stream_state(stream)).last_sequence
        spec = topology.session_consumer(old.application, old.id, new.epoch, most, self._ack_wait_s)
        try:
            await self._broker.create_consumer(spec)
        except ConsumerConflict:
            for consumer in await self._broker.consumers(stream):
                if subjects.consumer_session(consumer.name)[0] == old.id:
                    await self._broker.delete_consumer(stream, consumer.name)
            fence = (await self._broker.stream_state(stream)).last_sequence
            await self._broker.create_consumer(spec)
        session.epoch_over = False
        return fence

    async def _let_leave(self, key: str) -> None:
        binding = self._view.bindings.get(key)
        if binding is not None and not binding.leave:
            await self._store.bindings.put(key, binding.changed(leave=True))
            log.info("told to leave", session=binding.session, executor=binding.executor)

    async def _replace(self, session: Session) -> None:
        """Give up the executors of lost nodes: after this they can't reach the session's tasks."""
        record = session.record
        stream = subjects.task_stream(record.application)
        session.epoch_over = True
        await self._broker.delete_consumer(stream, subjects.consumer(record.id, record.epoch))
        for key, binding in list(session.bindings.items()):
            if lost(self._view, binding):
                await self._store.bindings.delete(key)
                await self._store.executors.delete(key)
                log.warning(
                    "gave an executor up with its node", session=record.id, executor=binding.executor, node=binding.node
                )

    # ---- what became of executors

    async def _reap(self, session: Session, key: str) -> None:
        """Take over what an executor that has ended leaves behind, then let go of it."""
        binding = self._view.bindings.get(key)
        executor = self._view.executors.get(key)
        if binding is None or executor is None:
            return
        ended = executor.record
        self._judge(session, ended)
        failures = session.record.bind_failures
        if (
            not ended.clean
            and not ended.entered
            and ended.state is ExecutorState.RELEASED
            and not self._entered(session)
        ):
            failures += 1
        elif ended.entered:
            failures = 0
        limit = self._view.spec_of(session).session_retry_limit

        def fold(record: SessionRecord) -> SessionRecord:
            state, reason = record.state, record.reason
            if failures >= limit and state is SessionState.OPEN:
                state, reason = SESSION.next(state, SessionEvent.FAIL), ended.reason
            return record.changed(
                succeeded=record.succeeded + ended.succeeded,
                failed=record.failed + ended.failed,
                bind_failures=failures,
                state=state,
                reason=reason,
                ended=time.time() if state is not record.state else record.ended,
            )

        changed = await self._store.sessions.change(session.id, fold)
        await self._store.bindings.delete(key)
        if changed is not None and changed.state is SessionState.FAILED and not changed.settled:
            log.error("session failed", session=session.id, reason=ended.reason)
            await self._store.announce(changed)
        if not session.bindings:
            await self._broker.delete_consumer(subjects.task_stream(ended.application), binding.consumer)

    def _judge(self, session: Session, ended: ExecutorRecord) -> None:
        """Back off after an executor that did not end in order."""
        if ended.clean:
            session.crashes = 0
            session.avoid = ""
            return
        session.crashes += 1
        session.avoid = ended.node
        wait_s = backoff_s(session.crashes if not ended.entered else session.crashes - 1, random.random())
        session.retry_at = self._loop.time() + wait_s
        log.warning(
            "an executor ended out of order",
            session=session.id,
            executor=ended.id,
            node=ended.node,
            reason=ended.reason.partition("\n")[0],
            retry_in_s=round(wait_s, 3),
        )

    def _entered(self, session: Session) -> bool:
        """Whether some executor of the session has entered it: then it is not the session that is at fault."""
        records = (self._view.executors.get(key) for key in session.bindings)
        return any(e is not None and e.record.state is ExecutorState.BOUND for e in records)

    # ---- ending

    async def _settle(self, session: Session) -> None:
        """Give every task of an ended session its record, then say that the session is over."""
        record = session.record
        stream = subjects.task_stream(record.application)
        if record.application in self._view.applications:
            await self._broker.delete_consumer(stream, subjects.consumer(record.id, record.epoch))
            written = await settle_tasks(self._broker, record.application, record.id, record)
        else:
            written = 0  # its streams went with the application

        def end(current: SessionRecord) -> SessionRecord | None:
            if current.settled or current.state is SessionState.OPEN:
                return None
            failed = current.state is SessionState.FAILED
            return current.changed(
                state=current.state if failed else SESSION.next(current.state, SessionEvent.SETTLED),
                settled=True,
                ended=current.ended or time.time(),
                failed=current.failed + (written if failed else 0),
                cancelled=current.cancelled + (0 if failed else written),
            )

        changed = await self._store.sessions.change(session.id, end)
        if changed is not None:
            log.info("session ended", session=session.id, state=changed.state.value, tasks_given_up=written)
            await self._store.announce(changed)
