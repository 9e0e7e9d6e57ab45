"""What ends with a session, apart from its tasks."""

from __future__ import annotations

import contextlib

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.protocol import subjects
from flame.protocol.records import SessionRecord
from flame.protocol.values import ValueRef
from flame_services.scheduler.store import Store


async def forget_session_data(broker: Broker, store: Store, record: SessionRecord) -> None:
    """Remove a session's credentials, its state, and the large values that went in, when nobody serves it any more.

    Can be done again. One that never had an executor has no state: only they write it.
    """
    with contextlib.suppress(StreamMissing):  # they went with their application
        await broker.purge(
            subjects.blob_stream(record.application),
            subjects.session_blobs(record.application, record.id, subjects.IN),
        )
    if record.credentials_key:
        await store.credentials.clear(record.credentials_key)
    if record.epoch:
        await store.state.clear(subjects.session_state(record.id))


async def forget_common_data(broker: Broker, store: Store, record: SessionRecord) -> None:
    """Remove common data that a record names, since another one names others, or nobody does."""
    key = record.common_data_key
    if not key:
        return
    if subjects.is_reference(key) and (entry := await store.common_data.get(key)) is not None and entry.value:
        with contextlib.suppress(FlameError):  # what is left goes with the session
            await drop_value(broker, record, ValueRef.decode(entry.value))
    await store.common_data.delete(key)


async def drop_value(broker: Broker, record: SessionRecord, ref: ValueRef) -> None:
    """Remove one large value that a session was given."""
    parts = subjects.blob(record.application, record.id, subjects.IN, ref.id, "*")
    await broker.purge(subjects.blob_stream(record.application), parts)
