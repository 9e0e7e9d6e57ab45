"""A session as a client holds it: where tasks are created and their ends are heard."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, overload
from weakref import WeakSet

from flame.broker.seam import LiveMessage, Subscription
from flame.client.chunks import ChunkStream
from flame.client.keyed import submit_each
from flame.client.listing import list_tasks
from flame.client.mapping import MapOptions, mapped
from flame.client.outstanding import Outstanding
from flame.client.reconciling import Reconciler
from flame.client.task import Task, TaskHandle, TaskInformer
from flame.client.watching import SessionEvent, SessionWatch
from flame.errors import (
    FlameError,
    InvalidArgument,
    MalformedMessage,
    SessionFailed,
    SessionNotFound,
    SessionNotOpen,
    TaskNotFound,
    TimedOut,
    Unavailable,
)
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.api import CloseSession, SessionInfo
from flame.protocol.events import ClusterEvent
from flame.protocol.messages import ResultRecord, TaskOptions
from flame.protocol.progress import Progress
from flame.protocol.records import SessionRecord
from flame.protocol.states import CloseMode, SessionState, TaskState

if TYPE_CHECKING:
    from flame.client.connection import Connection
    from flame.client.typed import TypedSession
    from flame.typed.codec import Contract, I, O

log = get_logger("flame.client")


CLOSE_AFTER_ERROR_S: Final = 2.0
"""How long leaving a session's context by an exception waits for the session to end."""
PROGRESS_S: Final = 0.5
"""Between two looks at a session that is closing."""


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
        self._reconciler = Reconciler(self._tasks, lambda: self._record, self._look_up)
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

    @property
    def common_data_version(self) -> int:
        """How often its common data was changed since its creation, as far as this client has heard of it."""
        return self._tasks.common_data_version

    def __repr__(self) -> str:
        """Name the session and its state."""
        return f"<Session {self.id} {self.state.value}>"

    # ---- tasks

    async def invoke(
        self,
        input: bytes | str,
        informer: TaskInformer | None = None,
        *,
        timeout_s: float | None = None,
        options: TaskOptions | None = None,
        key: str | None = None,
    ) -> Task:
        """Run a task and return it with its ``output``.

        Args:
            input: What the service gets; text is sent as UTF-8. At most 1 GiB. What is over 256 KiB goes in parts,
                before the task is stored, and is kept until the session has ended.
            informer: Hears of every change of the task.
            timeout_s: How long to wait for its end. The task goes on after that, and can be looked up with `get_task`.
                How long the task itself may run is ``options.timeout_s``.
            options: How the task is to be run, where that differs from what its application says.
            key: Names the task within the session, see `create_task`.

        Raises:
            TaskFailed: The service raised, or the task was given up; `TaskTimeout` if it ran for too long.
            TaskCancelled: The task was cancelled.
            TaskExpired: It was not started in the time that it was worth starting in.
            ValueGone: Its large output is not kept any more.
            PayloadTooLarge: ``input`` is over the limit.
            TimedOut: ``timeout_s`` passed.
            SessionNotOpen: The session has ended; `SessionFailed` if it failed.
            QueueFull: The application holds as many waiting tasks as it may, or the broker has no room for a large
                input.
            BrokerUnavailable: The broker did not acknowledge the task; it may have been stored.
        """
        handle = await self._submit(input, informer, _checked(options), key)
        if timeout_s is None:
            return await handle
        try:
            async with asyncio.timeout(timeout_s):
                return await handle
        except TimeoutError:
            raise TimedOut(
                f"task {handle.id} of session {self.id} has not ended after {timeout_s:g} s; it goes on: see get_task"
            ) from None

    async def create_task(
        self,
        input: bytes | str,
        informer: TaskInformer | None = None,
        *,
        options: TaskOptions | None = None,
        key: str | None = None,
    ) -> TaskHandle:
        """Store a task and return what can be awaited for its end: from now on it will not be lost.

        Arguments and errors as in `invoke`.

        With a ``key``, such as ``"order-17"``, there is one task for all who create it in this session: whoever is
        first has it stored, whoever comes later, from whichever client, gets the same task, which may have ended,
        however it did. So it can be created again when it isn't known whether it was. That holds for as long as results
        are kept, a day after its end. ``informer`` and ``options`` are those of whoever is first, the informer within
        one client. It takes a question to the scheduler, so it is slower. A key is a text of 1 to 512 characters.
        Raises `KeyReused` if the task of that key has another input; whether it has is known of waiting tasks, and of
        those that a service with Flame's SDK has run.
        """
        handle = await self._submit(input, informer, _checked(options), key)
        stored = handle.when_stored()
        if stored is not None:
            await stored
        return handle

    async def create_tasks(
        self,
        inputs: Iterable[bytes | str],
        informer: TaskInformer | None = None,
        *,
        options: TaskOptions | None = None,
        keys: Iterable[str | None] | None = None,
    ) -> list[TaskHandle]:
        """Store many tasks and return their handles, in order, when all are stored.

        They are sent without waiting for one another. If one can't be stored its error is raised; the others are stored
        and go on. Arguments and errors as in `invoke`. ``keys`` are those of the tasks, one for each input and ``None``
        for one without, and mean what ``key`` does in `create_task`; with another number of them nothing is stored.
        """
        wanted = _checked(options)
        if keys is not None:
            handles = await submit_each(lambda data, key: self._submit(data, informer, wanted, key), inputs, keys)
        else:
            handles = [await self._submit(data, informer, wanted) for data in inputs]
        for handle in handles:
            stored = handle.when_stored()
            if stored is not None:
                await stored
        return handles

    def map(
        self,
        inputs: Iterable[bytes | str] | AsyncIterable[bytes | str],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: bool = True,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
        key: Callable[[bytes | str], str | None] | None = None,
    ) -> AsyncGenerator[Task, None]:
        """Run a task for each input and yield the finished tasks, in the order of the inputs or as they finish.

        Inputs are taken as results are asked for, so that any number of them needs little memory. What iterating over
        them raises is raised here, and ends it.

        Args:
            inputs: What the tasks get; an iterable or an asynchronous one.
            ordered: In the order of the inputs; otherwise as they finish.
            in_flight: How many tasks are outstanding at most.
            raise_failed: Raise at a task that failed, as `invoke` does; otherwise yield it like the others.
            cancel_on_exit: Cancel what is outstanding when it ends before the last result: at an error, or when the
                ``async for`` is left. That takes a moment after a ``break``; ``async with contextlib.aclosing(...)``
                says when it is done. Otherwise what is outstanding goes on.
            on_progress: Called before each task is yielded, with how many that makes and how many inputs there are:
                ``None`` if they have no length. What it raises ends the map.
            options: How each of the tasks is to be run, where that differs from what their application says.
            key: Called with each input for the key of its task, as in `create_task`, or ``None`` for a task without. So
                a map that is begun again runs nothing twice. Each such task takes a question to the scheduler before
                the next input is taken. ``cancel_on_exit`` cancels them like the others, whoever created them first.
        """
        wanted = _checked(options)
        how = MapOptions(
            ordered=ordered,
            in_flight=in_flight,
            raise_failed=raise_failed,
            cancel_on_exit=cancel_on_exit,
            on_progress=on_progress,
        )

        def submit(data: bytes | str) -> Awaitable[TaskHandle]:
            return self._submit(data, None, wanted, None if key is None else key(data))

        return mapped(submit, self.cancel_tasks, inputs, how)

    # ---- values instead of bytes

    @overload
    def typed(self, input: Contract[I, O]) -> TypedSession[I, O]: ...
    @overload
    def typed(self, input: type[I], output: type[O]) -> TypedSession[I, O]: ...
    @overload
    def typed(self, input: type[I], output: object) -> TypedSession[I, Any]: ...
    @overload
    def typed(self, input: object, output: type[O]) -> TypedSession[Any, O]: ...
    @overload
    def typed(self, input: object, output: object) -> TypedSession[Any, Any]: ...
    def typed(self, input: Any, output: Any = None) -> TypedSession[Any, Any]:
        """Return this session with values instead of bytes: tasks take ``input`` and return ``output``.

        ``session.typed(Question, Answer)``, or ``session.typed(summarise)`` where the function is at hand that
        `entrypoint` was given. A type checker can't infer some types, as unions; say it for them:
        ``typed: flame.TypedSession[int | None, Answer] = session.typed(int | None, Answer)``.

        Raises:
            ConfigurationError: One of them is no type that JSON can hold.
        """
        from flame.client.typed import TypedSession  # noqa: PLC0415  # for those who use it
        from flame.typed.codec import Codec, Contract  # noqa: PLC0415

        if isinstance(input, Contract):
            return TypedSession(self, *input.codecs())
        return TypedSession(self, Codec(input, "Session.typed: input"), Codec(output, "Session.typed: output"))

    async def typed_as_published(self) -> TypedSession[Any, Any]:
        """Return this session with JSON values instead of bytes, checked by what its application publishes.

        For clients that don't have the service's types. Inputs are whatever `json.dumps` takes, and bytes are JSON
        text; they are checked by the application's ``input_schema`` before they are sent. Outputs are what `json.loads`
        returns. Where the application publishes no schema of one of them, that one is bytes. Schemas are those of this
        moment; the service itself checks by those that it has then. Needs the extra ``flame-engine[typed]``.

        Raises:
            ConfigurationError: The application publishes no schemas, or the extra is not installed.
        """
        from flame.client.published import codecs  # noqa: PLC0415  # for those who use it
        from flame.client.typed import TypedSession  # noqa: PLC0415

        spec = (await self._connection.get_application(self.application)).spec
        return TypedSession(self, *codecs(self.application, spec.input_schema, spec.output_schema))

    def stream(self, input: bytes | str, *, options: TaskOptions | None = None, key: str | None = None) -> ChunkStream:
        """Run a task and iterate over what it emits, as it does: ``async for chunk in session.stream(...)``.

        The task is stored when the iteration begins. See `ChunkStream` for what it brings and raises, and `invoke` for
        the arguments and for what it raises where the task can't be stored. A service emits by
        `TaskContext.emit`, or by being a generator; of one that does neither no chunk comes.
        """
        return ChunkStream(self._tasks, partial(self._submit, input, None, _checked(options), key))

    def open_stream(self, task_id: str) -> ChunkStream:
        """Iterate over what a task of this session emits, from the start, whoever created it and however late this is.

        Raises `TaskNotFound` when the iteration begins, if there is no such task or its result has aged out.
        """
        subjects.check_token("task", task_id)
        return ChunkStream(self._tasks, partial(self._find_task, task_id), self._tasks.release)

    async def _find_task(self, task_id: str) -> TaskHandle:
        handle = await self._tasks.find(task_id)
        if self._reconciler.timer is None and not handle.done():
            self._reconciler.expect()
        return handle

    async def get_task(self, task_id: str) -> Task:
        """Return a task of this session as the cluster knows it now, whoever created it.

        A finished one has its output, however large. Raises `TaskNotFound` if there is no such task, or its result has
        aged out.
        """
        subjects.check_token("task", task_id)
        looks = await self._tasks.look_up([task_id])
        handle = TaskHandle(task_id, self._record, b"", self._loop, None, self._tasks)
        record = looks.results.get(task_id)
        if record is not None:
            ended = ResultRecord.decode(record)
            if ended.output_ref is not None:
                return await self._tasks.values.load(task_id, ended)
            handle.finish(ended)
            return handle.task
        if task_id in looks.waiting:
            return (self._tasks.get(task_id) or handle).task
        raise TaskNotFound(f"session {self.id} has no task {task_id!r}, or its result has aged out")

    async def cancel_tasks(self, tasks: Iterable[str], reason: str = "") -> dict[str, TaskState]:
        """Give tasks of this session up by their ids, whoever created them, and return the states that they then have.

        Those states are final: `TaskState.CANCELLED`, or another if the task had ended before. Whatever happens at the
        same time, there is one record, and this tells which. Ids of no task of the session are left out. A waiting task
        never runs. What runs is told to stop: a coroutine is cancelled, and code that doesn't stop within 5 s is ended
        with its process, which costs the other tasks of that executor only time. Cancelling again changes nothing.

        Args:
            tasks: Their ids.
            reason: For people, at most 1000 characters; in the tasks' ``error.message``.

        Raises:
            InvalidArgument: ``tasks`` holds what can be no id, or ``reason`` is no text or too long.
            SchedulerUnavailable: No scheduler answers; some or all of them may have been cancelled.
        """
        return await self._connection.cancel_tasks(self.id, tasks, reason)

    async def list_tasks(self, *, after: str = "", limit: int = 100) -> list[Task]:
        """Return tasks of this session as the cluster knows them now, whoever created them, ordered by id.

        Ids are sorted by creation within one client. Finished tasks have their outputs, but for those over 256 KiB: see
        `Task.output_size`. Which of the unfinished ones
        run is told from how many do, a second ago or less: the oldest are taken to be those.

        Args:
            after: Only tasks whose ids are above this one: the last of the page before.
            limit: At most so many, up to 10,000. Fewer than that are returned only if there are no more.
        """
        return await list_tasks(self._connection, self.application, self.id, after=after, limit=limit)

    async def update_common_data(self, data: bytes, *, expected_version: int | None = None) -> int:
        """Give the session other common data and return its version: 1 for the first change, then 2 and so on.

        A task that this client creates after this has returned runs with this version or a later one, whichever
        executor runs it, and so does one of any other client that has opened the session since, or heard of the change.
        A task that runs meanwhile is not disturbed. Services hear of it by `FlameService.on_common_data_update`, idle
        ones at once. What was before is gone.

        Args:
            data: At most 1 GiB.
            expected_version: Change it only if it has this version, see `common_data_version`; 0: if it was never
                changed. ``None``: whichever it has.

        Raises:
            StaleVersion: It has another version than ``expected_version``; the text names both.
            SessionNotOpen: The session has ended, or is closing.
            PayloadTooLarge: ``data`` is over the limit.
            InvalidArgument: ``data`` is not bytes, or ``expected_version`` can be no version.
            SchedulerUnavailable: No scheduler answers; it may have been changed.
        """
        version = await self._connection.update_common_data(self.id, data, expected_version=expected_version)
        self._tasks.note_common_data(version)
        return version

    def watch(self) -> AsyncIterator[SessionEvent]:
        """Follow what happens to the session, its executors and its tasks from now on.

        The first event is the session's present state. Then come its further states; those of its executors, with the
        reason where one ended out of order; why it has fewer executors than it could use, and that an executor failed
        to enter it and another will try. Of tasks come: of the ones that this client creates every state that it learns
        of; of others' that they run, if they do for 100 ms, and their end; of all of them how far they are, where their
        service tells. No state of a task comes twice. After a lost connection it goes on with what has become of the
        session and of this client's tasks meanwhile. It ends when the session has ended and everything was told, and
        raises `BrokerUnavailable` if the connection is closed before. Events wait in memory until they are taken.
        """
        watch = SessionWatch(self._record, self._look_for_watches, self._loop)
        self._watches.add(watch)
        self._tasks.on_task = self._tell_task
        self._tasks.on_progress = self._tell_progress
        return watch

    def _tell_task(self, task: Task) -> None:
        if not self._watches:
            self._tasks.on_task = None
        for watch in tuple(self._watches):
            watch.on_task(task)

    def _tell_progress(self, task_id: str, progress: Progress) -> None:
        if not self._watches:
            self._tasks.on_progress = None
        for watch in tuple(self._watches):
            watch.on_progress(task_id, progress)

    async def _look_for_watches(self) -> bool:
        """Look the session up; tell whether it has ended and nothing is outstanding."""
        if not self._record.settled and not await self._look(None):
            return not self._tasks
        return self._record.settled and not self._tasks

    async def close(
        self,
        mode: CloseMode | str = CloseMode.CLOSE,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[SessionInfo], None] | None = None,
    ) -> None:
        """End the session and return once every task has its record. It takes no more tasks from now on.

        Closing a session that has ended is no error. Of one that is closing already, a mode that goes further than the
        one before counts from now on.

        Args:
            mode: What becomes of its tasks. ``close``: running ones finish, waiting ones are cancelled. ``drain``:
                waiting ones run first. ``force``: running ones are stopped too, and cancelled like the waiting ones.
            timeout_s: How long to wait; the closing goes on after that.
            on_progress: Called about twice a second while it lasts, and once at the end, with the session and the
                counts of its tasks. What it raises ends the waiting, not the closing.

        Raises:
            TimedOut: ``timeout_s`` passed.
            InvalidArgument: ``mode`` is none.
            SchedulerUnavailable: No scheduler answers.
        """
        wanted = CloseSession.check("close", {"id": self.id, "mode": mode}).mode
        if not self._record.settled:
            self._note(await self._connection.request_close(self.id, wanted))
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled(on_progress)
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

    async def _submit(
        self, input: bytes | str, informer: TaskInformer | None, options: TaskOptions | None, key: str | None = None
    ) -> TaskHandle:
        if self._record.state is not SessionState.OPEN:
            raise self._ended_error()
        if self._connection.runner._thread_id != get_ident():  # noqa: SLF001  # see flame.client.home
            self._connection.check_usable()
        data = input if type(input) is bytes else _as_bytes(input)
        if key is None:
            handle = await self._tasks.submit(data, informer, options)
        else:
            handle = await self._tasks.submit_keyed(data, informer, options, key)
        if self._reconciler.timer is None:
            self._reconciler.expect()
        return handle

    async def submit(self, input: bytes, options: TaskOptions | None) -> TaskHandle:
        """Send a task to be stored, and return before it is known whether it was: for what is built on sessions."""
        return await self._submit(input, None, options)

    def leave_large_outputs(self) -> None:
        """Load no outputs that are too large for a message: `get_task` brings them. For what is built on sessions."""
        self._tasks.leave_large = True

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
            event = ClusterEvent.decode(message.data)
            if event.record:
                self._note(SessionRecord.decode(event.record))
            for watch in tuple(self._watches):
                watch.on_cluster(event)
        except MalformedMessage as error:
            log.warning("unreadable event", subject=message.subject, error=str(error))

    def _note(self, record: SessionRecord) -> None:
        """Take a state of the session over; states only ever go forward."""
        self._tasks.note_common_data(record.common_data_version)
        if self._record.settled or (self._record.state is not SessionState.OPEN and record.state is SessionState.OPEN):
            return
        self._record = record
        for watch in tuple(self._watches):
            watch.on_session(record)
        if record.settled:
            self._reconciler.look()
            if not self._ended.done():
                self._ended.set_result(None)

    def _quiet(self) -> None:
        self._reconciler.quiet()

    def reconcile_now(self) -> None:
        """Ask for everything outstanding: events may have been missed while the connection was gone."""
        self._reconciler.missed_events()

    async def _look_up(self) -> None:
        self._note(await self._connection.get_session_record(self.id))

    # ---- ending

    def _ended_error(self) -> SessionNotOpen:
        if self._record.state is SessionState.FAILED:
            return SessionFailed(f"session {self.id} failed: {self._record.reason}")
        return SessionNotOpen(
            f"session {self.id} is {self._record.state.value}: it takes no more tasks; create another"
        )

    async def _settled(self, on_progress: Callable[[SessionInfo], None] | None) -> None:
        while not self._ended.done():
            if on_progress is None:
                # The event is live and may be missed; asking is what makes this certain.
                await asyncio.wait([self._ended], timeout=PROGRESS_S)
                if self._ended.done():
                    break
            if not await self._look(on_progress):
                return
            if on_progress is not None:
                await asyncio.wait([self._ended], timeout=PROGRESS_S)
        await self._tasks.ended()
        if on_progress is not None:
            await self._look(on_progress)

    async def _look(self, on_progress: Callable[[SessionInfo], None] | None) -> bool:
        """Look the session up, and tell of it; return whether it is still known."""
        try:
            info = await self._connection.get_session(self.id)
        except SessionNotFound:
            return False
        except Unavailable as error:
            if self._connection.closed:
                raise
            log.debug("could not look the session up", session=self.id, error=str(error))
            return True
        self._note(info.session)
        if on_progress is not None:
            on_progress(info)
        return True

    async def abandon(self, error: FlameError) -> None:
        """The connection is closed: nothing more will be heard."""
        await self._release()
        await self._tasks.stop()
        self._tasks.lose_all(error)
        for watch in tuple(self._watches):
            watch.fail(error)

    async def _release(self) -> None:
        await self._reconciler.stop()
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.stop()
        self._connection.forget(self)


def _checked(options: object) -> TaskOptions | None:
    if options is None or isinstance(options, TaskOptions):
        return options
    raise InvalidArgument(f"options: expected a flame.TaskOptions, got {type(options).__name__}")


def _as_bytes(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise InvalidArgument(f"input: expected bytes or str, got {type(value).__name__}")
