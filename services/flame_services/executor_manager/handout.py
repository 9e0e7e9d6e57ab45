"""What a session hands to its executors: common data and credentials, read from where they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flame.broker.seam import Broker
from flame.errors import MalformedMessage
from flame.protocol import subjects
from flame.protocol.codec import unpack
from flame.protocol.records import BindingRecord, SessionRecord, decode_record
from flame.protocol.supervision import ExecutorReport, Orders
from flame.protocol.values import ValueRef


@dataclass(frozen=True, slots=True)
class Handout:
    """What an executor is given of its session."""

    common_data: bytes | ValueRef = b""
    common_data_version: int = 0
    credentials: dict[str, str] = field(default_factory=dict, repr=False)
    delegations: dict[str, str] = field(default_factory=dict, repr=False)


async def read_handout(broker: Broker, source: BindingRecord | SessionRecord) -> Handout | None:
    """Read what a session's record, or a binding that repeats it, refers to; ``None`` if something is not there.

    Then it was just changed, or the session is over.
    """
    data = await read_common_data(broker, source.common_data_key)
    if data is None or source.credentials_key is None:
        return None
    if not source.credentials_key:
        return Handout(data, source.common_data_version)
    entry = await broker.bucket(subjects.CREDENTIALS).get(source.credentials_key)
    if entry is None or entry.value is None:
        return None
    kept = unpack(entry.value)
    return Handout(data, source.common_data_version, _texts(kept, "credentials"), _texts(kept, "delegations"))


async def read_common_data(broker: Broker, key: str | None) -> bytes | ValueRef | None:
    """Read a session's common data, or where it is; ``None`` if it should be there and is not."""
    if not key:
        return None if key is None else b""
    entry = await broker.bucket(subjects.COMMON_DATA).get(key)
    if entry is None or entry.value is None:
        return None
    return ValueRef.decode(entry.value) if subjects.is_reference(key) else entry.value


def _texts(kept: dict[str, Any], name: str) -> dict[str, str]:
    texts = kept.get(name, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for item in texts.items() for text in item):
        raise MalformedMessage(f"{name}: expected texts by name")
    return texts


async def add_common_data(broker: Broker, session: str, report: ExecutorReport, orders: Orders) -> Orders:
    """Add to an answer the common data that the executor has heard of and not got; raises `Unavailable`."""
    key = ""
    while True:
        entry = await broker.bucket(subjects.SESSIONS).get(session)
        record = decode_record(SessionRecord, entry.value) if entry and entry.value else None
        if record is None:
            return orders
        orders.common_data_version = record.common_data_version
        if record.common_data_version <= report.common_data_version:
            return orders
        data = await read_common_data(broker, record.common_data_key)
        if isinstance(data, ValueRef):
            orders.common_data_ref = data
        else:
            orders.common_data = data
        if data is not None or record.common_data_key == key:
            return orders
        key = record.common_data_key  # otherwise it was changed just then
