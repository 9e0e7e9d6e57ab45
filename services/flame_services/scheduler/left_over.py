"""Counting records that the control side wrote, for schedulers that did not live to do it, or could not at the time."""

from __future__ import annotations

import asyncio
from typing import Final

from flame.cancel import end_task
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol.records import SessionRecord
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

LOOK_S: Final = 10.0


class LeftOver:
    """Looks for such records now and then."""

    def __init__(self, view: View, recorder: Recorder) -> None:
        """Look at the sessions of ``view``."""
        self._view = view
        self._recorder = recorder
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look; the view must hold everything by now."""
        self._task = asyncio.create_task(self._go_on(), name="records left over")

    async def stop(self) -> None:
        """Look no more."""
        task, self._task = self._task, None
        await end_task(task)

    async def _go_on(self) -> None:
        """Count what is found uncounted at first, and later what is so for longer than a writer may take."""
        found = seen = self._found()
        while True:
            for session_id, _, _ in found & seen:
                session = self._view.sessions.get(session_id)
                if session is not None:
                    await self._count(session.record)
            await asyncio.sleep(LOOK_S)
            seen, found = found, self._found()

    def _found(self) -> set[tuple[str, str, int]]:
        """Return the sessions with records that were written and not counted, and who has written them."""
        return {
            (session.id, session.record.writer, session.record.written_from)
            for session in self._view.sessions.values()
            if session.record.writer and not self._recorder.is_writing(session.id)
        }

    async def _count(self, record: SessionRecord) -> None:
        try:
            async with self._recorder.writing(record.application, record.id):
                pass  # there is nothing new: what was written before is counted
        except FlameError as error:
            log.warning("records could not be counted; they are later", session=record.id, error=str(error))
