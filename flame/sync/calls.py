"""Functions of a program that run in the cluster, for programs without ``async``."""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Self, TypeVar, Unpack, overload

from flame.calls.call import FunctionCall as AsyncCall
from flame.calls.call import lacks_output
from flame.calls.caller import Caller
from flame.calls.function import RemoteFunction as AsyncFunction
from flame.calls.instance import Instance as AsyncInstance
from flame.calls.instance import NewInstance, RemoteMethod, caller_of
from flame.calls.references import refer
from flame.calls.session import FunctionOptions, outcome
from flame.calls.session import FunctionSession as AsyncFunctionSession
from flame.client.mapping import total_of
from flame.client.typed import with_total
from flame.errors import FlameError, InternalError, InvalidArgument, TaskCancelled, TaskError, TimedOut
from flame.protocol.states import TaskState
from flame.sync.background import Background, background
from flame.sync.session import Session

if TYPE_CHECKING:
    from typing import Protocol

    from flame.protocol.messages import TaskOptions

    class Decorator(Protocol):
        """What makes a `RemoteFunction` of a function."""

        @overload
        def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> RemoteFunction[P, R]: ...
        @overload
        def __call__(self, function: Callable[P, R], /) -> RemoteFunction[P, R]: ...


P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _Failed(Exception):
    """Stands for the error of a call: so whoever waits for the first exception hears of it."""


class FunctionCall(Future[R]):
    """A call of a function or method in the cluster: a `concurrent.futures.Future` of its value.

    See `flame.FunctionCall`. It may be an argument of another call, or be in one.
    """

    def __init__(self, background: Background, caller: Caller, call: AsyncCall[R]) -> None:
        """Made by calling a function."""
        super().__init__()
        self._background = background
        self._call = call
        background.check()
        background.outstanding.add(self)
        background.post(self._begin, caller)
        if background.ended:  # just now
            self.lose(background.gone())

    @property
    def task_id(self) -> str:
        """The id of its task in the session; empty as long as it waits for its arguments, or to be submitted."""
        return self._call.task_id

    @property
    def session_id(self) -> str:
        """The id of its session."""
        return self._call.session_id

    def result(self, timeout: float | None = None) -> R:
        """Wait for the value, no longer than ``timeout`` seconds: then it raises `TimedOut`, and the call goes on.

        Otherwise it raises what awaiting a `flame.FunctionCall` does, and `WrongThread` on the background's thread.
        """
        lost = self._given_up(timeout)
        if lost is not None:
            raise lost
        if self._call.is_large:
            return self._call.read(self._background.run(self._call.whole()))  # type: ignore[no-any-return]
        return self._call.value()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end and return what `result` would raise; ``None`` if the call succeeded.

        It fetches nothing: that a large value can't be had or loaded only `result` finds out.
        """
        lost = self._given_up(timeout)
        if lost is not None or self._call.is_large:
            return lost
        try:
            self._call.value()
        except FlameError as error:
            return error
        return None

    def cancel(self, reason: str = "") -> bool:
        """Give it up, whether it waits or runs, and tell whether it is cancelled for good."""
        return self._background.run(self._call.cancel(reason)) is TaskState.CANCELLED

    def cancelled(self) -> bool:
        """Whether it ended by being cancelled."""
        return self.done() and isinstance(self.exception(), TaskCancelled)

    def running(self) -> bool:
        """Whether it was submitted, and has not ended."""
        return not self.done() and bool(self.task_id)

    def add_done_callback(self, fn: Callable[[Future[R]], object]) -> None:
        """Have a function called with this call at its end; never in the background: it may use the API."""
        super().add_done_callback(partial(self._call_back, fn))

    def __repr__(self) -> str:
        """Name the function and the task."""
        return f"<flame.sync.{repr(self._call)[1:]}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Stand for the value among the arguments of another call."""
        return refer(self._call)

    # ---- for the background

    def lose(self, error: FlameError) -> None:
        """Give it up, if it has not ended: nothing more can be learned of it."""
        self._background.outstanding.discard(self)
        with suppress(InvalidStateError):
            self.set_exception(error)

    def lose_by_fork(self, error: FlameError) -> None:
        """Give it up in a process that was forked: whoever held its lock is not here."""
        super().__init__()
        self.set_exception(error)

    def _given_up(self, timeout: float | None) -> BaseException | None:
        """Wait for the end; return with what error it was given up, if it was."""
        if not self.done():
            self._background.check()
        try:
            error = super().exception(timeout)
        except TimeoutError:
            raise TimedOut(f"{self} has not ended after {timeout or 0:g} s; it goes on") from None
        return None if isinstance(error, _Failed) else error

    def _call_back(self, fn: Callable[[Future[R]], object], _: Future[R]) -> None:
        if self._background.is_here():
            self._background.callbacks.put(partial(fn, self))
        else:
            fn(self)

    def _begin(self, caller: Caller) -> None:
        try:
            caller.begin(self._call)
        except FlameError as error:
            self._call.fail(error)
        except Exception as error:  # noqa: BLE001  # whoever waits must hear of it
            self._call.fail(InternalError(f"{self} could not be made: {type(error).__name__}: {error}"))
        self._call.ended().add_done_callback(self._settle)

    def _settle(self, _: object) -> None:
        self._background.outstanding.discard(self)
        if not self._background.silent:
            with suppress(InvalidStateError):  # it was given up
                # Its value, or the error, is loaded on the thread that asks for it.
                if self._call.failed_with is not None:
                    self.set_exception(_Failed())
                else:
                    self.set_result(None)  # type: ignore[arg-type]


