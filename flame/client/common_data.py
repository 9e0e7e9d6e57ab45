"""Common data that is too large for a request: stored under its session's id, and referred to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from flame.broker.seam import Broker
from flame.client.values import digest_of_much
from flame.errors import SessionNotFound
from flame.protocol import defaults, subjects
from flame.protocol.api import CreateSession
from flame.protocol.values import ValueRef
from flame.values import store_value

NOWHERE: Final = "nowhere"
"""The id in a reference by which data is only compared."""


async def store_common_data(broker: Broker, application: str, session: str, data: bytes) -> ValueRef:
    """Store common data of a session, which may not exist yet. Raises as `store_value` does."""
    return await store_value(broker, application, session, subjects.IN, data, digest=await digest_of_much(data))


async def with_stored_data(broker: Broker, wanted: CreateSession) -> CreateSession:
    """Return how a session of a chosen id is to be created, with a reference in the place of much common data."""
    if len(wanted.common_data) <= defaults.INLINE_LIMIT_BYTES:
        return wanted
    assert wanted.id is not None
    ref = await store_common_data(broker, wanted.application, wanted.id, wanted.common_data)
    return wanted.model_copy(update={"common_data": b"", "common_data_ref": ref})


async def for_opening(
    broker: Broker, find: Callable[[], Awaitable[object]], wanted: CreateSession | None
) -> CreateSession | None:
    """Do the same for a session that may exist: then its common data is compared and nothing is stored.

    ``find`` raises `SessionNotFound` if it doesn't. One that is there, or has ended, isn't forgotten so soon that it
    could be created meanwhile.
    """
    if wanted is None or len(wanted.common_data) <= defaults.INLINE_LIMIT_BYTES:
        return wanted
    try:
        await find()
    except SessionNotFound:
        return await with_stored_data(broker, wanted)
    data = wanted.common_data
    ref = ValueRef(id=NOWHERE, size=len(data), parts=1, digest=await digest_of_much(data))
    return wanted.model_copy(update={"common_data": b"", "common_data_ref": ref})
