"""Large values as an executor handles them: inputs before runs, outputs before records, common data before sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from flame.broker.seam import Broker
from flame.cancel import end_task
from flame.errors import Unavailable
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.messages import ResultRecord
from flame.protocol.supervision import Assignment
from flame.protocol.values import ValueRef, check_size
from flame.values import load_value, store_value

log = get_logger("flame.executor")

LOOK_S: Final = 0.2
"""How often it is looked whether an input is still wanted that is being loaded."""


async def load(broker: Broker, assignment: Assignment, ref: ValueRef) -> bytes:
    """Return an input or common data, however long the broker is away. Raises `ValueGone`, or `ApplicationNotFound`."""
    while True:
        try:
            return await load_value(broker, assignment.application, assignment.session, subjects.IN, ref)
        except Unavailable as error:
            log.warning("a large value could not be read; trying again", value=ref.id, error=str(error))
            await asyncio.sleep(defaults.BACKOFF_MAX_S)


async def load_while(broker: Broker, assignment: Assignment, ref: ValueRef, wanted: Callable[[], bool]) -> bytes | None:
    """Do the same as long as it is ``wanted``, and return ``None`` when it isn't any more."""
    loading = asyncio.create_task(load(broker, assignment, ref))
    try:
        while not loading.done():
            await asyncio.wait((loading,), timeout=LOOK_S)
            if not wanted():
                return None
        return loading.result()
    finally:
        await end_task(loading)


async def store_output(broker: Broker, assignment: Assignment, record: ResultRecord) -> None:
    """Store a record's output in parts, and refer to it instead, however long the broker is away.

    Each attempt is another value: what one that failed has left behind is gone when it is as old as outputs may be.
    Raises `PayloadTooLarge`, `QueueFull` or `ApplicationNotFound`.
    """
    output = record.output
    check_size("output", len(output))
    while record.output_ref is None:
        try:
            record.output_ref = await store_value(
                broker,
                assignment.application,
                assignment.session,
                subjects.OUT,
                output,
                ttl_s=defaults.VALUE_AGE_S,
            )
        except Unavailable as error:
            log.error("a large output could not be stored; trying again", error=str(error))
            await asyncio.sleep(defaults.BACKOFF_MAX_S)
    record.output = b""
