"""Epochs of a session: who may take its tasks, and from when on somebody else may.

The epoch in the session's record is raised before anything else, so that whatever interrupts this, nobody makes the
consumer of an earlier one again, and whoever binds next begins another one.
"""

from __future__ import annotations

import contextlib

from flame.broker.errors import ConsumerConflict
from flame.broker.seam import Broker
from flame.errors import MalformedMessage
from flame.protocol import subjects, topology
from flame.protocol.records import BindingRecord
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import Session


def current_binding(session: Session) -> BindingRecord | None:
    """Return a binding of the session's present epoch, if it has one: then the consumer is there, or is being made.

    One that is to leave will do: its consumer is there until the last of the epoch has left.
    """
    return next((binding for binding in session.bindings.values() if binding.epoch == session.record.epoch), None)


class Epochs:
    """Begins and ends the epochs of sessions."""

    def __init__(self, broker: Broker, store: Store, ack_wait_s: float) -> None:
        """Make consumers whose deliveries are good for ``ack_wait_s``."""
        self._broker = broker
        self._store = store
        self._ack_wait_s = ack_wait_s

    async def begin(self, session: Session, most: int) -> int:
        """Begin another epoch with a consumer for that many executors; return the fence of its deliveries.

        No executor of an earlier epoch can take or finish anything afterwards.
        """
        old = session.record
        await self._raise(session)
        epoch = session.record.epoch
        stream = subjects.task_stream(old.application)
        fence = 0
        if old.epoch:
            await self._broker.delete_consumer(stream, subjects.consumer(old.id, old.epoch))
            fence = (await self._broker.stream_state(stream)).last_sequence
        spec = topology.session_consumer(old.application, old.id, epoch, most, self._ack_wait_s)
        try:
            await self._broker.create_consumer(spec)
        except ConsumerConflict:  # of an epoch before the last one
            await self._delete_all(stream, old.id)
            fence = (await self._broker.stream_state(stream)).last_sequence
            await self._broker.create_consumer(spec)
        return fence

    async def end(self, session: Session) -> None:
        """End the present epoch although it has executors: they can't reach the session's tasks any more.

        Safe to call again: an epoch that nobody was bound in is not ended.
        """
        old = session.record
        if current_binding(session) is not None:
            await self._raise(session)
        stream = subjects.task_stream(old.application)
        for epoch in {old.epoch, *(binding.epoch for binding in session.bindings.values())}:
            await self._broker.delete_consumer(stream, subjects.consumer(old.id, epoch))

    async def _raise(self, session: Session) -> None:
        """Write the next epoch; the session's record in the view is the new one then."""
        new = session.record.changed(epoch=session.record.epoch + 1)
        await self._store.sessions.update(session.id, new, session.revision)

    async def _delete_all(self, stream: str, session_id: str) -> None:
        for consumer in await self._broker.consumers(stream):
            with contextlib.suppress(MalformedMessage):  # none of ours
                if subjects.consumer_session(consumer.name)[0] == session_id:
                    await self._broker.delete_consumer(stream, consumer.name)