class RemoteFunction(Generic[P, R]):
    """A function that runs in the cluster when it is called, in any thread; see `flame.RemoteFunction`."""

    def __init__(self, background: Background, session: AsyncFunctionSession, function: AsyncFunction[P, R]) -> None:
        """Made by a session of functions."""
        self._background = background
        self._session = session
        self._function = function

    @property
    def function(self) -> Callable[..., Any]:
        """The plain function."""
        return self._function.function

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self._function.name

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> FunctionCall[R]: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> FunctionCall[R]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> FunctionCall[R]:
        """Have it called in the cluster, and return the future of its value; see `flame.RemoteFunction`."""
        caller = self._session.caller()
        return FunctionCall(self._background, caller, self._function.prepare(caller, args, kwargs))

    def __repr__(self) -> str:
        """Name the function."""
        return f"<flame.sync.RemoteFunction {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Be the plain function in other processes."""
        return self._function.__reduce__()


class Instance(Generic[T]):
    """An object in the cluster, whose methods are called like functions of a session; see `flame.Instance`."""

    def __init__(self, background: Background, instance: AsyncInstance[T]) -> None:
        """Made by a session of functions."""
        self._background = background
        self._instance = instance

    def __getattr__(self, name: str) -> Callable[..., FunctionCall[Any]]:
        """Return a method. Raises `MethodNotFound` if the class has none of that name."""
        return _Method(self._background, self._instance, getattr(self._instance, name))

    def __repr__(self) -> str:
        """Name the class and the session."""
        return f"<flame.sync.{repr(self._instance)[1:]}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse: it can be reached from here only."""
        return self._instance.__reduce__()


class _Method:
    """A method of an object in the cluster."""

    def __init__(self, background: Background, instance: AsyncInstance[Any], method: RemoteMethod) -> None:
        self._background = background
        self._instance = instance
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> FunctionCall[Any]:
        """Have it called, and return the future of its value."""
        caller = caller_of(self._instance)
        return FunctionCall(self._background, caller, self._method.prepare(caller, args, kwargs))


