"""An object with state that lives in the cluster, in a session of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flame.calls.call import FunctionCall
from flame.calls.function import prepare
from flame.calls.messages import Call, Definitions
from flame.calls.pickling import module_of, name_of
from flame.calls.references import collecting
from flame.calls.sending import argument_bytes, definition_bytes
from flame.errors import InvalidArgument, MethodNotFound, SessionNotOpen, Unpicklable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flame.calls.caller import Caller

T = TypeVar("T")


class Instance(Generic[T]):
    """An object in the cluster: its methods are called like functions of a session. Made by `FunctionSession.create`.

    ``await counter.increment(2)``: each call returns a `FunctionCall`. They run one after another, in the order in
    which they were made; those that wait for arguments when these are there. (If the executor loses its connection to
    the broker, calls that were on their way to it may run after later ones.) It lives in one executor, as long as its
    session is open, and is nobody else's.

    If that executor is lost, the object is lost with all that it had become: it is made anew by its constructor, in
    another executor. Calls that were made before that was known here raise `InstanceLost`, and were either not run or
    not to their end; that they did nothing is not certain. Calls made after that go on with the new object. So no call
    runs twice, and none finds an object that has forgotten what another was told. What must outlive an executor belongs
    into `TaskContext.state` of `current_task`.
    """

    def __init__(self, cls: type[T], modules: tuple[str, ...], caller: Caller) -> None:
        """Made by a session of functions."""
        self._cls = cls
        self._modules = modules
        self._caller = caller
        self._closed = False

    def __getattr__(self, name: str) -> RemoteMethod:
        """Return a method. Raises `MethodNotFound` if the class has none of that name."""
        if name.startswith("__"):
            raise AttributeError(name)
        if not callable(getattr(self._cls, name, None)):
            hint = ", and nothing else of an object can be reached: write one that returns it"
            there = hasattr(self._cls, name)
            raise MethodNotFound(f"class {name_of(self._cls)} has no method {name!r}{hint if there else ''}")
        return RemoteMethod(self, f"{name_of(self._cls)}.{name}")

    def __repr__(self) -> str:
        """Name the class and the session."""
        return f"<Instance of {name_of(self._cls)} in {self._caller.session.id}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse: it can be reached from here only."""
        raise Unpicklable(
            f"{self!r} can't be passed on: executors can't call one another; pass what its methods return"
        )


class RemoteMethod:
    """A method of an object in the cluster."""

    def __init__(self, instance: Instance[Any], name: str) -> None:
        """Made by an `Instance`."""
        self._instance = instance
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> FunctionCall[Any]:
        """Have it called, and return what can be awaited for the value; see `RemoteFunction`."""
        caller = caller_of(self._instance)
        caller.check_loop()
        call = self.prepare(caller, args, kwargs)
        caller.begin(call)
        return call

    def prepare(self, caller: Caller, args: Sequence[Any], kwargs: dict[str, Any]) -> FunctionCall[Any]:
        """Return a call that is not made yet; in any thread."""
        modules = self._instance._modules  # noqa: SLF001  # its public names are those of its class
        return prepare(caller, self._name, b"", (args, kwargs), modules, None)

    def __repr__(self) -> str:
        """Name the method."""
        return f"<RemoteMethod {self._name}>"


def caller_of(instance: Instance[Any]) -> Caller:
    """Return what makes an object's calls; raise `SessionNotOpen` if it was closed."""
    if instance._closed:  # noqa: SLF001  # as above
        raise SessionNotOpen(f"{instance!r} was closed: create another")
    return instance._caller  # noqa: SLF001  # as above


def close_instance(instance: Instance[Any]) -> Caller:
    """Let an object take no more calls, and return what makes those that it has."""
    instance._closed = True  # noqa: SLF001  # as above
    return instance._caller  # noqa: SLF001  # as above


class NewInstance:
    """A class and the arguments of its constructor, as they are now."""

    def __init__(self, cls: type[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Take them; raise `Unpicklable`, or `InvalidArgument` for what is no class."""
        if not isinstance(cls, type):
            raise InvalidArgument(f"create: expected a class, got {type(cls).__name__}; functions are for `function`")
        name = name_of(cls)
        self.modules = tuple(filter(None, (module_of(cls),)))
        pickled = definition_bytes(cls, "class", self.modules)
        with collecting() as self.dependencies:
            arguments = argument_bytes(name, args, kwargs, self.modules)
        self._message = Call(name, pickled, arguments)

    async def common_data(self) -> bytes:
        """Return what its session is created with, once the values among its arguments are there."""
        for call in self.dependencies:
            await call.met()  # its value is nothing to this process
            self._message.references.append(await call.output())
        return Definitions(instance=self._message).encode()
