"""One call of a function: what is awaited for its value, and what stands for that among the arguments of others."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from flame.calls.messages import Call, InstanceGone
from flame.calls.pickling import load
from flame.calls.references import refer
from flame.client.task import Task, TaskHandle
from flame.errors import FlameError, InstanceLost, SchemaMismatch, TaskCancelled, TaskFailed
from flame.logs import get_logger
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import TaskFault, TaskOptions
from flame.protocol.states import TaskState

if TYPE_CHECKING:
    from flame.calls.caller import Caller

R_co = TypeVar("R_co", covariant=True)

log = get_logger("flame.functions")

_UNREAD: Final[Any] = object()
_SMALL_BYTES: Final = 1024


class FunctionCall(Generic[R_co]):
    """A call of a function or method in the cluster: ``value = await call``.

    Made by calling a `RemoteFunction`, or a method of an `Instance`. It goes on whether or not anybody awaits it. As an
    argument of another call, or anywhere inside of one, it stands for its value: that call is made when this one has
    succeeded, and gets its error if it fails. May be awaited any number of times; the value is the same object.
    """

    __slots__ = ("_because", "_caller", "_ended", "_failure", "_handle", "_submitted", "_value", "dependencies",
                 "message", "options", "unmet")  # fmt: skip

    def __init__(
        self,
        caller: Caller,
        message: Call,
        dependencies: list[FunctionCall[Any]],
        options: TaskOptions | None,
    ) -> None:
        """Made by a function of a session."""
        self._caller = caller
        self.message = message
        """What its task's input will be."""
        self.dependencies = dependencies
        """The calls whose values are among its arguments, until it is submitted."""
        self.unmet = len(dependencies)
        """How many of those have not succeeded yet."""
        self.options = options
        self._handle: TaskHandle | None = None
        self._failure: FlameError | None = None
        self._because: FunctionCall[Any] | None = None
        self._submitted: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._value: Any = _UNREAD

    @property
    def task_id(self) -> str:
        """The id of its task in the session; empty as long as it waits for its arguments, or to be submitted."""
        return "" if self._handle is None else self._handle.id

    @property
    def session_id(self) -> str:
        """The id of its session."""
        return self._caller.session.id

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop in which its end is heard of."""
        return self._caller.loop

    def done(self) -> bool:
        """Whether it has ended, or nothing more can be learned of it."""
        if self._handle is not None:
            return self._handle.done()
        return self._failure is not None or self._because is not None

    def __await__(self) -> Generator[Any, None, R_co]:
        """Wait for the value; cancelling the wait leaves the call alone.

        Raises:
            TaskFailed: It raised, with the exception's type, message and traceback; the exception itself is its
                ``__cause__`` where that can be had here. `TaskTimeout` if it ran for too long.
            TaskCancelled: It was cancelled.
            InstanceLost: The object whose method it is was lost.
            SchemaMismatch: It returned something that can't be loaded here.
            FlameError: What `Session.invoke` raises where a task can't be stored.
        """
        return self._wait().__await__()

    async def cancel(self, reason: str = "") -> TaskState:
        """Give it up, whether it waits or runs, and return the state that it then has for good.

        Calls that have it as an argument fail with its `TaskCancelled`. Otherwise as `TaskHandle.cancel`.
        """
        if self._handle is None and not self.done():
            self._caller.give_up(self, TaskCancelled(f"{self} was cancelled: {reason}", self._never_run(reason)))
            if self.done():
                return TaskState.CANCELLED
            await self._until_submitted()
        if self._because is not None:
            return await self._because.cancel(reason)
        if self._handle is None:
            return TaskState.CANCELLED if isinstance(self._failure, TaskCancelled) else TaskState.FAILED
        await self._caller.stored(self._handle)
        return await self._handle.cancel(reason)

    def __repr__(self) -> str:
        """Name the function and the task."""
        where = self.task_id or "not submitted"
        return f"<FunctionCall {self.message.name} {where}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Stand for the value among the arguments of another call."""
        return refer(self)

    # ---- for the session

    async def _wait(self) -> R_co:
        if self._value is _UNREAD:
            await self._until_submitted()
            if self._handle is None:
                await self._unsent()
            else:
                self.read(await self.whole())
        value: R_co = self._value
        return value

    async def _unsent(self) -> None:
        if self._because is not None:
            try:
                await self._because
            except FlameError as error:
                error.add_note(f"{self.message.name} was not called: that was to be one of its arguments")
                raise
        assert self._failure is not None
        raise self._failure

    def read(self, task: Task) -> Any:
        """Return the value of its finished task; raises as awaiting it does."""
        if self._value is _UNREAD:
            value = value_of(self.message.name, task)
            if self._value is _UNREAD:  # another thread may have been quicker: all are to have the same object
                self._value = value
        return self._value

    async def met(self) -> None:
        """Return when it has succeeded; raises as awaiting it does."""
        await asyncio.shield(self.ended())
        if self.failed_with is not None:
            await self

    @property
    def is_large(self) -> bool:
        """Whether its value has to be fetched, which takes awaiting it; once it has ended."""
        succeeded = self._value is _UNREAD and self.failed_with is None
        return succeeded and self._handle is not None and lacks_output(self._handle.future.result())

    def value(self) -> R_co:
        """Return the value, or raise why there is none; once it has ended, in any thread, unless it is large."""
        failed = self.failed_with
        if failed is not None and failed is not self:
            failed.value()
        if self._failure is not None:
            raise self._failure
        assert self._handle is not None
        value: R_co = self.read(self._handle.future.result())
        return value

    @property
    def small_output(self) -> bytes:
        """The bytes of its value if they are few; once it has succeeded."""
        assert self._handle is not None
        output = self._handle.future.result().output
        return output if len(output) <= _SMALL_BYTES else b""

    async def output(self) -> bytes:
        """Return the bytes of its value, for another session. It must have succeeded."""
        return (await self.whole()).check().output

    async def whole(self) -> Task:
        """Return its finished task with its output, however large. It must have been submitted."""
        assert self._handle is not None
        return await self._caller.with_output(await self._handle.finished())

    async def _until_submitted(self) -> None:
        if self._handle is None and self._failure is None and self._because is None:
            if self._submitted is None:
                self._submitted = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._submitted)

    def ended(self) -> asyncio.Future[None]:
        """Return what is done when it has ended, however it did."""
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_future()
            if self._handle is not None:
                self._handle.future.add_done_callback(self._note_end)
            elif self.done():
                self._ended.set_result(None)
        return self._ended

    @property
    def failed_with(self) -> FunctionCall[Any] | None:
        """The call whose error this one has, once it has ended; ``None`` if it succeeded."""
        if self._because is not None:
            return self._because
        if self._failure is not None:
            return self
        assert self._handle is not None
        future = self._handle.future
        return self if future.exception() is not None or future.result().state is not TaskState.SUCCEED else None

    def submitted(self, handle: TaskHandle) -> None:
        """Note that its task is on its way."""
        self._handle = handle
        self.message.arguments = b""
        self.dependencies = []
        if self._ended is not None:
            handle.future.add_done_callback(self._note_end)
        self._settle_submitted()

    def fail(self, error: FlameError) -> None:
        """Note that it will not be made."""
        self._failure = error
        self._not_made()

    def fail_because_of(self, other: FunctionCall[Any]) -> None:
        """Note that it will not be made, since a call failed whose value was to be among its arguments."""
        self._because = other
        self._not_made()

    def _not_made(self) -> None:
        self.message.arguments = b""
        self.dependencies = []
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        self._settle_submitted()

    def _settle_submitted(self) -> None:
        if self._submitted is not None and not self._submitted.done():
            self._submitted.set_result(None)

    def _note_end(self, _: object) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _never_run(self, reason: str) -> Task:
        session = self._caller.session
        fault = TaskFault(ErrorCode.TASK_CANCELLED, reason)
        return Task("", session.id, session.application, TaskState.CANCELLED, error=fault)


def lacks_output(task: Task) -> bool:
    """Whether a finished task has a large output, which was not fetched."""
    return bool(task.output_size) and not task.output and task.error is None


def value_of(name: str, task: Task) -> Any:
    """Return the value of a call's finished task; raises as awaiting the call does."""
    try:
        task.check()
    except TaskFailed as error:
        cause = cause_of(task)
        if isinstance(cause, InstanceGone):
            raise InstanceLost(str(error), task) from None
        raise error from cause
    try:
        return load(task.output)
    except Exception as error:
        text = f"{name} returned a value that can't be loaded here: {type(error).__name__}: {error}"
        raise SchemaMismatch(text, task) from error


def cause_of(task: Task) -> BaseException | None:
    """Return what a failed task raised, if that can be had here."""
    details = b"" if task.error is None else task.error.details
    if not details:
        return None
    try:
        cause = load(details)
    except Exception as error:  # noqa: BLE001  # its class may not be here; type, message and traceback are text
        log.debug("what a function raised can't be loaded here", task=task.id, error=str(error))
        return None
    return cause if isinstance(cause, BaseException) else None
