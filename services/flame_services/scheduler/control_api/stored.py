"""What is stored of a session's tasks, asked of the streams' leaders."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

from flame.broker.seam import Broker
from flame.errors import MalformedMessage
from flame.protocol import subjects
from flame.protocol.ids import KEYED
from flame.protocol.messages import TaskMessage

FEW: Final = 4
"""Up to so many tasks are asked for one by one whatever their stream holds."""
LISTED: Final = 32
"""Names that may be listed for each task that is asked for; from there on asking for each is cheaper."""
AT_ONCE: Final = 64
"""Questions under way at once."""


class StoredTasks:
    """The tasks of one session."""

    def __init__(self, broker: Broker, application: str, session: str) -> None:
        """Names must be legal."""
        self._broker = broker
        self._application = application
        self._session = session
        self._tasks = subjects.task_stream(application)
        self._results = subjects.result_stream(application)

    async def waiting(self, tasks: Sequence[str]) -> set[str]:
        """Return those that are stored and not acknowledged: they wait, run, or have just finished.

        Asked before their results, it leaves no gap: what is not waiting any more had its record stored before it went.
        Raises `StreamMissing` if the application is gone.
        """
        if len(tasks) > FEW and (await self._broker.stream_state(self._tasks)).messages <= LISTED * len(tasks):
            return (await self.all_waiting()).intersection(tasks)
        found: set[str] = set()
        for begin in range(0, len(tasks), AT_ONCE):
            some = tasks[begin : begin + AT_ONCE]
            counts = await asyncio.gather(*(self._broker.subjects(self._tasks, self.subject(task)) for task in some))
            found.update(task for task, count in zip(some, counts, strict=True) if count)
        return found

    async def all_waiting(self) -> set[str]:
        """Return every task that is stored and not acknowledged."""
        return _last_tokens(
            await self._broker.subjects(self._tasks, subjects.session_tasks(self._application, self._session))
        )

    async def all_recorded(self) -> set[str]:
        """Return every task that has its record."""
        return _last_tokens(
            await self._broker.subjects(self._results, subjects.session_results(self._application, self._session))
        )

    async def records(self, tasks: Sequence[str]) -> list[bytes | None]:
        """Return the records of tasks, ``None`` for those that have none; for at most `AT_ONCE` tasks."""
        found = await asyncio.gather(*(self._broker.last(self._results, self.result(task)) for task in tasks))
        return [None if message is None else message.data for message in found]

    async def digests(self, tasks: Iterable[str]) -> dict[str, bytes]:
        """Return the digests of the inputs of those that were created under a key and are still stored; ask for few."""
        keyed = [task for task in tasks if task.startswith(KEYED)]
        found = await asyncio.gather(*(self._broker.last(self._tasks, self.subject(task)) for task in keyed))
        return {
            task: digest
            for task, message in zip(keyed, found, strict=True)
            if message is not None and (digest := _digest(message.data))
        }

    async def remove(self, tasks: Sequence[str]) -> None:
        """Remove tasks that have their records from where they wait."""
        for begin in range(0, len(tasks), AT_ONCE):
            some = tasks[begin : begin + AT_ONCE]
            await asyncio.gather(*(self._broker.purge(self._tasks, self.subject(task)) for task in some))

    def subject(self, task: str) -> str:
        """Where a task waits."""
        return subjects.task(self._application, self._session, task)

    def result(self, task: str) -> str:
        """Where its record is stored."""
        return subjects.result(self._application, self._session, task)


def _digest(task: bytes) -> bytes:
    try:
        return TaskMessage.decode(task).digest
    except MalformedMessage:
        return b""


def _last_tokens(names: dict[str, int]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}
