"""What a session's executors are handed: common data, which may be changed, and credentials."""

from __future__ import annotations

import contextlib
from typing import Final

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker
from flame.credentials import revealed
from flame.errors import (
    FlameError,
    InvalidArgument,
    PayloadTooLarge,
    SessionFailed,
    SessionNotFound,
    SessionNotOpen,
    StaleVersion,
    ValueGone,
)
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.api import CreateSession, UpdateCommonData
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.ids import digest_of
from flame.protocol.records import SessionRecord
from flame.protocol.states import SessionState
from flame.protocol.subjects import check_token
from flame.protocol.supervision import Control
from flame.protocol.values import ValueRef
from flame_services.scheduler.session_data import drop_value, forget_common_data
from flame_services.scheduler.store import Store

log = get_logger("flame.scheduler")

_DIGEST_BYTES: Final = 32
"""Of a SHA-256."""


async def update_common_data(broker: Broker, store: Store, request: UpdateCommonData) -> SessionRecord:
    """Give a session other common data and return its record, which names the new version.

    The data is stored first, then named by the record in one compare-and-set, then that of before is removed. Asked
    again with the same token, what was done stays done.
    """
    session = check_token("session", request.session)
    check_common_data(request.data, request.data_ref)
    kept = False
    while True:
        found = await store.sessions.get(session)
        if found is None:
            raise SessionNotFound(f"session {session} is not known; `flmctl list -s` shows those that are")
        record, revision = found
        key, value = kept_as(record.application, check_token("token", request.token), request.data, request.data_ref)
        if record.common_data_key == key:
            break  # it was asked before, and no answer came
        try:
            _check(record, request)
        except FlameError:
            if kept:  # somebody was quicker, and no record will ever name it
                await store.common_data.delete(key)
            await drop_upload(broker, store, record, request.data_ref)
            raise
        await check_stored(broker, record.application, session, request.data_ref)
        with contextlib.suppress(RevisionConflict):  # it is there from before
            await store.common_data.create(key, value)
        kept = True
        changed = record.changed(common_data_key=key, common_data_version=record.common_data_version + 1)
        try:
            await store.sessions.update(session, changed, revision)
        except RevisionConflict:
            continue
        await forget_common_data(broker, store, record)
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


def check_common_data(data: bytes, ref: ValueRef | None) -> None:
    """Refuse common data that can't be kept: by `PayloadTooLarge`, and what is no reference to some."""
    if len(data) > defaults.INLINE_LIMIT_BYTES:
        raise PayloadTooLarge(
            f"common_data of {len(data)} bytes: in a request the limit is {defaults.INLINE_LIMIT_BYTES}; store it in"
            " parts and send a reference"
        )
    if ref is not None and (data or len(ref.digest) != _DIGEST_BYTES):
        what = "there is common data beside it" if data else "expected the digest of the data in it"
        raise InvalidArgument(f"common_data_ref: {what}")


def kept_as(application: str, token: str, data: bytes, ref: ValueRef | None) -> tuple[str, bytes]:
    """Return under which key common data is kept, or where it is, and the value there."""
    if ref is None:
        return subjects.common_data_key(application, token), data
    return subjects.common_data_ref_key(application, token), ref.encode()


async def check_stored(broker: Broker, application: str, session: str | None, ref: ValueRef | None) -> None:
    """Raise `ValueGone` if a reference names common data of which a part is not stored, as when it was removed since.

    What is stored may be older than the session: it has to be there before the session that needs it.
    """
    if ref is None:
        return
    if session is None:
        raise InvalidArgument("common_data_ref: expected the session's id, under which the data is stored")
    parts = subjects.blob(application, session, subjects.IN, ref.id, "*")
    stored = len(await broker.subjects(subjects.blob_stream(application), parts))
    if stored != ref.parts:
        raise ValueGone(f"common_data_ref: {ref.id} of session {session} has {stored} of {ref.parts} parts")


async def drop_upload(broker: Broker, store: Store, record: SessionRecord, ref: ValueRef | None) -> None:
    """Remove common data that was stored for a session and is not wanted, unless it is the session's."""
    if ref is not None and ref != await _kept_ref(store, record):
        with contextlib.suppress(FlameError):  # what is left goes with the session
            await drop_value(broker, record, ref)


async def same_common_data(store: Store, record: SessionRecord, wanted: CreateSession) -> bool:
    """Whether a session has the common data that another request has. Large data is compared by its digest."""
    ref = await _kept_ref(store, record)
    kept = b""
    if ref is None and record.common_data_key:
        entry = await store.common_data.get(record.common_data_key)
        kept = b"" if entry is None or entry.value is None else entry.value
    other = wanted.common_data_ref
    if ref is None and other is None:
        return kept == wanted.common_data
    have = digest_of(kept) if ref is None else ref.digest
    return have == (digest_of(wanted.common_data) if other is None else other.digest)


async def _kept_ref(store: Store, record: SessionRecord) -> ValueRef | None:
    if not subjects.is_reference(record.common_data_key):
        return None
    entry = await store.common_data.get(record.common_data_key)
    return None if entry is None or entry.value is None else ValueRef.decode(entry.value)


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
