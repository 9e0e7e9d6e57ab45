"""What a session's executors are handed: common data, which may be changed, and credentials."""

from __future__ import annotations

import contextlib

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker
from flame.credentials import revealed
from flame.errors import (
    FlameError,
    PayloadTooLarge,
    SessionFailed,
    SessionNotFound,
    SessionNotOpen,
    StaleVersion,
)
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.api import CreateSession, UpdateCommonData
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.messages import Control
from flame.protocol.records import SessionRecord
from flame.protocol.states import SessionState
from flame.protocol.subjects import check_token
from flame_services.scheduler.store import Store

log = get_logger("flame.scheduler")


async def update_common_data(broker: Broker, store: Store, request: UpdateCommonData) -> SessionRecord:
    """Give a session other common data and return its record, which names the new version.

    The data is stored first, then named by the record in one compare-and-set, then that of before is removed. Asked
    again with the same token, what was done stays done.
    """
    session = check_token("session", request.session)
    if len(request.data) > defaults.INLINE_LIMIT_BYTES:
        raise PayloadTooLarge(f"common_data of {len(request.data)} bytes: the limit is {defaults.INLINE_LIMIT_BYTES}")
    while True:
        found = await store.sessions.get(session)
        if found is None:
            raise SessionNotFound(f"session {session} is not known; `flmctl list -s` shows those that are")
        record, revision = found
        key = subjects.common_data_key(record.application, check_token("token", request.token))
        if record.common_data_key == key:
            break  # it was asked before, and no answer came
        _check(record, request)
        with contextlib.suppress(RevisionConflict):  # it is there from before
            await store.common_data.create(key, request.data)
        changed = record.changed(common_data_key=key, common_data_version=record.common_data_version + 1)
        try:
            await store.sessions.update(session, changed, revision)
        except RevisionConflict:
            continue
        if record.common_data_key:
            await store.common_data.delete(record.common_data_key)
        record = changed
        break
    log.info("common data updated", session=session, version=record.common_data_version)
    with contextlib.suppress(FlameError):  # executors hear of it from tasks, too
        control = Control(common_data_version=record.common_data_version)
        await broker.publish(subjects.control(record.application, session), control.encode())
    return record


def _check(record: SessionRecord, request: UpdateCommonData) -> None:
    if record.state is SessionState.FAILED:
        raise SessionFailed(f"session {record.id} failed: {record.reason}")
    if record.state is not SessionState.OPEN:
        raise SessionNotOpen(f"session {record.id} is {record.state.value}: its common data stays as it is")
    if request.expected_version not in (None, record.common_data_version):
        raise StaleVersion(
            f"session {record.id}: its common data has version {record.common_data_version}, not"
            f" {request.expected_version}; nothing was changed"
        )


def secrets_record(request: CreateSession) -> bytes:
    """Return what is kept of a session's secrets; empty if it has none."""
    if not (request.credentials or request.delegations):
        return b""
    secrets = {"credentials": revealed(request.credentials), "delegations": revealed(request.delegations)}
    return pack({"v": VERSION, **secrets})


async def same_secrets(store: Store, record: SessionRecord, wanted: CreateSession) -> bool:
    """Whether a session was created with the secrets that another request has."""
    entry = await store.credentials.get(record.credentials_key) if record.credentials_key else None
    kept = b"" if entry is None or entry.value is None else entry.value
    given = secrets_record(wanted)
    return kept == given or (bool(kept and given) and unpack(kept) == unpack(given))
