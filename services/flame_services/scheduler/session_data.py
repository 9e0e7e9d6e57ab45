"""What ends with a session, apart from its tasks."""

from __future__ import annotations

from flame.protocol import subjects
from flame.protocol.records import SessionRecord
from flame_services.scheduler.store import Store


async def forget_session_data(store: Store, record: SessionRecord) -> None:
    """Remove a session's credentials and its state, when nobody serves it any more. Can be done again.

    One that never had an executor has no state: only they write it.
    """
    if record.credentials_key:
        await store.credentials.clear(record.credentials_key)
    if record.epoch:
        await store.state.clear(subjects.session_state(record.id))
