"""Making the calls of one session: in their order, and each when its arguments are there."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from flame.calls.call import FunctionCall, cause_of, lacks_output
from flame.calls.messages import InstanceGone
from flame.client.home import check_loop
from flame.client.task import Task, TaskHandle
from flame.errors import FlameError, InternalError, WrongThread
from flame.protocol.codes import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flame.calls.definitions import SentFunctions
    from flame.client.session import Session


class Caller:
    """Submits calls to a session, in the background."""

    def __init__(self, session: Session, functions: SentFunctions | None) -> None:
        """Make calls of ``functions``, or of the methods of an object."""
        self.session = session
        self.incarnation = 0 if functions is not None else 1
        """How often the object has been made, as far as is known here; 0: there is none."""
        self._functions = functions
        self.loop = asyncio.get_running_loop()
        """Where they are made."""
        self._queue: deque[FunctionCall[Any]] = deque()
        self._waiting: set[FunctionCall[Any]] = set()
        """Calls whose arguments are not all there."""
        self._worker: asyncio.Task[None] | None = None
        self._idle: asyncio.Future[None] | None = None
        """What is done when no call is left that was not submitted."""
        session.leave_large_outputs()  # most of them only executors need
        self._storing: dict[TaskHandle, asyncio.Future[None]] = {}

    def check_loop(self) -> None:
        """Raise `WrongThread` anywhere but in the event loop of the session."""
        check_loop(f"session {self.session.id}", self.loop)

    def check_arguments(self, calls: Iterable[FunctionCall[Any]]) -> None:
        """Raise `WrongThread` if the end of one of the calls can't be waited for here; in any thread."""
        for call in calls:
            if call.loop is not self.loop:
                raise WrongThread(
                    f"{call} is a call of another event loop, whose end is not heard of here: await it there, and pass"
                    " its value"
                )

    def begin(self, call: FunctionCall[Any]) -> None:
        """Make a call, now or when its arguments are there. Must be called in the session's event loop."""
        if self.incarnation:
            call.message.incarnation = self.incarnation
        if not call.unmet:
            self._put(call)
            return
        self._waiting.add(call)
        try:
            for dependency in tuple(call.dependencies):
                dependency.ended().add_done_callback(partial(self._met, call, dependency))
        except BaseException:
            self._waiting.discard(call)
            self._settle_idle()
            raise

    def give_up(self, call: FunctionCall[Any], error: FlameError) -> None:
        """Don't make a call, unless it is being submitted."""
        if call in self._waiting:
            self._waiting.discard(call)
            call.fail(error)
            self._settle_idle()
        elif call in self._queue:
            self._queue.remove(call)
            call.fail(error)

    def give_up_all(self, error: FlameError) -> None:
        """Make none of those that were not submitted."""
        for call in (*self._waiting, *self._queue):
            self.give_up(call, error)

    async def idle(self) -> None:
        """Return when every call was submitted, or will not be."""
        while self.busy:
            if self._idle is None:
                self._idle = self.loop.create_future()
            await asyncio.shield(self._idle)

    @property
    def busy(self) -> bool:
        """Whether there are calls that were not submitted yet."""
        return bool(self._waiting) or self._worker is not None

    async def stored(self, handle: TaskHandle) -> None:
        """Return when a task is stored; raise if it can't be."""
        if handle.stored:
            return
        storing = self._storing.get(handle)
        if storing is None:
            started = handle.when_stored()
            if started is None:
                return
            storing = self._storing[handle] = started
            storing.add_done_callback(lambda _: self._storing.pop(handle, None))
        await asyncio.shield(storing)

    async def with_output(self, task: Task) -> Task:
        """Return a finished task with its output, however large."""
        return await self.session.get_task(task.id) if lacks_output(task) else task

    # ---- how

    def _met(self, call: FunctionCall[Any], dependency: FunctionCall[Any], _: object) -> None:
        if call not in self._waiting:
            return
        failed = dependency.failed_with
        if failed is not None:
            self._waiting.discard(call)
            call.fail_because_of(failed)
            self._settle_idle()
            return
        call.unmet -= 1
        if not call.unmet:
            self._waiting.discard(call)
            self._put(call)

    def _put(self, call: FunctionCall[Any]) -> None:
        self._queue.append(call)
        if self._worker is None:
            self._worker = self.loop.create_task(self._work(), name=f"calls of {self.session.id}")

    async def _work(self) -> None:
        try:
            while self._queue:
                call = self._queue.popleft()
                try:
                    await self._submit(call)
                except FlameError as error:
                    call.fail(error)
                except Exception as error:  # noqa: BLE001  # whoever waits must hear of it
                    call.fail(InternalError(f"{call} could not be made: {type(error).__name__}: {error}"))
        finally:
            self._worker = None
            self._settle_idle()

    def _settle_idle(self) -> None:
        if self._idle is not None and not self.busy:
            self._idle.set_result(None)
            self._idle = None

    async def _submit(self, call: FunctionCall[Any]) -> None:
        handle = await self.session.submit(await self.input_of(call), call.options)
        call.submitted(handle)
        if self.incarnation:
            handle.future.add_done_callback(self._note_incarnation)
            with contextlib.suppress(FlameError):  # the call has that
                await self.stored(handle)  # one that had to be stored again would come after those behind it

    def input_now(self, call: FunctionCall[Any]) -> bytes | None:
        """Return the input of a call's task if it needs nothing that is not there; in any thread."""
        if call.dependencies or (self._functions is not None and call.message.function not in self._functions.sent):
            return None
        return call.message.encode()

    async def input_of(self, call: FunctionCall[Any]) -> bytes:
        """Return the input of a call's task, once what it needs is there. What it depends on must have succeeded."""
        message = call.message
        if self._functions is not None and message.function not in self._functions.sent:
            await self._functions.send(message.function)
        if call.dependencies:
            message.references = [await self._reference(dependency) for dependency in call.dependencies]
        return message.encode()

    async def _reference(self, call: FunctionCall[Any]) -> str | bytes:
        """Return what executors find a value by, or the value itself.

        That is so if it is small: it came here with the news of the call's end, and to send it on costs less than to
        read it. And executors see no value of another session.
        """
        return call.small_output or (call.task_id if call.session_id == self.session.id else await call.output())

    def _note_incarnation(self, future: asyncio.Future[Task]) -> None:
        if future.exception() is None and (fault := future.result().error) is not None:
            cause = cause_of(future.result()) if fault.code == ErrorCode.INVALID_ARGUMENT else None
            if isinstance(cause, InstanceGone):
                self.incarnation = max(self.incarnation, cause.incarnation)
