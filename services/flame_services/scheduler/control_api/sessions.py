"""The verbs about sessions."""

from __future__ import annotations

import secrets
import time
from typing import Final

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker
from flame.errors import (
    ApplicationDisabled,
    SessionExists,
    SessionFailed,
    SessionNotFound,
    SessionNotOpen,
    SpecMismatch,
)
from flame.protocol import subjects
from flame.protocol.api import (
    CloseSession,
    CreateSession,
    ListSessions,
    Named,
    OpenSession,
    SessionInfo,
    SessionPage,
    UpdateCommonData,
)
from flame.protocol.ids import mint_session_id
from flame.protocol.records import SessionRecord
from flame.protocol.states import ApplicationState, SessionState
from flame.protocol.subjects import check_token
from flame_services.scheduler.closing import close_session
from flame_services.scheduler.control_api.applications import Applications
from flame_services.scheduler.control_api.paging import page
from flame_services.scheduler.control_api.session_data import (
    check_common_data,
    check_stored,
    drop_upload,
    kept_as,
    same_common_data,
    same_secrets,
    secrets_record,
    update_common_data,
)
from flame_services.scheduler.counts import count_tasks
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import Session, View

_MINT_ATTEMPTS: Final = 8


class Sessions:
    """Opens and ends sessions, and answers from the view."""

    def __init__(self, broker: Broker, view: View, store: Store, applications: Applications) -> None:
        """Write through ``store``."""
        self._broker = broker
        self._view = view
        self._store = store
        self._applications = applications

    async def create_session(self, request: CreateSession) -> SessionRecord:
        """Open a new session."""
        application = await self._applications.known(request.application)
        if application.state is not ApplicationState.ENABLED:
            raise ApplicationDisabled(f"application {application.name} is disabled: it takes no new sessions")
        check_common_data(request.common_data, request.common_data_ref)
        if request.id is not None:
            check_token("session", request.id)
        await check_stored(self._broker, application.name, request.id, request.common_data_ref)
        key = await self._keep_common_data(request)
        credentials_key = await self._keep_credentials(request)
        for _ in range(1 if request.id is not None else _MINT_ATTEMPTS):
            session_id = request.id or mint_session_id(application.name)
            record = SessionRecord(
                id=session_id,
                application=application.name,
                options=request.options,
                created=time.time(),
                common_data_key=key,
                credentials_key=credentials_key,
            ).lean()  # it is kept for as long as the session is open
            try:
                await self._store.sessions.create(session_id, record)
            except RevisionConflict:
                continue
            return record
        if key:
            await self._store.common_data.delete(key)
        if credentials_key:
            await self._store.credentials.clear(credentials_key)
        if (found := await self._store.sessions.get(str(request.id))) is not None:
            await drop_upload(self._broker, self._store, found[0], request.common_data_ref)
        raise SessionExists(
            f"session {request.id} exists, or did and its results have not aged out; open it, or choose another id"
        )

    async def _keep_common_data(self, request: CreateSession) -> str:
        """Keep common data under a key of its own, before the session that names it can be seen."""
        if not request.common_data and request.common_data_ref is None:
            return ""
        key, value = kept_as(request.application, secrets.token_hex(8), request.common_data, request.common_data_ref)
        await self._store.common_data.create(key, value)
        return key

    async def _keep_credentials(self, request: CreateSession) -> str:
        """Do the same with credentials and delegations."""
        record = secrets_record(request)
        if not record:
            return ""
        key = subjects.credentials_key(request.application, secrets.token_hex(8))
        await self._store.credentials.create(key, record)
        return key

    async def update_common_data(self, request: UpdateCommonData) -> SessionRecord:
        """Give an open session other common data, and have its executors hear of it."""
        return await update_common_data(self._broker, self._store, request)

    async def open_session(self, request: OpenSession) -> SessionRecord:
        """Return an open session, which may be created if it doesn't exist."""
        check_token("session", request.id)
        found = await self._store.sessions.get(request.id)
        if found is None:
            if request.create is None:
                raise _no_session(request.id)
            try:
                return await self.create_session(request.create.model_copy(update={"id": request.id}))
            except SessionExists:  # somebody else was quicker
                found = await self._store.sessions.get(request.id)
                if found is None:
                    raise  # it exists, but can't be read
        record = found[0]
        if request.create is not None:
            await drop_upload(self._broker, self._store, record, request.create.common_data_ref)
        if record.state is SessionState.FAILED:
            raise SessionFailed(f"session {record.id} failed: {record.reason}")
        if record.state is not SessionState.OPEN:
            raise SessionNotOpen(f"session {record.id} is {record.state.value}; create another")
        if request.create is not None:
            await self._check_same(record, request.create)
        return record

    async def _check_same(self, record: SessionRecord, wanted: CreateSession) -> None:
        differs = []
        if wanted.application != record.application:
            differs.append(f"application is {record.application}, not {wanted.application}")
        have = record.options.model_dump()
        want = wanted.options.model_dump()
        differs.extend(f"{name} is {have[name]}, not {want[name]}" for name in have if have[name] != want[name])
        if not differs:
            if not await same_common_data(self._store, record, wanted):
                differs.append("common_data is another")
            if not await same_secrets(self._store, record, wanted):
                differs.append("credentials or delegations are others")
        if differs:
            raise SpecMismatch(f"session {record.id} is open with another specification: {'; '.join(differs)}")

    async def get_session(self, request: Named) -> SessionInfo:
        """Return one session with its counts."""
        session = await self.known(request.name)
        return (await count_tasks(self._broker, self._view, [session]))[0]

    async def list_sessions(self, request: ListSessions) -> SessionPage:
        """Return some sessions with their counts."""

        def wanted(record: SessionRecord) -> bool:
            return (
                request.application in (None, record.application)
                and request.state in (None, record.state)
                and request.labels.items() <= record.options.labels.items()
            )

        chosen = (name for name, session in self._view.sessions.items() if wanted(session.record))
        names, more = page(chosen, request)
        items = await count_tasks(self._broker, self._view, [self._view.sessions[name] for name in names])
        return SessionPage(items=tuple(items), more=more)

    async def close_session(self, request: CloseSession) -> SessionRecord:
        """Begin to end a session."""
        record = await close_session(self._store, check_token("session", request.id), request.mode)
        if record is None:
            raise _no_session(request.id)
        return record

    async def known(self, session_id: str) -> Session:
        """Return a session that the view need not have heard of yet."""
        known = self._view.sessions.get(check_token("session", session_id))
        if known is not None:
            return known
        found = await self._store.sessions.get(session_id)
        if found is None:
            raise _no_session(session_id)
        return Session(*found)


def _no_session(session_id: str) -> SessionNotFound:
    return SessionNotFound(f"session {session_id} is not known; `flmctl list -s` shows those that are")
