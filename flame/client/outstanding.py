"""The tasks of one session that this client created and waits for: storing them, and learning of their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Final

from flame.broker.errors import Duplicate, NotAcknowledged, StreamFull, StreamMissing
from flame.broker.seam import LiveMessage
from flame.cancel import end_tasks
from flame.client.listing import finished_task
from flame.client.task import Task, TaskHandle, TaskInformer
from flame.errors import (
    ApplicationNotFound,
    BrokerUnavailable,
    FlameError,
    MalformedMessage,
    PayloadTooLarge,
    QueueFull,
    SchedulerUnavailable,
    Unavailable,
)
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.api import LOOK_UP_LIMIT, LookUpTasks, TaskLooks, Verb
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord, RunningEvent, TaskFault, TaskMessage, TaskOptions
from flame.protocol.records import SessionRecord
from flame.protocol.states import TaskState

if TYPE_CHECKING:
    from flame.client.connection import Connection

log = get_logger("flame.client")

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
        self._cancel = partial(connection.cancel_tasks, record.id)
        self._retries: set[asyncio.Task[None]] = set()
        self.on_task: Callable[[Task], None] | None = None
        """Called with every state that is learned of a task of the session, whoever created it, if anybody watches."""
        self._page = 0
        """Which part of many old ones is looked up next."""

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._handles)

    def get(self, task_id: str) -> TaskHandle | None:
        """Return one of them."""
        return self._handles.get(task_id)

    # ---- storing

    async def submit(self, data: bytes, informer: TaskInformer | None, options: TaskOptions | None) -> TaskHandle:
        """Send a task to be stored and return at once, or when there is room among the unacknowledged ones.

        What comes of it reaches the handle. Raises `PayloadTooLarge`.
        """
        payload = TaskMessage(data, informer is not None, options=options).encode()
        if len(payload) > defaults.INLINE_LIMIT_BYTES:
            raise PayloadTooLarge(
                f"input of {len(data)} bytes: with its envelope {len(payload)}, the limit is"
                f" {defaults.INLINE_LIMIT_BYTES}; pass a reference to large data instead"
            )
        while self._unacknowledged >= defaults.PUBLISH_WINDOW:
            await self._room()
        task_id = self._connection.task_ids.mint()
        handle = TaskHandle(task_id, self._record, payload, self._loop, informer, self._cancel)
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
        payload = TaskMessage.decode(handle.payload)
        payload.again = True
        data = payload.encode()
        pause_s = defaults.BACKOFF_FIRST_S
        last: FlameError | None = None
        while self._loop.time() < deadline and not handle.stored and not handle.done():
            try:
                looks = await self._look_up_if_possible(handle.id)
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

    async def _look_up_if_possible(self, task_id: str) -> TaskLooks:
        """Look a task up; with no scheduler to ask, know nothing: its executor will look before it runs it."""
        try:
            return await self.look_up([task_id])
        except SchedulerUnavailable:
            return TaskLooks()

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
