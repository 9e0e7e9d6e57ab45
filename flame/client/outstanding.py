"""The tasks of one session that this client created and waits for: storing them, and learning of their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final

from flame.broker.errors import Duplicate, NotAcknowledged, StreamFull, StreamMissing
from flame.broker.seam import LiveMessage
from flame.cancel import end_tasks
from flame.client.chunks import ChunkStream
from flame.client.keyed import KeyedTaskHandle, check_key
from flame.client.listing import finished_task
from flame.client.task import Task, TaskHandle, TaskInformer
from flame.client.values import TaskValues, digest_of_much
from flame.errors import (
    ApplicationNotFound,
    BrokerUnavailable,
    FlameError,
    MalformedMessage,
    QueueFull,
    SchedulerUnavailable,
    TaskNotFound,
    Unavailable,
)
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.api import LOOK_UP_LIMIT, LookUpTasks, TaskLooks, Verb
from flame.protocol.codes import ErrorCode
from flame.protocol.ids import digest_of, keyed_task_id
from flame.protocol.messages import ResultRecord, RunningEvent, TaskFault, TaskMessage, TaskOptions
from flame.protocol.progress import Progress
from flame.protocol.records import SessionRecord
from flame.protocol.states import TaskState
from flame.protocol.values import check_size

if TYPE_CHECKING:
    from flame.client.connection import Connection

log = get_logger("flame.client")

_BYTES_HEADER: Final = 5
"""What bytes in MessagePack take at most beside themselves."""
STORE_ATTEMPT_S: Final = 5.0
"""How long one attempt at storing a task waits for the broker's acknowledgement."""


