"""The end of a session: asked for by clients, or by the cluster itself."""

from __future__ import annotations

from typing import Final

from flame.protocol.codes import ReasonCode
from flame.protocol.records import SessionRecord
from flame.protocol.states import SESSION, CloseMode, SessionEvent, SessionState
from flame_services.scheduler.store import Store

_FURTHER: Final = tuple(CloseMode)
"""Each goes further than the one before it."""


def closing(record: SessionRecord, mode: CloseMode, reason: str = "", code: ReasonCode | str = "") -> SessionRecord:
    """Return a session's record as it is once its end was asked for; one that is ending has its mode raised at most."""
    if record.state is SessionState.OPEN:
        state = SESSION.next(record.state, SessionEvent.CLOSE)
        return record.changed(state=state, close_mode=mode, reason=reason, code=str(code))
    if record.state is SessionState.CLOSING and _FURTHER.index(mode) > _FURTHER.index(record.close_mode):
        return record.changed(close_mode=mode)
    return record


async def close_session(
    store: Store, session_id: str, mode: CloseMode, reason: str = "", code: ReasonCode | str = ""
) -> SessionRecord | None:
    """Begin to end a session and return its record then; ``None`` if there is none.

    Asking again is no error: a mode that goes further than the present one counts, any other changes nothing.
    """
    return await store.sessions.change(session_id, lambda record: closing(record, mode, reason, code))