class FunctionSession:
    """A session whose tasks are calls of this program's functions. Made by `functions`; see `flame.FunctionSession`.

    As a context manager it is opened, waits for every call, and is closed with its objects; after an exception it is
    closed at once. It may be used by several threads at once.
    """

    def __init__(self, background: Background, session: AsyncFunctionSession) -> None:
        """Made by `functions`; nothing is opened yet."""
        self._background = background
        self._session = session

    @property
    def session(self) -> Session:
        """The session underneath; see `flame.FunctionSession.session`."""
        return Session(self._background, self._session.session)

    def open(self) -> Self:
        """Open the session, once; see `flame.FunctionSession.open`."""
        self._background.run(self._session.open())
        return self

    def __enter__(self) -> Self:
        """Open the session."""
        self._background.run(self._session.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for every call, then close the session and its objects; close at once after an exception."""
        self._background.run(self._session.__aexit__(kind, error, traceback))

    def close(self) -> None:
        """Wait for every call that was made, then close the session and those of its objects. Idempotent."""
        self._background.run(self._session.close())

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
        """Return a function that runs in the cluster when it is called; see `flame.FunctionSession.function`."""
        if function is None:
            return lambda decorated: self.function(decorated, options=options)
        return RemoteFunction(self._background, self._session, self._session.function(function, options=options))

    @overload
    def map(
        self,
        function: RemoteFunction[..., R],
        inputs: Iterable[Any],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: Literal[True] = True,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
    ) -> Generator[R, None, None]: ...
    @overload
    def map(
        self,
        function: RemoteFunction[..., R],
        inputs: Iterable[Any],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: bool,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
    ) -> Generator[R | TaskError, None, None]: ...
    def map(
        self,
        function: RemoteFunction[..., R],
        inputs: Iterable[Any],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: bool = True,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
    ) -> Generator[R | TaskError, None, None]:
        """Call a function with each input as its one argument and yield the values; see `flame.FunctionSession.map`.

        To leave it early, call its ``close``, or put it into `contextlib.closing`.
        """
        if isinstance(inputs, AsyncIterable):
            raise InvalidArgument("inputs: an asynchronous iterable is for flame.FunctionSession")
        if on_progress is not None:
            on_progress = with_total(on_progress, total_of(inputs))
        run: Any = getattr(function, "_function", function)  # as flame.FunctionSession knows it
        self._session.check(run)
        with self.session.map(
            self._inputs(run, inputs),
            ordered=ordered,
            in_flight=in_flight,
            raise_failed=False,
            cancel_on_exit=cancel_on_exit,
            on_progress=on_progress,
            options=run.options if options is None else options,
        ) as tasks:
            for task in tasks:
                whole = self.session.get_task(task.id) if lacks_output(task) else task
                yield outcome(run.name, whole, raise_failed=raise_failed)

    def _inputs(self, function: AsyncFunction[..., Any], inputs: Iterable[Any]) -> Iterator[bytes]:
        for value in inputs:
            caller = self._session.caller()
            call = function.prepare(caller, (value,), {})
            ready = caller.input_now(call)
            yield self._background.run(self._session.input_of(call)) if ready is None else ready

    # ---- objects

    def create(self, cls: type[T], /, *args: Any, **kwargs: Any) -> Instance[T]:
        """Make an object of a class in the cluster; see `flame.FunctionSession.create`."""
        self._session.caller()
        new = NewInstance(cls, args, kwargs)
        return Instance(self._background, self._background.run(self._session.make(cls, new)))

    def release(self, instance: Instance[Any]) -> None:
        """Wait for an object's calls, then end it and close its session; see `flame.FunctionSession.release`."""
        if not isinstance(instance, Instance):
            raise InvalidArgument(f"release: expected an Instance, got {type(instance).__name__}")
        self._background.run(self._session.release(instance._instance))  # noqa: SLF001  # as it is known there


def functions(**options: Unpack[FunctionOptions]) -> FunctionSession:
    """Return a session whose tasks are calls of this program's own functions; see `flame.functions`.

    To be opened by ``with``::

        with flame.sync.functions(max_instances=4) as fs:

            @fs.function
            def square(x: int) -> int:
                return x * x

            print(square(3).result())
    """
    return FunctionSession(background(), AsyncFunctionSession(None, options))