class Outstanding:
    """What a client has asked of a session and has no answer to."""

    def __init__(self, connection: Connection, record: SessionRecord, on_quiet: Callable[[], None]) -> None:
        """Begin with nothing; call ``on_quiet`` when the last answer is there."""
        self._connection = connection
        self._record = record
        self._on_quiet = on_quiet
        self._loop = asyncio.get_running_loop()
        self._task_prefix = subjects.task(record.application, record.id, "")
        self._result_prefix = subjects.result(record.application, record.id, "")
        self._handles: dict[str, TaskHandle] = {}
        self._unacknowledged = 0
        self._window: asyncio.Future[None] | None = None
        self.broker = connection.broker
        self.cancel = partial(connection.cancel_tasks, record.id)
        """Cancels tasks of the session by their ids, for a reason, and returns the states that they then have."""
        self._heard: dict[str, int] = {}
        """By the ids of tasks that were found and not created here: how many listen for their ends."""
        self._retries: set[asyncio.Task[None]] = set()
        self.on_task: Callable[[Task], None] | None = None
        """Called with every state that is learned of a task of the session, whoever created it, if anybody watches."""
        self.on_progress: Callable[[str, Progress], None] | None = None
        """Called with every progress of a task of the session, if anybody watches."""
        self.common_data_version = record.common_data_version
        """The newest of the session's common data that this client has heard of."""
        self._least = _least(record.common_data_version)
        """What tasks without options of their own have: ``None`` while the common data was never changed."""
        self.leave_large = False
        """Outputs that are too large for a message are not loaded before somebody asks for them."""
        self._page = 0
        """Which part of many old ones is looked up next."""

    @cached_property
    def values(self) -> TaskValues:
        """Inputs and outputs that are too large for a message: most sessions have none."""
        return TaskValues(self.broker, self._record)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._handles)

    def get(self, task_id: str) -> TaskHandle | None:
        """Return one of them."""
        return self._handles.get(task_id)

    # ---- storing

    async def submit(self, data: bytes, informer: TaskInformer | None, options: TaskOptions | None) -> TaskHandle:
        """Send a task to be stored and return at once, or when there is room among the unacknowledged ones.

        What comes of it reaches the handle. An input that is too large for a message is stored before; raises what
        `flame.values.store_value` does.
        """
        if self._least is not None:
            options = self._not_older(options)
        task_id = self._connection.task_ids.mint()
        large = len(data) > defaults.INLINE_LIMIT_BYTES
        payload = b"" if large else TaskMessage(data, informer is not None, options=options).encode()
        if large or len(payload) > defaults.INLINE_LIMIT_BYTES:
            message = TaskMessage(data, informer is not None, options=options)
            payload = await self.values.store_input(task_id, message)
        while self._unacknowledged >= defaults.PUBLISH_WINDOW:
            await self._room()
        handle = TaskHandle(task_id, self._record, payload, self._loop, informer, self)
        self._handles[task_id] = handle
        self._unacknowledged += 1
        try:
            await self._connection.broker.store_then(
                self._task_prefix + task_id, payload, STORE_ATTEMPT_S, partial(self._on_stored, handle)
            )
        except FlameError as error:
            self._on_stored(handle, 0, error)
        except BaseException:
            self._unacknowledged -= 1
            self._handles.pop(task_id, None)
            raise
        return handle

    async def submit_keyed(
        self, data: bytes, informer: TaskInformer | None, options: TaskOptions | None, key: str
    ) -> TaskHandle:
        """Have the task that a key names stored, or find it, and return when it is certain that there is one.

        Raises `KeyReused` if that has another input, and what is raised where a task can't be stored.
        """
        task_id = keyed_task_id(check_key(key))
        check_size("input", len(data))
        digest = digest_of(data) if len(data) <= defaults.INLINE_LIMIT_BYTES else await digest_of_much(data)
        handle = self._handles.get(task_id)
        if not isinstance(handle, KeyedTaskHandle):
            message = TaskMessage(b"", informer is not None, True, self._not_older(options), digest)
            large = len(data) + len(message.encode()) > defaults.INLINE_LIMIT_BYTES - _BYTES_HEADER
            if not large:
                message.input = data
            handle = KeyedTaskHandle(task_id, self._record, message.encode(), self._loop, informer, self)
            handle.name(key, digest, data if large else b"")
            self._handles[task_id] = handle
            self._unacknowledged += 1
            handle.storing = self._loop.create_task(self._store_again(handle))
            self._retries.add(handle.storing)
            handle.storing.add_done_callback(self._retries.discard)
        handle.check(digest)
        assert handle.storing is not None
        await asyncio.shield(handle.storing)
        handle.check_stored()
        return handle

    def note_common_data(self, version: int) -> None:
        """Have no task that is created from now on run with older common data than this."""
        if version > self.common_data_version:
            self.common_data_version = version
            self._least = _least(version)

    def _not_older(self, options: TaskOptions | None) -> TaskOptions | None:
        """Add to a task's options that it isn't to run with older common data than this client has heard of."""
        if options is None or not self.common_data_version:
            return options or self._least
        version = max(self.common_data_version, options.common_data_version or 0)
        return replace(options, common_data_version=version)

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
        if self.on_task is not None:
            self.on_task(handle.task)

    def _not_stored(self, handle: TaskHandle, error: BaseException) -> None:
        self._acknowledged()
        self._handles.pop(handle.id, None)
        if isinstance(error, StreamFull):
            error = QueueFull(
                f"application {self._record.application} holds as many waiting tasks as it may;"
                " the task was not stored: try again later"
            )
        elif isinstance(error, StreamMissing):
            error = ApplicationNotFound(f"application {self._record.application} is not registered any more")
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
        message = TaskMessage.decode(handle.payload)
        message.again = True
        pause_s = defaults.BACKOFF_FIRST_S
        last: FlameError | None = None
        while self._loop.time() < deadline and not handle.stored and not handle.done():
            try:
                looks = await (self._look_up_keyed if handle.digest else self._look_up_if_possible)(handle.id)
                if not (looks.waiting or looks.results):
                    began = self._loop.time()
                    data = await self._encoded(handle, message)
                    deadline += self._loop.time() - began
                    await self._connection.broker.store(subject, data, STORE_ATTEMPT_S)
            except Duplicate:
                if handle.digest:
                    continue  # somebody was quicker, with this input or another
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
                    self.finish(handle.id, record)
            self._stored(handle)
            return
        if handle.stored or handle.done():
            self._stored(handle)
            return
        self._not_stored(
            handle,
            NotAcknowledged(
                f"task {handle.id} of session {self._record.id}: not acknowledged within {defaults.STORE_TIMEOUT_S:g} s"
                f" ({last}); it may have been stored"
            ),
        )

    async def _encoded(self, handle: TaskHandle, message: TaskMessage) -> bytes:
        """Return a task as it is to be stored, with its input stored before if that is large and has not been."""
        if isinstance(handle, KeyedTaskHandle) and handle.large and message.input_ref is None:
            message.input = handle.large
            return await self.values.store_input(handle.id, message)
        return message.encode()

    async def _look_up_if_possible(self, task_id: str) -> TaskLooks:
        """Look a task up; with no scheduler to ask, know nothing: its executor will look before it runs it."""
        try:
            return await self.look_up([task_id])
        except SchedulerUnavailable:
            return TaskLooks()

    async def _look_up_keyed(self, task_id: str) -> TaskLooks:
        """Look up the task that a key names; raise `KeyReused` if one waits that has another input."""
        looks = await self.look_up([task_id])
        handle = self._handles.get(task_id)
        if isinstance(handle, KeyedTaskHandle):
            handle.check(looks.digests.get(task_id, b""))
        return looks

    # ---- their ends

    def on_event(self, message: LiveMessage) -> None:
        """Take an event of a task over."""
        _, task_id, kind = message.subject.rsplit(".", 2)
        if kind == "done":
            # Anybody might publish here; the broker alone says under which subject a record is stored.
            if message.stored_as == self._result_prefix + task_id:
                self.finish(task_id, message.data)
        elif kind == "running":
            handle = self._handles.get(task_id)
            if handle is not None or self.on_task is not None:
                try:
                    self._run(task_id, handle, RunningEvent.decode(message.data))
                except MalformedMessage as error:
                    log.warning("unreadable event", subject=message.subject, error=str(error))

        elif kind == "progress":
            self._progress(task_id, message)

    def _progress(self, task_id: str, message: LiveMessage) -> None:
        handle = self._handles.get(task_id)
        if handle is None and self.on_progress is None:
            return
        try:
            progress = Progress.decode(message.data)
        except MalformedMessage as error:
            log.warning("unreadable event", subject=message.subject, error=str(error))
            return
        if handle is not None:
            handle.note_progress(progress)
        if self.on_progress is not None:
            self.on_progress(task_id, progress)

    def _run(self, task_id: str, handle: TaskHandle | None, event: RunningEvent) -> None:
        task = self._task_of_others(task_id) if handle is None else handle.task
        task = task.started_by(event)
        if handle is not None:
            handle.learn(task)
        if self.on_task is not None:
            self.on_task(task)

    def _task_of_others(self, task_id: str) -> Task:
        return Task(task_id, self._record.id, self._record.application, TaskState.PENDING)

    def finish(self, task_id: str, data: bytes) -> None:
        """Take a task's terminal record over."""
        handle = self._handles.get(task_id)
        if handle is None and self.on_task is None:
            return
        try:
            record = ResultRecord.decode(data)
        except MalformedMessage as error:
            # It is the task's one record all the same: nothing else will come.
            fault = TaskFault(ErrorCode.INTERNAL, f"the task's record can't be read: {error}")
            record = ResultRecord(TaskState.FAILED, error=fault)
        if record.output_ref is not None and handle is not None and _may_be(handle, record):
            if self.leave_large:
                self._loaded(task_id, finished_task(task_id, self._record.id, self._record.application, record))
                return
            loading = self.values.begin_to_load(task_id, record, self._loaded)
            if loading is not None:
                self._retries.add(loading)
                loading.add_done_callback(self._retries.discard)
            return
        if handle is None:
            if self.on_task is not None:
                self.on_task(finished_task(task_id, self._record.id, self._record.application, record))
            return
        del self._handles[task_id]
        handle.finish(record)
        if self.on_task is not None:
            self.on_task(handle.task)
        if not self._handles:
            self._on_quiet()

    def _loaded(self, task_id: str, task: Task) -> None:
        """Take over a task whose output had to be loaded."""
        handle = self._handles.pop(task_id, None)
        if handle is not None:
            handle.learn(task)
        if self.on_task is not None:
            self.on_task(task)
        if not self._handles:
            self._on_quiet()

    async def look_up(self, tasks: Iterable[str]) -> TaskLooks:
        """Ask what became of some tasks of the session, whoever created them."""
        request = LookUpTasks(application=self._record.application, session=self._record.id, tasks=tuple(tasks))
        return await self._connection.call(Verb.LOOK_UP_TASKS, request, TaskLooks)

    async def reconcile(self, *, everything: bool) -> bool:
        """Look up what has been outstanding for a while, or all of it; tell whether to look again soon.

        That is where something had been missed, and where there is more: of more than fit into one request, each call
        looks at another part, so that waiting ones hide no finished ones.
        """
        oldest = self._loop.time() - defaults.RECONCILE_FIRST_S
        due = [h.id for h in self._handles.values() if h.stored and (everything or h.created <= oldest)]
        pages = [due[begin : begin + LOOK_UP_LIMIT] for begin in range(0, len(due), LOOK_UP_LIMIT)]
        found = False
        if not everything and pages:
            self._page = (self._page + 1) % len(pages)
            pages = [pages[self._page]]
            found = self._page != 0
        for page in pages:
            looks = await self.look_up(page)
            for task_id, record in looks.results.items():
                found = True
                self.finish(task_id, record)
            for task_id in set(page) - set(looks.waiting) - set(looks.results) - set(looks.unread):
                found = True
                self._expire(task_id)
        return found

    def _expire(self, task_id: str) -> None:
        handle = self._handles.pop(task_id, None)
        if handle is not None:
            fault = TaskFault(ErrorCode.TASK_EXPIRED, "neither the task nor its result is kept any more")
            handle.finish(ResultRecord(TaskState.FAILED, error=fault))
            if self.on_task is not None:
                self.on_task(handle.task)

    # ---- listening to what they emit

    def stream(self, handle: TaskHandle) -> ChunkStream:
        """Return what the task of a handle emits."""

        async def find() -> TaskHandle:
            return handle

        return ChunkStream(self, find)

    async def find(self, task_id: str) -> TaskHandle:
        """Listen for the end of a task of the session, whoever created it, until `release`. Raises `TaskNotFound`."""
        handle = self._handles.get(task_id)
        if handle is not None and task_id not in self._heard:
            return handle
        if handle is None:
            handle = TaskHandle(task_id, self._record, b"", self._loop, None, self)
            handle.stored = True
            self._handles[task_id] = handle
        self._heard[task_id] = self._heard.get(task_id, 0) + 1
        try:
            looks = await self.look_up([task_id])
            if not (handle.done() or looks.waiting or looks.results or looks.unread):
                raise TaskNotFound(f"session {self._record.id} has no task {task_id!r}, or its result has aged out")
        except BaseException:
            self.release(task_id)
            raise
        for record in looks.results.values():
            self.finish(task_id, record)
        return handle

    def heard(self, handle: TaskHandle) -> TaskHandle:
        """Return the handle by which the end of a task is heard: another one may have taken the place of this one."""
        return handle if handle.done() else self._handles.setdefault(handle.id, handle)

    def release(self, task_id: str) -> None:
        """Listen no more for the end of a task that was found, once for each time that it was."""
        listeners = self._heard.pop(task_id, 0) - 1
        if listeners > 0:
            self._heard[task_id] = listeners
        elif listeners == 0 and self._handles.pop(task_id, None) is not None and not self._handles:
            self._on_quiet()

    # ---- leaving

    async def ended(self) -> None:
        """Wait until every task created here has ended, however it did."""
        while self._handles:
            await asyncio.wait([handle.future for handle in self._handles.values()])
            # A handle may have ended without leaving: only those that go on keep us here.
            for task_id in [task_id for task_id, handle in self._handles.items() if handle.done()]:
                del self._handles[task_id]

    def lose_all(self, error: FlameError) -> None:
        """Give all of them up: nothing more can be learned."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.lose(error)

    async def stop(self) -> None:
        """Store nothing more."""
        await end_tasks(self._retries)


def _may_be(handle: TaskHandle, record: ResultRecord) -> bool:
    """Whether a record is that of a handle's task: under its key there may be one with another input."""
    return not handle.digest or record.digest in (b"", handle.digest)


def _least(version: int) -> TaskOptions | None:
    return TaskOptions(common_data_version=version) if version else None
