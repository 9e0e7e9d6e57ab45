"""A session as a client holds it: where tasks are created and their ends are heard."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from weakref import WeakSet

from flame.broker.seam import LiveMessage, Subscription
from flame.cancel import end_task
from flame.client.listing import list_tasks
from flame.client.outstanding import Outstanding
from flame.client.task import Task, TaskHandle, TaskInformer
from flame.client.watching import SessionEvent, SessionWatch
from flame.errors import (
    BrokerUnavailable,
    FlameError,
    InvalidArgument,
    MalformedMessage,
    NotFound,
    SessionFailed,
    SessionNotFound,
    SessionNotOpen,
    TaskNotFound,
    TimedOut,
    Unavailable,
)
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.messages import ResultRecord
from flame.protocol.records import SessionRecord
from flame.protocol.states import SessionState

if TYPE_CHECKING:
    from flame.client.connection import Connection

log = get_logger("flame.client")


CLOSE_AFTER_ERROR_S: Final = 2.0
"""How long leaving a session's context by an exception waits for the session to end."""


class Session:
    """An open session. Made by `Connection.create_session` and `Connection.open_session`.

    As an async context manager it waits for its tasks and closes on a clean exit; on an exception it closes at once.
    """

    def __init__(self, connection: Connection, record: SessionRecord) -> None:
        """Made by a connection."""
        self._connection = connection
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._tasks = Outstanding(connection, record, self._quiet)
        self._subscriptions: list[Subscription] = []
        self._watches: WeakSet[SessionWatch] = WeakSet()
        """Those that somebody still iterates over."""
        self._reconcile_timer: asyncio.TimerHandle | None = None
        self._reconcile_wait_s = defaults.RECONCILE_FIRST_S
        self._reconciling: asyncio.Task[None] | None = None
        self._missed_events = False
        """The connection was lost since the last look: of what is outstanding nothing is too young to be looked up."""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._note(record)

    @property
    def id(self) -> str:
        """The session's id."""
        return self._record.id

    @property
    def application(self) -> str:
        """The name of its application."""
        return self._record.application

    @property
    def state(self) -> SessionState:
        """The latest known state."""
        return self._record.state

    def __repr__(self) -> str:
        """Name the session and its state."""
        return f"<Session {self.id} {self.state.value}>"

    # ---- tasks

    async def invoke(
        self, input: bytes | str, informer: TaskInformer | None = None, *, timeout_s: float | None = None
    ) -> Task:
        """Run a task and return it with its ``output``.

        Args:
            input: What the service gets; text is sent as UTF-8. At most 256 KiB with its envelope.
            informer: Hears of every change of the task.
            timeout_s: How long to wait. The task goes on after that.

        Raises:
            TaskFailed: The service raised, or the task was given up with its session.
            TaskCancelled: The task was cancelled.
            TimedOut: ``timeout_s`` passed.
            SessionNotOpen: The session has ended; `SessionFailed` if it failed.
            QueueFull: The application holds as many waiting tasks as it may.
            BrokerUnavailable: The broker did not acknowledge the task; it may have been stored.
        """
        handle = await self._submit(input, informer)
        if timeout_s is None:
            return await handle
        try:
            async with asyncio.timeout(timeout_s):
                return await handle
        except TimeoutError:
            raise TimedOut(
                f"task {handle.id} of session {self.id} has not ended after {timeout_s:g} s; it goes on: see get_task"
            ) from None

    async def create_task(self, input: bytes | str, informer: TaskInformer | None = None) -> TaskHandle:
        """Store a task and return what can be awaited for its end: from now on it will not be lost.

        Arguments and errors as in `invoke`.
        """
        handle = await self._submit(input, informer)
        stored = handle.when_stored()
        if stored is not None:
            await stored
        return handle

    async def create_tasks(
        self, inputs: Iterable[bytes | str], informer: TaskInformer | None = None
    ) -> list[TaskHandle]:
        """Store many tasks and return their handles, in order, when all are stored.

        They are sent without waiting for one another. If one can't be stored its error is raised; the others are stored
        and go on. Arguments and errors as in `invoke`.
        """
        handles = [await self._submit(data, informer) for data in inputs]
        for handle in handles:
            stored = handle.when_stored()
            if stored is not None:
                await stored
        return handles

    async def map(
        self,
        inputs: Iterable[bytes | str] | AsyncIterable[bytes | str],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: bool = True,
    ) -> AsyncIterator[Task]:
        """Run a task for each input and yield the finished tasks, in the order of the inputs or as they finish.

        Inputs are taken as results are asked for, so that any number of them needs little memory.

        Args:
            inputs: What the tasks get; an iterable or an asynchronous one.
            ordered: In the order of the inputs; otherwise as they finish.
            in_flight: How many tasks are outstanding at most.
            raise_failed: Raise at a task that failed, as `invoke` does; otherwise yield it like the others.
        """
        if in_flight < 1:
            raise InvalidArgument(f"in_flight: expected at least 1, got {in_flight}")
        async for handle in self._finished(_each(inputs), in_flight, ordered):
            task = await handle.finished()
            yield task.check() if raise_failed else task

    async def _finished(
        self, inputs: AsyncIterator[bytes | str], in_flight: int, ordered: bool
    ) -> AsyncIterator[TaskHandle]:
        """Submit and yield handles: the oldest one's turn, or one that has ended."""
        waiting: deque[TaskHandle] = deque()
        ended: asyncio.Queue[TaskHandle] = asyncio.Queue()
        more = True
        outstanding = 0
        while more or outstanding:
            while more and outstanding < in_flight:
                try:
                    handle = await self._submit(await anext(inputs), None)
                except StopAsyncIteration:
                    more = False
                    break
                outstanding += 1
                if ordered:
                    waiting.append(handle)
                else:
                    handle.future.add_done_callback(lambda _, handle=handle: ended.put_nowait(handle))  # type: ignore[misc]
            if outstanding:
                yield waiting.popleft() if ordered else await ended.get()
                outstanding -= 1

    async def get_task(self, task_id: str) -> Task:
        """Return a task of this session as the cluster knows it now, whoever created it.

        A finished one has its output. Raises `TaskNotFound` if there is no such task, or its result has aged out.
        """
        subjects.check_token("task", task_id)
        looks = await self._tasks.look_up([task_id])
        handle = TaskHandle(task_id, self._record, b"", self._loop, None)
        record = looks.results.get(task_id)
        if record is not None:
            handle.finish(ResultRecord.decode(record))
            return handle.task
        if task_id in looks.waiting:
            return (self._tasks.get(task_id) or handle).task
        raise TaskNotFound(f"session {self.id} has no task {task_id!r}, or its result has aged out")

    async def list_tasks(self, *, after: str = "", limit: int = 100) -> list[Task]:
        """Return tasks of this session as the cluster knows them now, whoever created them, ordered by id.

        Ids are sorted by creation within one client. Finished tasks have their outputs. Which of the unfinished ones
        run is told from how many do, a second ago or less: the oldest are taken to be those.

        Args:
            after: Only tasks whose ids are above this one: the last of the page before.
            limit: At most so many, up to 10,000. Fewer than that are returned only if there are no more.
        """
        return await list_tasks(self._connection, self.application, self.id, after=after, limit=limit)

    def watch(self) -> AsyncIterator[SessionEvent]:
        """Follow what happens to the session and its tasks from now on.

        The first event is the session's present state. Then come its further states, and those of tasks: of the ones
        that this client creates every state that it learns of; of others' that they run, if they do for 100 ms, and
        their end. No state of a task comes twice. After a lost connection it goes on with what has become of the
        session and of this client's tasks meanwhile. It ends when the session has ended and everything was told, and
        raises `BrokerUnavailable` if the connection is closed before. Events wait in memory until they are taken.
        """
        watch = SessionWatch(self._record, self._look_for_watches)
        self._watches.add(watch)
        self._tasks.on_task = self._tell_task
        return watch

    def _tell_task(self, task: Task) -> None:
        if not self._watches:
            self._tasks.on_task = None
        for watch in tuple(self._watches):
            watch.on_task(task)

    async def _look_for_watches(self) -> bool:
        """Look the session up; tell whether it has ended and nothing is outstanding."""
        if not self._record.settled:
            try:
                self._note(await self._connection.get_session_record(self.id))
            except SessionNotFound:
                return not self._tasks
            except Unavailable as error:
                if self._connection.closed:
                    raise
                log.debug("could not look the session up", session=self.id, error=str(error))
        return self._record.settled and not self._tasks

    async def close(self, *, timeout_s: float | None = None) -> None:
        """End the session and return once every task has its record: running ones finish, waiting ones are cancelled.

        Closing a session that has ended is no error. Raises `TimedOut` after ``timeout_s``; the closing goes on.
        """
        if not self._record.settled:
            self._note(await self._connection.request_close(self.id))
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled()
        except TimeoutError:
            raise TimedOut(f"session {self.id} is still closing after {timeout_s:g} s; it goes on") from None
        await self._release()

    async def __aenter__(self) -> Self:
        """Return the session."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the session's tasks, then close it; close at once after an exception."""
        if kind is None:
            await self._tasks.ended()
            await self.close()
            return
        # What went wrong is what the caller must hear of, and soon: running tasks finish without being waited for.
        with contextlib.suppress(FlameError):
            await self.close(timeout_s=CLOSE_AFTER_ERROR_S)

    async def _submit(self, input: bytes | str, informer: TaskInformer | None) -> TaskHandle:
        if self._record.state is not SessionState.OPEN:
            raise self._ended_error()
        if self._connection.closed:
            raise BrokerUnavailable("the connection is closed; make another")
        handle = await self._tasks.submit(input if type(input) is bytes else _as_bytes(input), informer)
        if self._reconcile_timer is None:
            self._reconcile_timer = self._loop.call_later(self._reconcile_wait_s, self._reconcile_due)
        return handle

    # ---- hearing of their ends

    async def listen(self) -> None:
        """Begin to hear of the session's tasks and of its own end."""
        broker = self._connection.broker
        application, session = self._record.application, self._record.id
        self._subscriptions = [
            await broker.subscribe(subjects.session_task_events(application, session), self._tasks.on_event),
            await broker.subscribe(subjects.session_events(application, session), self._on_session_event),
        ]

    def _on_session_event(self, message: LiveMessage) -> None:
        try:
            self._note(SessionRecord.decode(message.data))
        except MalformedMessage as error:
            log.warning("unreadable event", subject=message.subject, error=str(error))

    def _note(self, record: SessionRecord) -> None:
        """Take a state of the session over; states only ever go forward."""
        if self._record.settled or (self._record.state is not SessionState.OPEN and record.state is SessionState.OPEN):
            return
        self._record = record
        for watch in tuple(self._watches):
            watch.on_session(record)
        if record.settled:
            self._look_now()
            if not self._ended.done():
                self._ended.set_result(None)

    def _quiet(self) -> None:
        if self._reconcile_timer is not None:
            self._reconcile_timer.cancel()
            self._reconcile_timer = None
        self._reconcile_wait_s = defaults.RECONCILE_FIRST_S

    # ---- asking for what was not heard

    def reconcile_now(self) -> None:
        """Ask for everything outstanding: events may have been missed while the connection was gone."""
        self._reconcile_wait_s = defaults.RECONCILE_FIRST_S
        self._missed_events = True
        self._look_now()

    def _look_now(self) -> None:
        if (self._tasks or not self._record.settled) and self._reconciling is None:
            self._reconciling = self._loop.create_task(self._reconcile())

    def _reconcile_due(self) -> None:
        self._reconcile_timer = None
        self._look_now()

    async def _reconcile(self) -> None:
        failed = False
        try:
            found = await self._reconcile_once()
        except NotFound as error:
            self._tasks.lose_all(error)
            found = True
        except FlameError as error:
            log.debug("could not look up what is outstanding", session=self.id, error=str(error))
            failed = found = self._missed_events = True  # nothing is known: ask again as soon as at first
        finally:
            self._reconciling = None
        self._reconcile_wait_s = (
            defaults.RECONCILE_FIRST_S if found else min(2 * self._reconcile_wait_s, defaults.RECONCILE_MAX_S)
        )
        if self._reconcile_timer is None and (self._tasks or self._closing()):
            hurry = (self._record.settled or self._missed_events) and not failed
            wait_s = 0.2 if hurry else self._reconcile_wait_s
            self._reconcile_timer = self._loop.call_later(wait_s, self._reconcile_due)

    async def _reconcile_once(self) -> bool:
        """Look up the session and what is outstanding; tell whether anything had been missed."""
        if not self._record.settled:
            self._note(await self._connection.get_session_record(self.id))
        everything = self._record.settled or self._missed_events
        self._missed_events = False
        return await self._tasks.reconcile(everything=everything)

    # ---- ending

    def _closing(self) -> bool:
        return self._record.state is not SessionState.OPEN and not self._record.settled

    def _ended_error(self) -> SessionNotOpen:
        if self._record.state is SessionState.FAILED:
            return SessionFailed(f"session {self.id} failed: {self._record.reason}")
        return SessionNotOpen(
            f"session {self.id} is {self._record.state.value}: it takes no more tasks; create another"
        )

    async def _settled(self) -> None:
        while not self._ended.done():
            # The event is live and may be missed; asking is what makes this certain.
            await asyncio.wait([self._ended], timeout=0.5)
            if not self._ended.done():
                try:
                    self._note(await self._connection.get_session_record(self.id))
                except SessionNotFound:
                    return
                except Unavailable as error:
                    if self._connection.closed:
                        raise
                    log.debug("could not look the session up", session=self.id, error=str(error))
        await self._tasks.ended()

    async def abandon(self, error: FlameError) -> None:
        """The connection is closed: nothing more will be heard."""
        await self._release()
        await self._tasks.stop()
        self._tasks.lose_all(error)
        for watch in tuple(self._watches):
            watch.fail(error)

    async def _release(self) -> None:
        self._quiet()
        await end_task(self._reconciling)
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.stop()
        self._connection.forget(self)


async def _each(inputs: Iterable[bytes | str] | AsyncIterable[bytes | str]) -> AsyncIterator[bytes | str]:
    if isinstance(inputs, AsyncIterable):
        async for data in inputs:
            yield data
    else:
        for data in inputs:
            yield data


def _as_bytes(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise InvalidArgument(f"input: expected bytes or str, got {type(value).__name__}")
