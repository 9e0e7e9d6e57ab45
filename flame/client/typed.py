"""A session as a client of a typed service holds it: values in, values out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator, Iterable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, Self

from flame.client.mapping import KeysAhead, total_of
from flame.client.task import Task, TaskHandle, TaskInformer
from flame.errors import InvalidInput, SchemaMismatch
from flame.protocol.messages import TaskFault, TaskOptions
from flame.protocol.states import TaskState
from flame.typed.codec import Coder, I, O, Unfit

if TYPE_CHECKING:
    from types import TracebackType

    from flame.client.chunks import Chunk, ChunkStream
    from flame.client.session import Session

_UNREAD: Final[Any] = object()


class TypedTask(Generic[O]):
    """A task of a typed session, as its client last learned of it."""

    __slots__ = ("_codec", "_output", "task")

    def __init__(self, task: Task, codec: Coder[O]) -> None:
        """Made by a typed session."""
        self.task = task
        """The task with its output as it came: bytes."""
        self._codec = codec
        self._output: O = _UNREAD

    @property
    def id(self) -> str:
        """The task's id."""
        return self.task.id

    @property
    def state(self) -> TaskState:
        """Its state."""
        return self.task.state

    @property
    def error(self) -> TaskFault | None:
        """Why it failed or was cancelled."""
        return self.task.error

    @property
    def executor(self) -> str:
        """Who runs or ran it."""
        return self.task.executor

    @property
    def output(self) -> O:
        """What the service returned.

        Raises:
            TaskError: It did not succeed: what `flame.Session.invoke` raises for such a task.
            SchemaMismatch: The service returned something of another type.
        """
        if self._output is _UNREAD:
            self.task.check()
            try:
                self._output = self._codec.decode(self.task.output)
            except Unfit as error:
                raise SchemaMismatch(
                    f"task {self.id} of session {self.task.session_id} succeeded, but its output is not"
                    f" {self._codec.name}: {error}",
                    self.task,
                ) from None
        return self._output

    def check(self) -> TypedTask[O]:
        """Return the task if it has an output of its type; otherwise raise what `output` would."""
        self.output  # noqa: B018  # reading it is what checks it
        return self

    def __repr__(self) -> str:
        """Name the task and its state."""
        return f"<TypedTask {self.task.session_id}/{self.id} {self.state.value}>"


class _OfATask(Protocol):
    @property
    def task(self) -> Task: ...


class TypedChunk(Generic[O]):
    """Something that a task emitted; see `Chunk`."""

    __slots__ = ("_codec", "_stream", "chunk")

    def __init__(self, chunk: Chunk, stream: _OfATask, codec: Coder[O]) -> None:
        """Made by a typed stream."""
        self.chunk = chunk
        """The same with bytes, its place and its attempt. Without any it says that what came before is void."""
        self._stream = stream
        self._codec = codec

    @property
    def value(self) -> O:
        """What the service yielded. Raises `SchemaMismatch` if that is of another type."""
        try:
            return self._codec.decode(self.chunk.data)
        except Unfit as error:
            task = self._stream.task
            raise SchemaMismatch(
                f"chunk {self.chunk.index} of task {task.id} of session {task.session_id} is not {self._codec.name}:"
                f" {error}",
                task,
            ) from None


class TypedStream(AsyncIterator[TypedChunk[O]]):
    """What one task emits, as it comes, with values; see `ChunkStream`. Made by `TypedSession.stream`."""

    def __init__(self, stream: ChunkStream, codec: Coder[O]) -> None:
        """Made by a typed session."""
        self.stream = stream
        """The same with bytes: it has the task, and cancels it."""
        self._codec = codec

    async def __aenter__(self) -> Self:
        """Have the task stored."""
        await self.stream.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the iteration; the task goes on."""
        await self.stream.__aexit__(kind, error, traceback)

    async def __anext__(self) -> TypedChunk[O]:
        """Return the next chunk, waiting for it."""
        return TypedChunk(await anext(self.stream), self.stream, self._codec)


class TypedHandle(Generic[O]):
    """A task that was created. Await it for the finished `TypedTask`; a failed one raises `flame.TaskFailed`."""

    __slots__ = ("_codec", "handle")

    def __init__(self, handle: TaskHandle, codec: Coder[O]) -> None:
        """Made by a typed session."""
        self.handle = handle
        """The same with bytes."""
        self._codec = codec

    @property
    def id(self) -> str:
        """The task's id."""
        return self.handle.id

    def done(self) -> bool:
        """Whether the task has ended, or can't be waited for any more."""
        return self.handle.done()

    async def cancel(self, reason: str = "") -> TaskState:
        """Give the task up; see `TaskHandle.cancel`."""
        return await self.handle.cancel(reason)

    async def finished(self) -> TypedTask[O]:
        """Wait for the end and return the task, however it ended. Raises only if nothing can be learned of it."""
        return TypedTask(await self.handle.finished(), self._codec)

    def __await__(self) -> Generator[Any, None, TypedTask[O]]:
        """Wait for the end; cancelling the wait leaves the task alone."""
        return self._wait().__await__()

    async def _wait(self) -> TypedTask[O]:
        return TypedTask(await self.handle, self._codec).check()


