"""Services of Python types instead of bytes: a function with annotations, or a class with an annotated ``invoke``."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, Final, Self, overload

from flame.errors import ConfigurationError, InvalidArgument, InvalidInput
from flame.service.contexts import FlameService, SessionContext, TaskContext
from flame.service.signature import Signature, Source, read_signature
from flame.typed.codec import Codec, Contract, I, NotDefined, O, Unfit

if TYPE_CHECKING:
    from collections.abc import Coroutine


@dataclass(frozen=True, slots=True)
class Schemas:
    """JSON schemas of what a service reads and writes; empty where nothing is said."""

    input_schema: dict[str, Any]
    output_schema: dict[str, Any]
    common_data_schema: dict[str, Any]


class _Handler:
    """An annotated function, and how what it takes and returns travels."""

    def __init__(
        self, function: Callable[..., Any], what: str, names: Mapping[str, Any], *, method: bool, returns: bool
    ) -> None:
        self.function = function
        self.what = what
        self.signature: Signature = read_signature(function, what, names, method=method, returns=returns)
        self.value: Codec[Any] = Codec(self.signature.value, f"{what}: its input")
        self.returned: Codec[Any] = Codec(self.signature.returns, f"{what}: what it returns")
        self.yielded: Codec[Any] | None = None
        if self.signature.yields is not None:
            self.yielded = Codec(self.signature.yields, f"{what}: what it yields")
        self.common: Codec[Any] | None = None
        if self.signature.common is not None:
            self.common = Codec(self.signature.common, f"{what}: its common data")

    def call(self, first: tuple[Any, ...], values: Mapping[Source, Any]) -> Any:
        positional = [values[argument.source] for argument in self.signature.arguments if not argument.by_name]
        named = {argument.name: values[argument.source] for argument in self.signature.arguments if argument.by_name}
        return self.function(*first, *positional, **named)

    def output(self, value: Any) -> bytes:
        try:
            return self.returned.encode(value)
        except Unfit as error:
            raise InvalidArgument(f"{self.what} did not return {self.returned.name}: {error}") from None

    def chunk(self, value: Any) -> bytes:
        assert self.yielded is not None
        try:
            return self.yielded.encode(value)
        except Unfit as error:
            raise InvalidArgument(f"{self.what} did not yield {self.yielded.name}: {error}") from None


@dataclass(slots=True)
class _Held:
    """A session, and its common data as a value."""

    context: SessionContext
    data: bytes = b""
    """What `common` was read from; that of the context changes when the session's common data does."""
    common: Any = None


class _Typed(FlameService, ABC):
    """What both kinds of typed services do between bytes and values."""

    _sessions: dict[str, _Held]
    """The session that is served; in the process of a test there may be several."""

    def __new__(cls, *_arguments: object, **_named: object) -> Self:
        """Prepare what needs no ``__init__`` of a subclass."""
        made = super().__new__(cls)
        made._sessions = {}
        return made

    @abstractmethod
    def _handler(self) -> _Handler:
        """Return what reads an input and writes an output."""

    def _enter_handler(self) -> _Handler | None:
        return None

    def _common_codec(self) -> Codec[Any] | None:
        enter = self._enter_handler()
        return self._handler().common or (None if enter is None else enter.value)

    def _hold(self, context: SessionContext) -> None:
        """Read a session's common data, once for all its tasks."""
        held = self._sessions[context.session_id] = _Held(context)
        self._renew(held)

    def _renew(self, held: _Held) -> None:
        handler = self._handler()
        if handler.common is not None:
            data = held.context.common_data
            held.common = _read(handler.common, data, handler.what, _COMMON)
            held.data = data

    def _values(self, context: TaskContext) -> dict[Source, Any]:
        handler = self._handler()
        held = self._sessions[context.session_id]
        if held.data is not held.context.common_data:
            self._renew(held)
        value = _read(handler.value, context.input, handler.what, "its input")
        return {Source.VALUE: value, Source.TASK: context, Source.SESSION: held.context, Source.COMMON: held.common}

    # ---- a task, by the kinds of functions that may run it

    def _me(self) -> tuple[Any, ...]:
        """Return what the function is given first."""
        return ()

    async def _invoke(self, context: TaskContext) -> bytes:
        handler = self._handler()
        return handler.output(await handler.call(self._me(), self._values(context)))

    def _invoke_in_thread(self, context: TaskContext) -> bytes:
        handler = self._handler()
        return handler.output(handler.call(self._me(), self._values(context)))

    async def _yield(self, context: TaskContext) -> AsyncGenerator[bytes, None]:
        handler = self._handler()
        async with aclosing(handler.call(self._me(), self._values(context))) as chunks:
            async for chunk in chunks:
                yield handler.chunk(chunk)

    def _yield_in_thread(self, context: TaskContext) -> Generator[bytes, None, bytes]:
        handler = self._handler()
        with closing(handler.call(self._me(), self._values(context))) as chunks:
            while True:
                try:
                    chunk = next(chunks)
                except StopIteration as end:
                    return handler.output(end.value)
                yield handler.chunk(chunk)

    def schemas(self) -> Schemas:
        """Return the schemas of what it reads and writes. Raises `ConfigurationError` where there can be none."""
        handler, common = self._handler(), self._common_codec()
        return Schemas(
            handler.value.input_schema(),
            (handler.yielded or handler.returned).output_schema(),
            {} if common is None else common.input_schema(),
        )


