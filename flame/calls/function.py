"""A function of a program, as it is called in the cluster."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, overload

from flame.calls.call import FunctionCall
from flame.calls.messages import Call
from flame.calls.pickling import name_of
from flame.calls.references import collecting
from flame.calls.sending import argument_bytes
from flame.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from flame.calls.caller import Caller
    from flame.calls.definitions import SentFunctions
    from flame.protocol.messages import TaskOptions

P = ParamSpec("P")
R = TypeVar("R")


class RemoteFunction(Generic[P, R]):
    """A function that runs in the cluster when it is called. Made by `FunctionSession.function`.

    Calling it returns a `FunctionCall` at once. Arguments may be calls, or contain some, which stand for their values;
    so a type checker accepts any, though editors show the function's own. It is sent as it is at its first call, with
    whatever it uses of the module where it was defined; inside of others it is the plain function.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        caller: Callable[[], Caller],
        functions: Callable[[], SentFunctions],
        options: TaskOptions | None,
    ) -> None:
        """Made by a session of functions."""
        self.function = function
        """The plain function."""
        self.name = name_of(function)
        """What it is called in messages."""
        self._caller = caller
        self._functions = functions
        self.options = options
        """How its tasks are to be run."""
        self._sent_as = b""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> FunctionCall[R]: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> FunctionCall[R]: ...
    def __call__(self, *args: Any, **kwargs: Any) -> FunctionCall[R]:
        """Have it called in the cluster, and return what can be awaited for the value.

        Raises:
            Unpicklable: The function or an argument can't be sent; the text names it, and what of it.
            SessionNotOpen: The session was closed.
            WrongThread: This is not the session's event loop.
        """
        caller = self._caller()
        caller.check_loop()
        call = self.prepare(caller, args, kwargs)
        caller.begin(call)
        return call

    def prepare(self, caller: Caller, args: Sequence[Any], kwargs: dict[str, Any]) -> FunctionCall[R]:
        """Return a call that is not made yet; in any thread."""
        functions = self._functions()
        if not self._sent_as:
            self._sent_as = functions.add(self.function)
        return prepare(caller, self.name, self._sent_as, (args, kwargs), tuple(functions.modules), self.options)

    def check_of(self, caller: Caller) -> None:
        """Raise `InvalidArgument` if this is a function of another session."""
        if self._caller() is not caller:
            raise InvalidArgument(f"function: {self.name} is one of another session; use {self.name}.function of this")

    def __repr__(self) -> str:
        """Name the function."""
        return f"<RemoteFunction {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Be the plain function in other processes."""
        return _plain, (self.function,)


class Decorator(Protocol):
    """What makes a `RemoteFunction` of a function."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> RemoteFunction[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> RemoteFunction[P, R]: ...


def prepare(
    caller: Caller,
    name: str,
    function: bytes,
    arguments: tuple[Sequence[Any], dict[str, Any]],
    modules: Iterable[str],
    options: TaskOptions | None,
) -> FunctionCall[Any]:
    """Return a call with its arguments as they are now; raise `Unpicklable`, or `WrongThread` for another loop's."""
    with collecting() as dependencies:
        pickled = argument_bytes(name, *arguments, modules)
    caller.check_arguments(dependencies)
    return FunctionCall(caller, Call(name, function, pickled), dependencies, options)


def check_function(function: object) -> None:
    """Raise `InvalidArgument` for what can't be called in the cluster."""
    if not callable(function):
        raise InvalidArgument(f"function: expected a function, got {type(function).__name__}")
    if isinstance(function, RemoteFunction):
        raise InvalidArgument(f"function: {function.name} is one of a session already; pass {function.name}.function")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise InvalidArgument(f"function: {name_of(function)} yields, and a call has one value: return a list of them")


def _plain(function: Any) -> Any:
    return function