class TypedSession(Generic[I, O]):
    """A session whose tasks take and return values. Made by `Session.typed` and `Session.typed_as_published`.

    Its methods are those of `Session`, with values instead of bytes: an input that doesn't fit is refused before it is
    sent (`InvalidInput`), and an output that doesn't raises `SchemaMismatch`. Both name the field. Whatever else is to
    be done with the session is done with `session`.
    """

    def __init__(self, session: Session, input: Coder[I], output: Coder[O]) -> None:
        """Made by a session."""
        self.session = session
        """The session, with bytes."""
        self._input = input
        self._output = output

    def __repr__(self) -> str:
        """Name the session and the types."""
        return f"<TypedSession {self.session.id} {self._input.name} -> {self._output.name}>"

    def encode(self, input: I) -> bytes:
        """Return an input as it is sent. Raises `InvalidInput`."""
        try:
            return self._input.encode(input)
        except Unfit as error:
            raise InvalidInput(
                f"input for application {self.session.application}: not {self._input.name}: {error}"
            ) from None

    def read(self, task: Task) -> TypedTask[O]:
        """Return a task of the session, such as `Session.get_task` returns, with its output as a value."""
        return TypedTask(task, self._output)

    def read_chunk(self, chunk: Chunk, stream: _OfATask) -> TypedChunk[O]:
        """Return a chunk of a stream of the session, such as `Session.open_stream` returns, with its value."""
        return TypedChunk(chunk, stream, self._output)

    async def invoke(
        self,
        input: I,
        informer: TaskInformer | None = None,
        *,
        timeout_s: float | None = None,
        options: TaskOptions | None = None,
        key: str | None = None,
    ) -> TypedTask[O]:
        """Run a task and return it with its ``output``; see `Session.invoke`.

        Raises:
            InvalidInput: ``input`` is not what the service takes. Nothing was sent.
            SchemaMismatch: The service returned something else than is expected here.
            TaskFailed: As of any task; with the code ``invalid_argument`` if the service expects another input.
        """
        task = await self.session.invoke(self.encode(input), informer, timeout_s=timeout_s, options=options, key=key)
        return self.read(task).check()

    async def create_task(
        self,
        input: I,
        informer: TaskInformer | None = None,
        *,
        options: TaskOptions | None = None,
        key: str | None = None,
    ) -> TypedHandle[O]:
        """Store a task and return what can be awaited for its end; see `Session.create_task`."""
        handle = await self.session.create_task(self.encode(input), informer, options=options, key=key)
        return TypedHandle(handle, self._output)

    async def create_tasks(
        self,
        inputs: Iterable[I],
        informer: TaskInformer | None = None,
        *,
        options: TaskOptions | None = None,
        keys: Iterable[str | None] | None = None,
    ) -> list[TypedHandle[O]]:
        """Store many tasks and return their handles, in order; see `Session.create_tasks`.

        All inputs are checked before the first is sent.
        """
        encoded = [self.encode(input) for input in inputs]
        handles = await self.session.create_tasks(encoded, informer, options=options, keys=keys)
        return [TypedHandle(handle, self._output) for handle in handles]

    def stream(self, input: I, *, options: TaskOptions | None = None, key: str | None = None) -> TypedStream[O]:
        """Run a task of a service that yields, and iterate over what it does; see `Session.stream`.

        Of such a service the output type is that of what it yields.
        """
        return TypedStream(self.session.stream(self.encode(input), options=options, key=key), self._output)

    async def map(
        self,
        inputs: Iterable[I] | AsyncIterable[I],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: bool = True,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
        key: Callable[[I], str | None] | None = None,
    ) -> AsyncGenerator[TypedTask[O], None]:
        """Run a task for each input and yield the finished ones, as `Session.map` does.

        An input that does not fit ends it, as an error of the inputs themselves would. With ``raise_failed=False`` it
        is the ``output`` of what failed, or is of another type, that raises. ``key`` is called with values.
        """
        keys = None if key is None else KeysAhead(key)
        if on_progress is not None:
            on_progress = with_total(on_progress, total_of(inputs))
        tasks = self.session.map(
            self._encoded(inputs, keys),
            ordered=ordered,
            in_flight=in_flight,
            raise_failed=raise_failed,
            cancel_on_exit=cancel_on_exit,
            on_progress=on_progress,
            options=options,
            key=None if keys is None else keys.take,
        )
        async with aclosing(tasks):
            async for task in tasks:
                yield self.read(task).check() if raise_failed else self.read(task)

    def _encoded(
        self, inputs: Iterable[I] | AsyncIterable[I], keys: KeysAhead[I] | None
    ) -> Iterator[bytes] | AsyncIterator[bytes]:
        if isinstance(inputs, AsyncIterable):
            return self._encoded_later(inputs, keys)
        return map(self.encode, inputs if keys is None else map(keys.note, inputs))

    async def _encoded_later(self, inputs: AsyncIterable[I], keys: KeysAhead[I] | None) -> AsyncIterator[bytes]:
        async for input in inputs:
            yield self.encode(input if keys is None else keys.note(input))


def with_total(on_progress: Callable[[int, int | None], None], total: int | None) -> Callable[[int, int | None], None]:
    """Return what passes on how many inputs there are, where that can't be told from what is mapped."""
    return lambda done, _: on_progress(done, total)