def _fitting(typed: object, function: object) -> Any:
    """Return the method of a typed service, or its class, that is of the same kind as the function that it calls."""
    if inspect.isasyncgenfunction(function):
        name = "_yield"
    elif inspect.isgeneratorfunction(function):
        name = "_yield_in_thread"
    else:
        name = "_invoke" if inspect.iscoroutinefunction(function) else "_invoke_in_thread"
    return getattr(typed, name)


_COMMON: Final = "the session's common data"


def _read(codec: Codec[Any], data: bytes, what: str, which: str) -> Any:
    try:
        return codec.decode(data)
    except Unfit as error:
        raise InvalidInput(f"{which} is not {codec.name}, which {what} takes: {error}") from None


# ---- a function


class Entrypoint(_Typed, Contract[I, O]):
    """A function as a service, made by `entrypoint`. Called, it is the function."""

    def __init__(self, function: Callable[..., Any], names: Mapping[str, Any]) -> None:
        """Made by `entrypoint`."""
        self.function = function
        """The function itself."""
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.__doc__ = function.__doc__
        self._names = names
        self._made: _Handler | None = None
        with suppress(NotDefined):  # a type that is defined further down: looked for again when it is needed
            self._handler()
        self.on_task_invoke = _fitting(self, function)  # type: ignore[method-assign]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        return self.function(*arguments, **named)

    def codecs(self) -> tuple[Codec[I], Codec[O]]:
        """Return how inputs and outputs travel. Not called by users."""
        handler = self._handler()
        return handler.value, handler.yielded or handler.returned

    def __repr__(self) -> str:
        """Name the function."""
        return f"<flame.entrypoint {self.__name__}>"

    async def on_session_enter(self, context: SessionContext) -> None:
        """Read the common data. Not called by users."""
        self._hold(context)

    def _handler(self) -> _Handler:
        if self._made is None:
            self._made = _Handler(self.function, self.__name__, self._names, method=False, returns=True)
            self._names = {}
        return self._made


@overload
def entrypoint(function: Callable[Concatenate[I, ...], Coroutine[Any, Any, O]]) -> Entrypoint[I, O]: ...
@overload
def entrypoint(function: Callable[[], Coroutine[Any, Any, O]]) -> Entrypoint[None, O]: ...
@overload
def entrypoint(function: Callable[Concatenate[I, ...], AsyncIterator[O] | Iterator[O]]) -> Entrypoint[I, O]: ...
@overload
def entrypoint(function: Callable[Concatenate[I, ...], O]) -> Entrypoint[I, O]: ...
@overload
def entrypoint(function: Callable[[], O]) -> Entrypoint[None, O]: ...
def entrypoint(function: Callable[..., Any]) -> Entrypoint[Any, Any]:
    """Make a service of a function: its first parameter is a task's input, what it returns the output.

    Both are what their annotations say: pydantic models, dataclasses, `TypedDict`, lists, unions, ``None``, and
    whatever else pydantic knows; they travel as JSON, and ``bytes`` as they are. What does not fit is refused, with the
    names of the fields, before the function is called. Further parameters are filled in by their annotations:
    `TaskContext`, `SessionContext`, and ``flame.CommonData[Prompt]`` for the session's common data. A function that is
    not ``async`` runs in a thread; what a generator yields is streamed, and is what its clients have as output::

        @flame.entrypoint
        async def summarise(question: Question, prompt: flame.CommonData[Prompt]) -> Answer: ...

        asyncio.run(flame.run(summarise))

    Raises:
        ConfigurationError: An annotation is missing, or says what JSON can't hold.
    """
    if isinstance(function, type) or not callable(function):
        raise ConfigurationError(f"flame.entrypoint: expected a function, got {function!r:.80}; see flame.TypedService")
    return Entrypoint(function, sys._getframe(1).f_locals)  # noqa: SLF001  # annotations may name what is local there


