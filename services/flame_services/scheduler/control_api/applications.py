"""The verbs about applications."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from flame.broker.errors import RevisionConflict, StreamFull
from flame.broker.seam import Broker
from flame.errors import ApplicationExists, ApplicationInUse, ApplicationNotFound, Unavailable
from flame.logs import get_logger
from flame.protocol import topology
from flame.protocol.api import (
    ApplicationPage,
    List,
    Named,
    RegisterApplication,
    UnregisterApplication,
    UpdateApplication,
)
from flame.protocol.codes import ReasonCode
from flame.protocol.records import ApplicationRecord
from flame.protocol.states import APPLICATION, ApplicationEvent, CloseMode
from flame.protocol.subjects import check_application
from flame_services.scheduler.closing import close_session
from flame_services.scheduler.control_api.paging import page
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import Session, View

log = get_logger("flame.scheduler")

CLOSE_WAIT_S: Final = 2.0
"""How long tasks that run may take to finish when their application is unregistered by force."""
FORCE_WAIT_S: Final = 6.0
"""How long their sessions may take to end after that; both together are less than a client waits for an answer."""
_LOOK_S: Final = 0.05
AT_ONCE: Final = 64
"""Sessions whose end is asked for at once."""


class Applications:
    """Registers applications, and answers from the view."""

    def __init__(self, broker: Broker, view: View, store: Store, replicas: int) -> None:
        """Write through ``store``; streams that are made have so many ``replicas``."""
        self._broker = broker
        self._view = view
        self._store = store
        self._replicas = replicas

    async def register_application(self, request: RegisterApplication) -> ApplicationRecord:
        """Register an application under a new name."""
        name = check_application(request.name)
        if await self._store.applications.get(name) is not None:
            raise ApplicationExists(f"application {name} is registered already; unregister it first")
        # Streams first: nothing may be asked of an application before it can be kept.
        for spec in topology.application_streams(name, self._replicas):
            try:
                await self._broker.ensure_stream(spec)
            except StreamFull as error:
                raise Unavailable(
                    f"application {name}: the broker has no room for its streams ({error});"
                    " raise max_file_store in its jetstream block"
                ) from error
        record = ApplicationRecord(name=name, spec=request.spec, created=time.time())
        try:
            await self._store.applications.create(name, record)
        except RevisionConflict:
            raise ApplicationExists(f"application {name} is registered already; unregister it first") from None
        log.info("application registered", application=name)
        return record

    async def update_application(self, request: UpdateApplication) -> ApplicationRecord:
        """Give an application another specification."""
        name = check_application(request.name)

        def update(record: ApplicationRecord) -> ApplicationRecord | None:
            return None if record.spec == request.spec else record.changed(spec=request.spec, updated=time.time())

        record = await self._store.applications.change(name, update)
        if record is None:
            raise no_application(name)
        log.info("application updated", application=name)
        return record

    async def disable_application(self, request: Named) -> ApplicationRecord:
        """Let an application take no new sessions; those that it has go on."""
        return await self._move(check_application(request.name), ApplicationEvent.DISABLE)

    async def enable_application(self, request: Named) -> ApplicationRecord:
        """Let an application take new sessions again."""
        return await self._move(check_application(request.name), ApplicationEvent.ENABLE)

    async def _move(self, name: str, event: ApplicationEvent) -> ApplicationRecord:
        """Bring an application into the state that ``event`` leads to; where it is in that already, nothing changes."""

        def move(record: ApplicationRecord) -> ApplicationRecord | None:
            moved = APPLICATION.moves.get((record.state, event))
            return None if moved is None else record.changed(state=moved)

        record = await self._store.applications.change(name, move)
        if record is None:
            raise no_application(name)
        log.info("application enabled or disabled", application=name, state=record.state.value)
        return record

    async def unregister_application(self, request: UnregisterApplication) -> None:
        """Remove an application with all that is stored of it; by force, end its sessions first."""
        name = check_application(request.name)
        await self.known(name)
        unreadable = self._store.sessions.unreadable
        if any(fields.get("application") == name for fields in unreadable.values()):
            raise Unavailable(
                f"application {name} has sessions that this scheduler can't read: it is older than others"
            )
        living = self._living(name)
        if living and not request.force:
            raise ApplicationInUse(
                f"application {name} has {len(living)} open session(s), such as {living[0].id}; close them or force it"
            )
        await self._move(name, ApplicationEvent.DISABLE)
        if not (
            await self._end(name, CloseMode.CLOSE, CLOSE_WAIT_S) or await self._end(name, CloseMode.FORCE, FORCE_WAIT_S)
        ):
            raise Unavailable(f"application {name} takes no more sessions; some are still ending: ask again")
        await self._store.applications.delete(name)
        for spec in topology.application_streams(name):
            await self._broker.delete_stream(spec.name)
        log.info("application unregistered", application=name)

    async def _end(self, application: str, mode: CloseMode, wait_s: float) -> bool:
        """End the sessions of an application; tell whether all have ended in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        reason = f"its application {application} was unregistered"
        living = self._living(application)
        for begin in range(0, len(living), AT_ONCE):
            some = living[begin : begin + AT_ONCE]
            await asyncio.gather(
                *(close_session(self._store, session.id, mode, reason, ReasonCode.UNREGISTERED) for session in some)
            )
        while self._living(application):
            if loop.time() > deadline:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    def _living(self, application: str) -> list[Session]:
        sessions = self._view.sessions.values()
        return [s for s in sessions if s.record.application == application and (not s.record.settled or s.bindings)]

    async def get_application(self, request: Named) -> ApplicationRecord:
        """Return one application."""
        return await self.known(request.name)

    async def list_applications(self, request: List) -> ApplicationPage:
        """Return some applications."""
        names, more = page(self._view.applications, request)
        return ApplicationPage(items=tuple(self._view.applications[name] for name in names), more=more)

    async def known(self, name: str) -> ApplicationRecord:
        """Return an application that the view need not have heard of yet."""
        known = self._view.applications.get(check_application(name))
        if known is not None:
            return known
        found = await self._store.applications.get(name)
        if found is None:
            raise no_application(name)
        return found[0]


def no_application(name: str) -> ApplicationNotFound:
    """Return what is raised for an application that isn't there."""
    return ApplicationNotFound(f"application {name!r} is not registered; `flmctl list -a` shows those that are")
