"""Asking for what a session's live events did not tell."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from flame.cancel import end_task
from flame.errors import FlameError, NotFound
from flame.logs import get_logger
from flame.protocol import defaults
from flame.protocol.states import SessionState

if TYPE_CHECKING:
    from flame.client.outstanding import Outstanding
    from flame.protocol.records import SessionRecord

log = get_logger("flame.client")

HURRY_S: Final = 0.2
"""Before the next look where something is known to be missing."""


class Reconciler:
    """Looks up what is outstanding in one session: now and then, after a reconnect, and when the session has ended."""

    def __init__(
        self, tasks: Outstanding, session: Callable[[], SessionRecord], look_session: Callable[[], Awaitable[None]]
    ) -> None:
        """Look up ``tasks``; ``session`` returns the record that is known, which ``look_session`` brings up to date."""
        self._tasks = tasks
        self._session = session
        self._look_session = look_session
        self._loop = asyncio.get_running_loop()
        self._wait_s = defaults.RECONCILE_FIRST_S
        self._looking: asyncio.Task[None] | None = None
        self._missed_events = False
        """The connection was lost since the last look: of what is outstanding nothing is too young to be looked up."""
        self.timer: asyncio.TimerHandle | None = None
        """Of the next look, if there is to be one."""

    def expect(self) -> None:
        """Look after a while, since something is outstanding now. Only if there is no `timer`."""
        self.timer = self._loop.call_later(self._wait_s, self._due)

    def quiet(self) -> None:
        """Look no more, since nothing is outstanding."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self._wait_s = defaults.RECONCILE_FIRST_S

    def missed_events(self) -> None:
        """Look for everything now: events may have been missed while the connection was gone."""
        self._wait_s = defaults.RECONCILE_FIRST_S
        self._missed_events = True
        self.look()

    def look(self) -> None:
        """Look now, unless that is being done or there is nothing to look for."""
        if (self._tasks or not self._session().settled) and self._looking is None:
            self._looking = self._loop.create_task(self._run())

    async def stop(self) -> None:
        """Look no more, and end a look that is under way."""
        self.quiet()
        await end_task(self._looking)

    def _due(self) -> None:
        self.timer = None
        self.look()

    async def _run(self) -> None:
        failed = False
        try:
            found = await self._look_once()
        except NotFound as error:
            self._tasks.lose_all(error)
            found = True
        except FlameError as error:
            log.debug("could not look up what is outstanding", session=self._session().id, error=str(error))
            failed = found = self._missed_events = True  # nothing is known: ask again as soon as at first
        finally:
            self._looking = None
        self._wait_s = defaults.RECONCILE_FIRST_S if found else min(2 * self._wait_s, defaults.RECONCILE_MAX_S)
        session = self._session()
        ending = session.state is not SessionState.OPEN and not session.settled
        if self.timer is None and (self._tasks or ending):
            hurry = (session.settled or self._missed_events) and not failed
            self.timer = self._loop.call_later(HURRY_S if hurry else self._wait_s, self._due)

    async def _look_once(self) -> bool:
        """Look up the session and what is outstanding; tell whether anything had been missed."""
        if not self._session().settled:
            await self._look_session()
        everything = self._session().settled or self._missed_events
        self._missed_events = False
        return await self._tasks.reconcile(everything=everything)