# ---- a class


class TypedService(_Typed):
    """A service with state, of Python types: override ``invoke``, and ``enter`` if there is something to prepare.

    ``invoke`` is what a function is to `entrypoint`. ``enter`` is called once before the first task; its first
    parameter, if it has one that is no context, is the session's common data, as its annotation says. Either may be
    ``async``; otherwise it runs in a thread. The rest is as in `FlameService`::

        class Summarise(flame.TypedService):
            async def enter(self, prompt: Prompt) -> None:
                self.prompt = prompt

            async def invoke(self, question: Question, context: flame.TaskContext) -> Answer: ...
    """

    if TYPE_CHECKING:
        invoke: Callable[..., Any]
        enter: Callable[..., Any]

    _names: ClassVar[Mapping[str, Any]] = {}
    _invoking: ClassVar[_Handler | None] = None
    _entering: ClassVar[_Handler | None] = None

    def __init_subclass__(cls, **named: Any) -> None:
        """Read the annotations of a service."""
        super().__init_subclass__(**named)
        if "on_task_invoke" in vars(cls) or "on_session_enter" in vars(cls):
            raise ConfigurationError(
                f"{cls.__qualname__}: a flame.TypedService has invoke and enter; on_task_invoke and on_session_enter"
                " are those of a flame.FlameService"
            )
        cls._names = sys._getframe(1).f_locals  # noqa: SLF001  # annotations may name what is local there
        cls._invoking = cls._entering = None
        invoke, enter = getattr(cls, "invoke", None), getattr(cls, "enter", None)
        cls.on_task_invoke = _fitting(cls, invoke)  # type: ignore[method-assign]
        if inspect.iscoroutinefunction(enter) or enter is None:
            cls.on_session_enter = cls._enter  # type: ignore[assignment,method-assign]
        else:
            cls.on_session_enter = cls._enter_in_thread  # type: ignore[assignment,method-assign]
        if invoke is not None:
            with suppress(NotDefined):  # a type that is defined further down: looked for again when it is needed
                cls._read()

    @classmethod
    def _read(cls) -> _Handler:
        if cls._invoking is None:
            invoke, enter = getattr(cls, "invoke", None), getattr(cls, "enter", None)
            if invoke is None:
                raise ConfigurationError(f"{cls.__qualname__} has no invoke: see flame.TypedService")
            name = cls.__qualname__
            if enter is not None:
                cls._entering = _Handler(enter, f"{name}.enter", cls._names, method=True, returns=False)
            cls._invoking = _Handler(invoke, f"{name}.invoke", cls._names, method=True, returns=True)
            cls._names = {}
        return cls._invoking

    def _handler(self) -> _Handler:
        return self._read()

    def _enter_handler(self) -> _Handler | None:
        self._read()
        return self._entering

    def _me(self) -> tuple[Any, ...]:
        return (self,)

    async def _enter(self, context: SessionContext) -> None:
        entered = self._begin(context)
        if entered is not None:
            await entered

    def _enter_in_thread(self, context: SessionContext) -> None:
        self._begin(context)

    def _begin(self, context: SessionContext) -> Awaitable[None] | None:
        self._hold(context)
        handler = self._enter_handler()
        if handler is None:
            return None
        value = None
        if any(argument.source is Source.VALUE for argument in handler.signature.arguments):
            value = _read(handler.value, context.common_data, handler.what, _COMMON)
        held = self._sessions[context.session_id]
        values = {Source.VALUE: value, Source.SESSION: context, Source.COMMON: held.common}
        entered: Awaitable[None] | None = handler.call((self,), values)
        return entered


def schemas_of(service: object) -> dict[str, Any]:
    """Return the JSON schemas of a typed service, under the names that they have in `ApplicationSpec`.

    To register it by hand: ``ApplicationSpec(command="python", arguments=["x.py"], **flame.schemas_of(summarise))``.
    What a service of bytes takes is not known, so there are none of it.

    Args:
        service: What `flame.run` is given, or a class derived from `TypedService`.

    Raises:
        ConfigurationError: A type has no schema, or an annotation names what is not there.
    """
    if isinstance(service, type) and issubclass(service, TypedService):
        service = service.__new__(service)
    if not isinstance(service, _Typed):
        return {}
    schemas = service.schemas()
    found = {
        "input_schema": schemas.input_schema,
        "output_schema": schemas.output_schema,
        "common_data_schema": schemas.common_data_schema,
    }
    return {name: schema for name, schema in found.items() if schema}
