"""A session as a client holds it: where tasks are created and their ends are heard."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from flame.broker.errors import Duplicate, NotAcknowledged, StreamFull, StreamMissing
from flame.broker.seam import LiveMessage, Subscription
from flame.cancel import end_task, end_tasks
from flame.client.task import Task, TaskHandle, TaskInformer
from flame.errors import (
    ApplicationNotFound,
    BrokerUnavailable,
    FlameError,
    InvalidArgument,
    MalformedMessage,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    SessionFailed,
    SessionNotFound,
    SessionNotOpen,
    TaskNotFound,
    TimedOut,
    Unavailable,
)
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.api import LOOK_UP_LIMIT, LookUpTasks, TaskLooks, Verb
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord, RunningEvent, TaskFault, TaskMessage
from flame.protocol.records import SessionRecord
from flame.protocol.states import SessionState, TaskState

if TYPE_CHECKING:
    from flame.client.connection import Connection

log = get_logger("flame.client")

STORE_ATTEMPT_S: Final = 5.0
"""How long one attempt at storing a task waits for the broker's acknowledgement."""


class Session:
    """An open session. Made by `Connection.create_session` and `Connection.open_session`.

    As an async context manager it waits for its tasks and closes on a clean exit; on an exception it closes at once.
    """

    def __init__(self, connection: Connection, record: SessionRecord) -> None:
        """Made by a connection."""
        self._connection = connection
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._task_prefix = subjects.task(record.application, record.id, "")
        self._result_prefix = subjects.result(record.application, record.id, "")
        self._outstanding: dict[str, TaskHandle] = {}
        self._unacknowledged = 0
        self._window: asyncio.Future[None] | None = None
        self._subscriptions: list[Subscription] = []
        self._reconcile_timer: asyncio.TimerHandle | None = None
        self._reconcile_wait_s = defaults.RECONCILE_FIRST_S
        self._reconciling: asyncio.Task[None] | None = None
        self._missed_events = False
        """The connection was lost since the last look: of what is outstanding nothing is too young to be looked up."""
        self._retries: set[asyncio.Task[None]] = set()
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

    async def get_task(self, task_id: str) -> Task:
        """Return a task of this session as the cluster knows it now, whoever created it.

        A finished one has its output. Raises `TaskNotFound` if there is no such task, or its result has aged out.
        """
        subjects.check_token("task", task_id)
        looks = await self._look_up([task_id])
        handle = TaskHandle(task_id, self._record, b"", self._loop, None)
        record = looks.results.get(task_id)
        if record is not None:
            handle.finish(ResultRecord.decode(record))
            return handle.task
        if task_id in looks.waiting:
            return self._outstanding.get(task_id, handle).task
        raise TaskNotFound(f"session {self.id} has no task {task_id!r}, or its result has aged out")

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
            await self._idle()
        await self.close()

    # ---- creating tasks

    async def _submit(self, input: bytes | str, informer: TaskInformer | None) -> TaskHandle:
        if self._record.state is not SessionState.OPEN:
            raise self._ended_error()
        if self._connection.closed:
            raise BrokerUnavailable("the connection is closed; make another")
        if type(input) is not bytes:
            input = _as_bytes(input)
        payload = TaskMessage(input, informer is not None).encode()
        if len(payload) > defaults.INLINE_LIMIT_BYTES:
            raise PayloadTooLarge(
                f"input of {len(input)} bytes: with its envelope {len(payload)}, the limit is"
                f" {defaults.INLINE_LIMIT_BYTES}; pass a reference to large data instead"
            )
        while self._unacknowledged >= defaults.PUBLISH_WINDOW:
            await self._room()
        task_id = self._connection.task_ids.mint()
        handle = TaskHandle(task_id, self._record, payload, self._loop, informer)
        self._outstanding[task_id] = handle
        self._unacknowledged += 1
        try:
            await self._connection.broker.store_then(
                self._task_prefix + task_id, payload, STORE_ATTEMPT_S, partial(self._on_stored, handle)
            )
        except FlameError as error:
            self._on_stored(handle, 0, error)
        except BaseException:
            self._unacknowledged -= 1
            del self._outstanding[task_id]
            raise
        if self._reconcile_timer is None:
            self._reconcile_timer = self._loop.call_later(self._reconcile_wait_s, self._reconcile_due)
        return handle

    async def _room(self) -> None:
        if self._window is None:
            self._window = self._loop.create_future()
        await asyncio.shield(self._window)

    def _on_stored(self, handle: TaskHandle, _sequence: int, error: FlameError | None) -> None:
        if error is None or handle.stored or handle.done() or isinstance(error, Duplicate):
            self._stored(handle)
        elif isinstance(error, BrokerUnavailable):
            retry = self._loop.create_task(self._store_again(handle))
            self._retries.add(retry)
            retry.add_done_callback(self._retries.discard)
        else:
            self._not_stored(handle, error)

    def _stored(self, handle: TaskHandle) -> None:
        self._acknowledged()
        handle.mark_stored(None)

    def _not_stored(self, handle: TaskHandle, error: BaseException) -> None:
        self._acknowledged()
        self._outstanding.pop(handle.id, None)
        if isinstance(error, StreamFull):
            error = QueueFull(
                f"application {self.application} holds as many waiting tasks as it may;"
                " the task was not stored: try again later"
            )
        elif isinstance(error, StreamMissing):
            error = ApplicationNotFound(f"application {self.application} is not registered any more")
        failure = error if isinstance(error, FlameError) else BrokerUnavailable(str(error))
        handle.mark_stored(failure)

    def _acknowledged(self) -> None:
        self._unacknowledged -= 1
        if self._window is not None and self._unacknowledged < defaults.PUBLISH_WINDOW:
            self._window.set_result(None)
            self._window = None

    async def _store_again(self, handle: TaskHandle) -> None:
        """Keep trying to store a task whose acknowledgement did not come.

        It may be stored, and may even have run: that is looked up first, and the task says so to its executor.
        """
        deadline = self._loop.time() + defaults.STORE_TIMEOUT_S
        subject = self._task_prefix + handle.id
        payload = TaskMessage.decode(handle.payload)
        payload.again = True
        data = payload.encode()
        pause_s = defaults.BACKOFF_FIRST_S
        last: FlameError | None = None
        while self._loop.time() < deadline and not handle.stored and not handle.done():
            try:
                looks = await self._look_up([handle.id])
                if not (looks.waiting or looks.results):
                    await self._connection.broker.store(subject, data, STORE_ATTEMPT_S)
            except Duplicate:
                pass
            except Unavailable as error:
                last = error
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 2.0)
                continue
            except FlameError as error:
                self._not_stored(handle, error)
                return
            else:
                for record in looks.results.values():
                    self._finish(handle.id, record)
            self._stored(handle)
            return
        if handle.stored or handle.done():
            self._stored(handle)
            return
        self._not_stored(
            handle,
            NotAcknowledged(
                f"task {handle.id} of session {self.id}: not acknowledged within {defaults.STORE_TIMEOUT_S:g} s"
                f" ({last}); it may have been stored"
            ),
        )

    # ---- hearing of their ends

    async def listen(self) -> None:
        """Begin to hear of the session's tasks and of its own end."""
        broker = self._connection.broker
        application, session = self._record.application, self._record.id
        self._subscriptions = [
            await broker.subscribe(subjects.session_task_events(application, session), self._on_task_event),
            await broker.subscribe(subjects.session_events(application, session), self._on_session_event),
        ]

    def _on_task_event(self, message: LiveMessage) -> None:
        _, task_id, kind = message.subject.rsplit(".", 2)
        if kind == "done":
            # Anybody might publish here; the broker alone says under which subject a record is stored.
            if message.stored_as == self._result_prefix + task_id:
                self._finish(task_id, message.data)
        elif kind == "running":
            handle = self._outstanding.get(task_id)
            if handle is not None:
                try:
                    handle.learn(handle.task.started_by(RunningEvent.decode(message.data)))
                except MalformedMessage as error:
                    log.warning("unreadable event", subject=message.subject, error=str(error))

    def _finish(self, task_id: str, data: bytes) -> None:
        handle = self._outstanding.get(task_id)
        if handle is None:
            return
        try:
            record = ResultRecord.decode(data)
        except MalformedMessage as error:
            # It is the task's one record all the same: nothing else will come.
            fault = TaskFault(ErrorCode.INTERNAL, f"the task's record can't be read: {error}")
            record = ResultRecord(TaskState.FAILED, error=fault)
        del self._outstanding[task_id]
        handle.finish(record)
        if not self._outstanding:
            self._quiet()

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
        if (self._outstanding or not self._record.settled) and self._reconciling is None:
            self._reconciling = self._loop.create_task(self._reconcile())

    def _reconcile_due(self) -> None:
        self._reconcile_timer = None
        self._look_now()

    async def _reconcile(self) -> None:
        failed = False
        try:
            found = await self._reconcile_once()
        except NotFound as error:
            self._lose_all(error)
            found = True
        except FlameError as error:
            log.debug("could not look up what is outstanding", session=self.id, error=str(error))
            failed = found = self._missed_events = True  # nothing is known: ask again as soon as at first
        finally:
            self._reconciling = None
        self._reconcile_wait_s = (
            defaults.RECONCILE_FIRST_S if found else min(2 * self._reconcile_wait_s, defaults.RECONCILE_MAX_S)
        )
        if self._reconcile_timer is None and (self._outstanding or self._closing()):
            hurry = (self._record.settled or self._missed_events) and not failed
            wait_s = 0.2 if hurry else self._reconcile_wait_s
            self._reconcile_timer = self._loop.call_later(wait_s, self._reconcile_due)

    async def _reconcile_once(self) -> bool:
        """Look up what has been outstanding for a while, or all of it; tell whether anything had been missed."""
        if not self._record.settled:
            self._note(await self._connection.get_session_record(self.id))
        ended = self._record.settled
        everything = ended or self._missed_events
        oldest = self._loop.time() - defaults.RECONCILE_FIRST_S
        due = [h.id for h in self._outstanding.values() if h.stored and (everything or h.created <= oldest)]
        self._missed_events = False
        found = False
        for begin in range(0, len(due), LOOK_UP_LIMIT):
            page = due[begin : begin + LOOK_UP_LIMIT]
            looks = await self._look_up(page)
            for task_id, record in looks.results.items():
                found = True
                self._finish(task_id, record)
            if not ended and looks.waiting and not looks.results:
                break  # tasks run in order: what is younger waits too
            unknown = set(page) - set(looks.waiting) - set(looks.results) - set(looks.unread)
            for task_id in unknown:
                found = True
                self._expire(task_id)
        return found

    def _expire(self, task_id: str) -> None:
        handle = self._outstanding.pop(task_id, None)
        if handle is not None:
            fault = TaskFault(ErrorCode.TASK_EXPIRED, "neither the task nor its result is kept any more")
            handle.finish(ResultRecord(TaskState.FAILED, error=fault))

    async def _look_up(self, tasks: Iterable[str]) -> TaskLooks:
        request = LookUpTasks(application=self.application, session=self.id, tasks=tuple(tasks))
        return await self._connection.call(Verb.LOOK_UP_TASKS, request, TaskLooks)

    # ---- ending

    def _closing(self) -> bool:
        return self._record.state is not SessionState.OPEN and not self._record.settled

    def _ended_error(self) -> SessionNotOpen:
        if self._record.state is SessionState.FAILED:
            return SessionFailed(f"session {self.id} failed: {self._record.reason}")
        return SessionNotOpen(
            f"session {self.id} is {self._record.state.value}: it takes no more tasks; create another"
        )

    async def _idle(self) -> None:
        """Wait until every task created here has ended, however it did."""
        while self._outstanding:
            await asyncio.wait([h.future for h in self._outstanding.values()])
            # A handle may have ended without leaving: only those that go on keep us here.
            for task_id in [task_id for task_id, h in self._outstanding.items() if h.done()]:
                del self._outstanding[task_id]

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
        await self._idle()

    def _lose_all(self, error: FlameError) -> None:
        outstanding, self._outstanding = self._outstanding, {}
        for handle in outstanding.values():
            handle.lose(error)

    async def abandon(self, error: FlameError) -> None:
        """The connection is closed: nothing more will be heard."""
        await self._release()
        await end_tasks(self._retries)
        self._lose_all(error)

    async def _release(self) -> None:
        self._quiet()
        await end_task(self._reconciling)
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.stop()
        self._connection.forget(self)


def _as_bytes(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise InvalidArgument(f"input: expected bytes or str, got {type(value).__name__}")
