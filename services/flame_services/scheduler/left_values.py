"""Large inputs and common data that nobody will ever ask for.

Their client ended before it created the session, or the session had ended before they were stored; or they are the
inputs of tasks that have ended. Everything else goes with its session.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.ids import task_of_value

log = get_logger("flame.scheduler")


class LeftValues:
    """Removes what nobody needs, when it was found so twice, an hour apart: it may just be stored."""

    def __init__(self, broker: Broker, is_over: Callable[[str], Awaitable[bool]]) -> None:
        """Ask ``is_over`` whether a session has settled, or doesn't exist."""
        self._broker = broker
        self._is_over = is_over
        self._suspects: dict[str, set[tuple[str, str]]] = {}
        """By application, sessions and values that were found the last time, those of waiting tasks included."""
        self._next = 0.0

    async def look(self, applications: Iterable[str], now: float) -> None:
        """Look at every application, if it is time for that: the first time, and then every hour."""
        if now < self._next:
            return
        self._next = now + defaults.VALUE_ORPHAN_S
        before, self._suspects = self._suspects, {}
        for application in applications:
            try:
                await self._look_at(application, before.get(application, set()))
            except StreamMissing:
                continue  # just unregistered
            except FlameError as error:
                log.debug("could not look for large values that were left", application=application, error=str(error))

    async def _look_at(self, application: str, before: set[tuple[str, str]]) -> None:
        stream = subjects.blob_stream(application)
        if not (await self._broker.stream_state(stream)).messages:
            return
        stored = await self._broker.subjects(stream, subjects.blob(application, "*", subjects.IN, "*", "*"))
        values = {subjects.stored_value(subject) for subject in stored}
        over = {session for session in {session for session, _ in values} if await self._is_over(session)}
        suspects = self._suspects[application] = set()
        for session, value in values:
            task = task_of_value(value)
            if session not in over and not task:
                continue
            if (session, value) not in before or (
                session not in over and await self._is_stored(application, session, task)
            ):
                suspects.add((session, value))
                continue
            log.info("removing a large value that was left", session=session, value=value)
            await self._broker.purge(stream, subjects.blob(application, session, subjects.IN, value, "*"))

    async def _is_stored(self, application: str, session: str, task: str) -> bool:
        """Whether a task waits or runs."""
        stream = subjects.task_stream(application)
        return await self._broker.last(stream, subjects.task(application, session, task)) is not None
