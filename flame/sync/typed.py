"""A session as a synchronous client of a typed service holds it: values in, values out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Generic

from flame.client.mapping import KeysAhead, total_of
from flame.client.task import Task, TaskInformer
from flame.client.typed import TypedSession as AsyncTypedSession
from flame.client.typed import TypedTask, with_total
from flame.protocol.messages import TaskOptions
from flame.sync.typed_task import TypedHandle, TypedStream
from flame.typed.codec import I, O

if TYPE_CHECKING:
    from flame.sync.session import Session


class TypedSession(Generic[I, O]):
    """A session whose tasks take and return values. Made by `Session.typed` and `Session.typed_as_published`.

    What the methods mean, take and raise is said in full at those of the same names of `flame.TypedSession`.
    """

    def __init__(self, session: Session, typed: AsyncTypedSession[I, O]) -> None:
        """Made by a session."""
        self.session = session
        """The session, with bytes."""
        self._typed = typed

    def __repr__(self) -> str:
        """Name the session and the types."""
        return f"<flame.sync.{repr(self._typed)[1:]}"

    def encode(self, input: I) -> bytes:
        """Return an input as it is sent; see `flame.TypedSession.encode`."""
        return self._typed.encode(input)

    def read(self, task: Task) -> TypedTask[O]:
        """Return a task of the session, such as the result of a handle, with its output as a value."""
        return self._typed.read(task)

    def invoke(
        self,
        input: I,
        informer: TaskInformer | None = None,
        *,
        timeout_s: float | None = None,
        options: TaskOptions | None = None,
        key: str | None = None,
    ) -> TypedTask[O]:
        """Run a task and return it with its ``output``; see `flame.TypedSession.invoke`."""
        data = self._typed.encode(input)
        task = self.session.invoke(data, informer, timeout_s=timeout_s, options=options, key=key)
        return self._typed.read(task).check()

    def create_task(
        self,
        input: I,
        informer: TaskInformer | None = None,
        *,
        options: TaskOptions | None = None,
        key: str | None = None,
    ) -> TypedHandle[O]:
        """Store a task and return the future of its end; see `flame.TypedSession.create_task`."""
        handle = self.session.create_task(self._typed.encode(input), informer, options=options, key=key)
        return TypedHandle(handle, self._typed)

    def create_tasks(
        self,
        inputs: Iterable[I],
        informer: TaskInformer | None = None,
        *,
        options: TaskOptions | None = None,
        keys: Iterable[str | None] | None = None,
    ) -> list[TypedHandle[O]]:
        """Store many tasks and return their futures, in order; see `flame.TypedSession.create_tasks`."""
        encoded = [self._typed.encode(input) for input in inputs]
        handles = self.session.create_tasks(encoded, informer, options=options, keys=keys)
        return [TypedHandle(handle, self._typed) for handle in handles]

    def stream(self, input: I, *, options: TaskOptions | None = None, key: str | None = None) -> TypedStream[O]:
        """Run a task of a service that yields, and iterate over what it does; see `flame.TypedSession.stream`."""
        return TypedStream(self.session.stream(self._typed.encode(input), options=options, key=key), self._typed)

    def map(
        self,
        inputs: Iterable[I],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: bool = True,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
        key: Callable[[I], str | None] | None = None,
    ) -> Generator[TypedTask[O], None, None]:
        """Run a task for each input and yield the finished ones; see `flame.TypedSession.map`.

        To leave it early, call its ``close``, or put it into `contextlib.closing`.
        """
        keys = None if key is None else KeysAhead(key)
        if on_progress is not None:
            on_progress = with_total(on_progress, total_of(inputs))
        with self.session.map(
            map(self._typed.encode, inputs if keys is None else map(keys.note, inputs)),
            ordered=ordered,
            in_flight=in_flight,
            raise_failed=raise_failed,
            cancel_on_exit=cancel_on_exit,
            on_progress=on_progress,
            options=options,
            key=None if keys is None else keys.take,
        ) as tasks:
            for task in tasks:
                yield self._typed.read(task).check() if raise_failed else self._typed.read(task)
