"""What happens in a cluster, as it happens."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from flame.broker.seam import LiveMessage, Subscription
from flame.client.feed import Feed
from flame.errors import InvalidArgument, MalformedMessage, Unavailable
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.events import ClusterEvent, Noun
from flame.protocol.messages import ResultRecord, RunningEvent
from flame.protocol.states import TaskState
from flame.protocol.subjects import check_application, check_token

if TYPE_CHECKING:
    from flame.client.connection import Connection

log = get_logger("flame.client")


class ClusterEvents(Feed[ClusterEvent]):
    """Events of a cluster, from the moment that it listens. Made by `Connection.events`.

    As an async context manager it listens from the entry of its block to its end; otherwise from the first step of the
    iteration on, until the connection is closed or `aclose` is called.
    """

    def __init__(self, connection: Connection, session: str | None, application: str | None, *, tasks: bool) -> None:
        """Say what to listen for; nothing is asked yet."""
        home = connection.open_in or asyncio.get_running_loop()
        super().__init__(f"the iterator over events of {connection.endpoint}", home)
        if session is not None:
            check_token("session", session)
        if application is not None:
            check_application(application)
        self._connection = connection
        self._session = session
        self._application = application
        self._tasks = tasks
        self._subscriptions: list[Subscription] = []
        self._listening = False

    async def __aenter__(self) -> Self:
        """Begin to listen."""
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Listen no more."""
        await self.aclose()

    async def __anext__(self) -> ClusterEvent:
        """Return the next event, waiting for it."""
        await self._listen()
        return await super().__anext__()

    async def aclose(self) -> None:
        """Listen no more: what was heard can still be taken, then the iteration ends. Idempotent."""
        self._listening = self._ended = True
        self._news.set()
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.stop()

    async def _listen(self) -> None:
        if self._listening:
            return
        self._check_loop()
        self._listening = True
        broker = self._connection.broker
        try:
            cluster_subjects, task_subject = await self._find()
            for subject in cluster_subjects:
                self._subscriptions.append(await broker.subscribe(subject, self._on_cluster))
            if self._tasks:
                self._subscriptions.append(await broker.subscribe(task_subject, self._on_task))
            with suppress(Unavailable):  # a round trip, after which the broker knows that somebody listens
                await self._connection.info()
        except BaseException:
            await self.aclose()
            self._listening = False
            raise

    async def _find(self) -> tuple[list[str], str]:
        """Return where what is wanted is told, and where that of its tasks."""
        if self._session is not None:
            application = (await self._connection.get_session_record(self._session)).application
            if self._application not in (None, application):
                raise InvalidArgument(
                    f"session {self._session} is one of application {application}, not of {self._application}"
                )
            events = [subjects.session_events(application, self._session)]
            return events, subjects.session_task_events(application, self._session)
        if self._application is not None:
            name = (await self._connection.get_application(self._application)).name
            events = [subjects.session_events(name, "*"), subjects.application_events(name)]
            return events, subjects.session_task_events(name, "*")
        events = [subjects.all_session_events(), subjects.node_events("*"), subjects.application_events("*")]
        return events, subjects.all_task_events()

    def _on_cluster(self, message: LiveMessage) -> None:
        try:
            self._put(ClusterEvent.decode(message.data))
        except MalformedMessage as error:
            log.warning("unreadable event", subject=message.subject, error=str(error))

    def _on_task(self, message: LiveMessage) -> None:
        try:
            event = task_event(message)
        except MalformedMessage as error:
            log.warning("unreadable event", subject=message.subject, error=str(error))
        else:
            if event is not None:
                self._put(event)


def task_event(message: LiveMessage) -> ClusterEvent | None:
    """Return what a task's notification says; ``None`` for kinds of a newer version, and what nobody stored."""
    address, kind = subjects.parse_event(message.subject)
    if kind == "running":
        running = RunningEvent.decode(message.data)
        return _event(address, TaskState.RUNNING, running.at, running.executor)
    if kind != "done" or message.stored_as != subjects.result(*address):
        return None
    record = ResultRecord.decode(message.data)
    code, reason = (str(record.error.code), record.error.message) if record.error is not None else ("", "")
    return _event(address, record.state, record.finished, record.executor, code, reason)


def _event(
    address: subjects.TaskAddress, state: TaskState, at: float, executor: str, code: str = "", reason: str = ""
) -> ClusterEvent:
    return ClusterEvent(
        noun=Noun.TASK,
        id=address.task,
        event=state.value,
        state=state.value,
        at=at,
        application=address.application,
        session=address.session,
        executor=executor,
        code=code,
        reason=reason,
    )
