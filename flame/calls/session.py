"""A session whose tasks are calls of a program's own functions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Coroutine, Generator, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypedDict, TypeVar, Unpack, overload

from flame.calls import APPLICATION
from flame.calls.call import value_of
from flame.calls.caller import Caller
from flame.calls.definitions import SentFunctions
from flame.calls.function import Decorator, RemoteFunction, check_function
from flame.calls.instance import Instance, NewInstance, close_instance
from flame.calls.pickling import cloudpickle
from flame.client.default import default_connection
from flame.client.mapping import total_of
from flame.client.typed import with_total
from flame.errors import (
    ApplicationDisabled,
    ApplicationNotFound,
    ConfigurationError,
    InvalidArgument,
    SessionNotOpen,
    TaskError,
    Unpicklable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flame.calls.call import FunctionCall
    from flame.client.connection import Connection
    from flame.client.session import Session
    from flame.client.task import Task
    from flame.credentials import GivenSecrets
    from flame.protocol.messages import TaskOptions

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class FunctionOptions(TypedDict, total=False):
    """What can be said of a session of functions: see `flame.SessionSpec`."""

    session_id: str | None
    min_instances: int | None
    max_instances: int | None
    priority: int
    resources: str | None
    labels: Mapping[str, str] | None
    weight: float | None
    idle_timeout_s: float | None
    credentials: GivenSecrets | None
    delegations: GivenSecrets | None


class FunctionSession:
    """A session whose tasks are calls of this program's functions. Made by `flame.functions`.

    As an asynchronous context manager it is opened, waits for every call, and is closed with its objects; after an
    exception it is closed at once. ``await`` opens it too; then `close` it yourself.
    """

    def __init__(self, connection: Connection | None, options: FunctionOptions) -> None:
        """Made by `flame.functions`; nothing is opened yet."""
        self._connection = connection
        self._options = options
        self._session: Session | None = None
        self._caller: Caller | None = None
        self._functions: SentFunctions | None = None
        self._instances: list[Instance[Any]] = []
        self._closed = False
        """No more calls are taken."""
        self._ended = False
        """All that was made is closed."""

    @property
    def session(self) -> Session:
        """The session underneath: its id, its tasks, its events. Raises `ConfigurationError` before it is opened."""
        return self._opened(self._session)

    # ---- its life

    async def open(self) -> Self:
        """Open the session, once.

        Raises:
            ApplicationDisabled: The cluster's operator has switched functions off.
            ApplicationNotFound: The cluster doesn't have them; the text says how to get them.
            ConfigurationError: The extra ``flame-engine[functions]`` is not installed.
            FlameError: What `flame.create_session` raises.
        """
        if self._session is not None:
            raise ConfigurationError("functions: this session was opened before; make another with flame.functions()")
        cloudpickle()
        connection = self._connection = self._connection or await default_connection()
        self._session = await _create(connection, b"", self._options)
        self._functions = SentFunctions(self._session, connection)
        self._caller = Caller(self._session, self._functions)
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        """Open the session."""
        return self.open().__await__()

    async def __aenter__(self) -> Self:
        """Open the session."""
        return self if self._session is not None and not self._closed else await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for every call, then close the session and its objects; close at once after an exception."""
        if kind is None:
            await self.close()
        else:
            await self._end(error)

    async def close(self) -> None:
        """Wait for every call that was made, then close the session and those of its objects. Idempotent."""
        if not self._ended and self._session is not None:
            await self._end(None)

    async def _end(self, error: BaseException | None) -> None:
        instances = [close_instance(instance) for instance in self._instances]
        callers = [*instances, *((self._caller,) if self._caller is not None else ())]
        self._closed = True
        if error is None:
            while any(caller.busy for caller in callers):
                for caller in callers:
                    await caller.idle()
        else:
            for caller in callers:
                caller.give_up_all(SessionNotOpen(f"session {caller.session.id} was closed before the call was made"))
        kind = None if error is None else type(error)
        async with contextlib.AsyncExitStack() as stack:  # one that can't be closed keeps no other from that
            for caller in reversed(callers):
                stack.push_async_callback(caller.session.__aexit__, kind, error, None)
        self._ended = True  # what was interrupted or could not be done can be done again

    # ---- functions

    @overload
    def function(
        self, function: Callable[P, Coroutine[Any, Any, R]], *, options: TaskOptions | None = None
    ) -> RemoteFunction[P, R]: ...
    @overload
    def function(self, function: Callable[P, R], *, options: TaskOptions | None = None) -> RemoteFunction[P, R]: ...
    @overload
    def function(self, function: None = None, *, options: TaskOptions | None = None) -> Decorator: ...
    def function(self, function: Any = None, *, options: TaskOptions | None = None) -> Any:
        """Return a function that runs in the cluster when it is called: ``@fs.function``, or ``fs.function(f)``.

        It may be ``async``; one that isn't runs in a thread of its executor, which costs a call some 0.1 ms: of very
        many very short calls it counts. See `RemoteFunction`, and `current_task` for what it can learn of its task.

        Args:
            function: What is to be called. It travels by value, together with what it uses of the module where it was
                defined; other modules are imported where it runs. ``cloudpickle.register_pickle_by_value`` has a
                further module travel.
            options: How its tasks are to be run: ``flame.TaskOptions(timeout_s=10, max_attempts=3)``.

        Raises:
            InvalidArgument: It can't be called, or yields.
        """
        if function is None:
            return lambda decorated: self.function(decorated, options=options)
        check_function(function)
        return RemoteFunction(function, self.caller, lambda: self._opened(self._functions), options)

    @overload
    def map(
        self,
        function: RemoteFunction[..., R],
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: Literal[True] = True,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
    ) -> AsyncGenerator[R, None]: ...
    @overload
    def map(
        self,
        function: RemoteFunction[..., R],
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: bool,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
    ) -> AsyncGenerator[R | TaskError, None]: ...
    async def map(
        self,
        function: RemoteFunction[..., R],
        inputs: Iterable[Any] | AsyncIterable[Any],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: bool = True,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
    ) -> AsyncGenerator[R | TaskError, None]:
        """Call a function with each input as its one argument and yield the values, as `Session.map` yields tasks.

        With ``raise_failed=False`` the error of a call that failed is yielded in the place of its value. An input may
        be a call, or contain some: those are waited for before anything behind it is taken.
        """
        caller = self.caller()
        caller.check_loop()
        self.check(function)
        if on_progress is not None:
            on_progress = with_total(on_progress, total_of(inputs))
        tasks = self.session.map(
            self._inputs(function, inputs),
            ordered=ordered,
            in_flight=in_flight,
            raise_failed=False,
            cancel_on_exit=cancel_on_exit,
            on_progress=on_progress,
            options=function.options if options is None else options,
        )
        async with aclosing(tasks):
            async for task in tasks:
                yield outcome(function.name, await caller.with_output(task), raise_failed=raise_failed)

    def check(self, function: object) -> None:
        """Raise `InvalidArgument` for what is no function of this session."""
        if not isinstance(function, RemoteFunction):
            kind = type(function).__name__
            raise InvalidArgument(f"function: expected one that `function` of this session returned, got {kind}")
        function.check_of(self.caller())

    async def _inputs(
        self, function: RemoteFunction[..., Any], inputs: Iterable[Any] | AsyncIterable[Any]
    ) -> AsyncIterator[bytes]:
        if isinstance(inputs, AsyncIterable):
            async for value in inputs:
                yield await self._input(function, value)
        else:
            for value in inputs:
                yield await self._input(function, value)

    async def _input(self, function: RemoteFunction[..., Any], value: object) -> bytes:
        caller = self.caller()
        call = function.prepare(caller, (value,), {})
        return caller.input_now(call) or await self.input_of(call)

    async def input_of(self, call: FunctionCall[Any]) -> bytes:
        """Return the input of a call's task, once the values among its arguments are there."""
        for dependency in call.dependencies:
            await dependency.met()
        return await self.caller().input_of(call)

    # ---- objects

    async def create(self, cls: type[T], /, *args: Any, **kwargs: Any) -> Instance[T]:
        """Make an object of a class in the cluster and return what its methods are called by; see `Instance`.

        It gets a session of its own, with this one's options and one executor, which is closed with this one, or by
        `release`. If its constructor raises, every call of its methods raises that.

        Args:
            cls: The class; it travels as functions do. If it has ``async`` methods, its constructor and all others run
                in the event loop too; otherwise all run in one thread.
            args: Of its constructor; calls among them are awaited.
            kwargs: The same.

        Raises:
            Unpicklable: The class or an argument can't be sent; the text names it, and what of it.
            SessionNotOpen: This session was closed.
        """
        self.caller().check_loop()
        return await self.make(cls, NewInstance(cls, args, kwargs))

    async def make(self, cls: type[T], new: NewInstance) -> Instance[T]:
        """Make an object of what was taken over."""
        options: FunctionOptions = {**self._options, "min_instances": 1, "max_instances": 1, "session_id": None}
        connection = self._opened(self._connection)
        self.caller().check_arguments(new.dependencies)
        session = await _create(connection, await new.common_data(), options)
        if self._closed:  # meanwhile
            error = self._closed_error()
            await session.__aexit__(type(error), error, None)
            raise error
        instance: Instance[T] = Instance(cls, new.modules, Caller(session, None))
        self._instances.append(instance)
        return instance

    async def release(self, instance: Instance[Any]) -> None:
        """Wait for an object's calls, then end it and close its session. Idempotent."""
        if not isinstance(instance, Instance):
            raise InvalidArgument(f"release: expected an Instance, got {type(instance).__name__}")
        caller = close_instance(instance)
        if instance in self._instances:
            await caller.idle()
            await caller.session.__aexit__(None, None, None)
            if instance in self._instances:  # another release may have been quicker
                self._instances.remove(instance)

    # ---- how

    def caller(self) -> Caller:
        """Return what makes the session's calls; raise `SessionNotOpen` if it was closed."""
        caller = self._opened(self._caller)
        if self._closed:
            raise self._closed_error()
        return caller

    def _closed_error(self) -> SessionNotOpen:
        return SessionNotOpen(f"session {self.session.id} was closed: no function of it can be called any more")

    def _opened(self, part: T | None) -> T:
        if part is None:
            raise ConfigurationError("functions: not opened yet: use `async with flame.functions() as fs`")
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse: it can be used from here only."""
        raise Unpicklable("a FunctionSession can't be sent to executors: functions call one another as plain functions")


def outcome(name: str, task: Task, *, raise_failed: bool) -> Any:
    """Return what came of a call of a map."""
    try:
        return value_of(name, task)
    except TaskError as error:
        if raise_failed:
            raise
        return error


async def _create(connection: Connection, common_data: bytes, options: FunctionOptions) -> Session:
    try:
        return await connection.create_session(APPLICATION, common_data, **options)
    except ApplicationDisabled:
        raise ApplicationDisabled(
            f"this cluster's operator has switched functions off: `flmctl enable -a {APPLICATION}` allows them again"
        ) from None
    except ApplicationNotFound:
        raise ApplicationNotFound(
            f"this cluster has no application {APPLICATION}, which runs functions: its operator has removed it or left"
            f" it out (--no-client-code). To have it, register it with the command {APPLICATION}-service"
        ) from None


def functions(**options: Unpack[FunctionOptions]) -> FunctionSession:
    """Return a session whose tasks are calls of this program's own functions, which need not be deployed.

    On the default connection, to be opened by ``async with``; see `FunctionSession`::

        async with flame.functions(max_instances=4) as fs:

            @fs.function
            def square(x: int) -> int:
                return x * x

            print(await square(3))

    The arguments are those of `flame.create_session`. Whoever may open such a session may run any code on the cluster's
    nodes, and this program loads what they return, by pickle: they have to trust one another.

    Needs the extra ``flame-engine[functions]``, and executors with the same version of Python, as 3.11.
    """
    return FunctionSession(None, options)
