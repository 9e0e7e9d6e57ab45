"""The service behind `flame.functions`: it calls what its session's clients have sent."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pickle import PROTO
from types import TracebackType
from typing import Any, Final

from flame.calls.current import running
from flame.calls.messages import Call, Definitions, InstanceGone
from flame.calls.pickling import PYTHON, cloudpickle, dump, load
from flame.calls.references import resolving
from flame.calls.sending import result_bytes
from flame.errors import InvalidInput, MalformedMessage, StaleVersion
from flame.service.contexts import FlameService, SessionContext, TaskContext
from flame.service.state import State
from flame.service.threads import Threads

INCARNATION: Final = "flame.incarnation"
"""The key in the session's state that says how often its object has been made and used."""
_DETAILS_BYTES: Final = 128 * 1024
"""An exception that is larger than this reaches the client as type, message and traceback only."""

_READS: Final = 16
"""How many arguments an executor reads at once: the broker cuts a connection to which it has too much to say."""


class FunctionService(FlameService):
    """Calls functions, or the methods of one object.

    What is not ``async`` runs in a thread, always the same, but for objects that have anything that is.
    """

    def __init__(self) -> None:
        """Know nothing before a session is entered."""
        self._definitions = Definitions()
        self._functions: dict[bytes, Any] = {}
        """Those that were loaded."""
        self._threads = Threads()
        self._reading = asyncio.Semaphore(_READS)
        self._object: Any = None
        self._in_loop = False
        """The object has coroutines, and is used in the event loop only."""
        self._failure: tuple[Exception, TracebackType | None] | None = None
        """What the object's constructor raised."""
        self._incarnation = 0

    async def on_session_enter(self, context: SessionContext) -> None:
        """Take the session's definitions, and make its object if it is one's."""
        cloudpickle()
        await self.on_common_data_update(context)
        new = self._definitions.instance
        if new is None:
            return
        try:
            await self._make(new)
        except Exception as error:  # noqa: BLE001  # what the object can't be made for is what its calls raise
            self._failure = error, error.__traceback__

    async def on_common_data_update(self, context: SessionContext) -> None:
        """Take the session's definitions."""
        self._definitions = Definitions.decode(context.common_data)

    async def on_session_leave(self) -> None:
        """Let the threads end."""
        self._threads.close()

    async def on_task_invoke(self, context: TaskContext) -> bytes:
        """Call what the task says."""
        call = _read(context.input)
        values = await self._values(context, call.references) if call.references else ()
        token = running.set(context)
        try:
            target = self._function(call) if call.function else await self._method(call, context)
            args, kwargs = _arguments(call, values)
            with _Telling():
                if self._in_loop or inspect.iscoroutinefunction(target):
                    value = target(*args, **kwargs)
                else:
                    # Its thread is waited for: the executor runs nothing beside it.
                    work = partial(target, *args, **kwargs)
                    value = await self._threads.to_end(lambda: context.cancelled, work)
                if inspect.isawaitable(value):
                    value = await value
        finally:
            running.reset(token)
        return result_bytes(call.name, value)

    async def _values(self, context: TaskContext, references: Sequence[str | bytes]) -> list[Any]:
        """Return the values that stand for themselves among a call's arguments."""
        outputs = await asyncio.gather(*(self._output(context, each) for each in references))
        return [_load("an argument", output) for output in outputs]

    async def _output(self, context: TaskContext, reference: str | bytes) -> bytes:
        if isinstance(reference, bytes):
            return reference
        async with self._reading:
            return await context.output_of(reference)

    def _function(self, call: Call) -> Any:
        function = self._functions.get(call.function)
        if function is None:
            pickled = self._definitions.functions.get(call.function)
            if pickled is None:
                raise InvalidInput(f"{call.name} is no function of this session: its common data was changed")
            function = self._functions[call.function] = _load(f"function {call.name}", pickled)
        return function

    # ---- objects

    async def _make(self, new: Call) -> None:
        _check_python(new)
        cls = _load(f"class {new.name}", new.function)
        args, kwargs = _arguments(
            new, [_load("an argument", value) for value in new.references if isinstance(value, bytes)]
        )
        with _Telling():
            self._in_loop = any(inspect.iscoroutinefunction(member) for _, member in inspect.getmembers(cls))
            if self._in_loop:
                self._object = cls(*args, **kwargs)
            else:
                self._object = await self._threads.begin(partial(cls, *args, **kwargs))

    async def _method(self, call: Call, context: TaskContext) -> Callable[..., Any]:
        if self._definitions.instance is None:
            raise InvalidInput(f"{call.name}: this session has functions, and no object")
        await self._check_incarnation(call, context.state)
        if self._failure is not None:
            error, traceback = self._failure
            raise error.with_traceback(traceback)
        method: Callable[..., Any] = getattr(self._object, call.name.rpartition(".")[2])
        return method

    async def _check_incarnation(self, call: Call, state: State) -> None:
        """Refuse what was asked of an object that was lost. One counts from its first call on."""
        while not self._incarnation:
            entry = await state.entry(INCARNATION)
            number = (entry.value or 0) + 1
            with contextlib.suppress(StaleVersion):  # a stray executor of the session was quicker
                await state.put(INCARNATION, number, expected=entry.revision)
                self._incarnation = number
        if call.incarnation < self._incarnation:
            with _Telling():
                raise InstanceGone(
                    f"the object was lost with its executor, before {call.name} had run to its end; a new one was made"
                    " by its constructor, and calls that are made from now on go to that",
                    self._incarnation,
                )


def _read(data: bytes) -> Call:
    try:
        call = Call.decode(data)
    except MalformedMessage as error:
        raise InvalidInput(f"the input is no call of a function: {error}; use flame.functions()") from None
    _check_python(call)
    return call


def _check_python(call: Call) -> None:
    if call.python != PYTHON:
        raise InvalidInput(
            f"{call.name} was sent by Python {call.python}, and this executor runs Python {PYTHON}: functions need the"
            " same version on both sides"
        )


def _load(what: str, data: bytes) -> Any:
    try:
        return load(data)
    except Exception as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            hint = (
                "; install it where executors run, or have it travel: cloudpickle.register_pickle_by_value"
                f"({str(error.name).partition('.')[0]})"
            )
        raise InvalidInput(f"{what} can't be loaded by its executor: {type(error).__name__}: {error}{hint}") from error


def _arguments(call: Call, values: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    with resolving(values):
        args, kwargs = _load(f"the arguments of {call.name}", call.arguments)
    return args, kwargs


class _Telling:
    """Has what user code raises reach the client as it is, besides its type, message and traceback."""

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Attach it."""
        if isinstance(error, SystemExit):
            raise RuntimeError(f"sys.exit({error.code!r}) was called, which would end the executor") from error
        if isinstance(error, Exception):
            with contextlib.suppress(Exception):  # it may be of any kind
                former = getattr(error, "details", None)
                if type(former) is bytes and former.startswith(PROTO):  # it was raised, and told, before
                    del error.details  # type: ignore[attr-defined]  # as below
                details = dump(error)
                if len(details) <= _DETAILS_BYTES:
                    error.details = details  # type: ignore[attr-defined]  # where `flame.TaskFault.details` comes from
