"""A session as a synchronous client holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from flame.client.keyed import checked_keys
from flame.client.session import Session as AsyncSession
from flame.client.task import Task, TaskInformer
from flame.client.watching import SessionEvent
from flame.errors import TaskError
from flame.protocol.api import SessionInfo
from flame.protocol.messages import TaskOptions
from flame.protocol.states import CloseMode, SessionState, TaskState
from flame.sync.background import Background
from flame.sync.callbacks import Relay
from flame.sync.chunks import ChunkStream
from flame.sync.iterators import BlockingIterator
from flame.sync.mapping import Mapping
from flame.sync.task import TaskHandle

if TYPE_CHECKING:
    from flame.sync.typed import TypedSession
    from flame.typed.codec import Contract, I, O


class Session:
    """An open session. Made by `create_session` and `open_session`; may be used by several threads at once.

    As a context manager it waits for its tasks and closes on a clean exit; on an exception it closes at once. What the
    methods mean, take and raise is said in full at those of the same names of `flame.Session`.
    """

    def __init__(self, background: Background, session: AsyncSession) -> None:
        """Made by a connection."""
        self._background = background
        self._session = session

    @property
    def id(self) -> str:
        """The session's id."""
        return self._session.id

    @property
    def application(self) -> str:
        """The name of its application."""
        return self._session.application

    @property
    def state(self) -> SessionState:
        """The latest known state."""
        return self._session.state

    @property
    def common_data_version(self) -> int:
        """How often its common data was changed; see `flame.Session.common_data_version`."""
        return self._session.common_data_version

    def __repr__(self) -> str:
        """Name the session and its state."""
        return f"<flame.sync.Session {self.id} {self.state.value}>"

    def __enter__(self) -> Self:
        """Return the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the session's tasks, then close it; close at once after an exception."""
        self._background.run(self._session.__aexit__(kind, error, traceback))

    # ---- tasks

    def invoke(
        self,
        input: bytes | str,
        informer: TaskInformer | None = None,
        *,
        timeout_s: float | None = None,
        options: TaskOptions | None = None,
        key: str | None = None,
    ) -> Task:
        """Run a task and return it with its ``output``; see `flame.Session.invoke`.

        An informer's methods are called on a thread of their own, one after another, those of all informers; they may
        use the API. All were called when this returns or raises that the task failed.
        """
        run = self._background.run
        if informer is None:
            return run(self._session.invoke(input, timeout_s=timeout_s, options=options, key=key))
        callbacks = self._background.callbacks
        callbacks.check_elsewhere("invoke with an informer")
        relay = self._relay(informer)
        try:
            task = run(self._session.invoke(input, relay, timeout_s=timeout_s, options=options, key=key))
        except TaskError:
            callbacks.drain()
            raise
        callbacks.drain()
        return task

    def create_task(
        self,
        input: bytes | str,
        informer: TaskInformer | None = None,
        *,
        options: TaskOptions | None = None,
        key: str | None = None,
    ) -> TaskHandle:
        """Store a task and return the future of its end: from now on it will not be lost.

        See `flame.Session.create_task`; of the informer the same is true as in `invoke`.
        """

        async def create() -> TaskHandle:
            handle = await self._session.create_task(input, self._relay(informer), options=options, key=key)
            return TaskHandle(self._background, handle, informed=informer is not None)

        return self._background.run(create())

    def create_tasks(
        self,
        inputs: Iterable[bytes | str],
        informer: TaskInformer | None = None,
        *,
        options: TaskOptions | None = None,
        keys: Iterable[str | None] | None = None,
    ) -> list[TaskHandle]:
        """Store many tasks and return their futures, in order, when all are stored; see `flame.Session.create_tasks`.

        All inputs are taken before the first is sent.
        """
        everything, names = list(inputs), None if keys is None else checked_keys(keys)

        async def create() -> list[TaskHandle]:
            handles = await self._session.create_tasks(everything, self._relay(informer), options=options, keys=names)
            return [TaskHandle(self._background, handle, informed=informer is not None) for handle in handles]

        return self._background.run(create())

    def map(
        self,
        inputs: Iterable[bytes | str],
        *,
        ordered: bool = True,
        in_flight: int = 1000,
        raise_failed: bool = True,
        cancel_on_exit: bool = True,
        on_progress: Callable[[int, int | None], None] | None = None,
        options: TaskOptions | None = None,
        key: Callable[[bytes | str], str | None] | None = None,
    ) -> BlockingIterator[Task]:
        """Run a task for each input and yield the finished ones, in the inputs' order or as they finish.

        See `flame.Session.map`. Inputs are taken on the thread that asks for results, as it does, so that any number
        of them needs little memory; ``on_progress`` and ``key`` are called there. What iterating over them raises is
        raised there, and ends it. To leave it early, use it as a context manager or call its ``close``.
        """
        run = partial(
            self._session.map,
            ordered=ordered,
            in_flight=in_flight,
            raise_failed=raise_failed,
            cancel_on_exit=cancel_on_exit,
            options=options,
        )
        return Mapping(self._background, run, inputs, in_flight, on_progress, key)

    def stream(self, input: bytes | str, *, options: TaskOptions | None = None, key: str | None = None) -> ChunkStream:
        """Run a task and iterate over what it emits, as it does; see `flame.Session.stream`."""
        return ChunkStream(self._background, lambda: self._session.stream(input, options=options, key=key))

    def open_stream(self, task_id: str) -> ChunkStream:
        """Iterate over what a task of this session emits, from the start; see `flame.Session.open_stream`."""
        return ChunkStream(self._background, lambda: self._session.open_stream(task_id))

    # ---- values instead of bytes

    @overload
    def typed(self, input: Contract[I, O]) -> TypedSession[I, O]: ...
    @overload
    def typed(self, input: type[I], output: type[O]) -> TypedSession[I, O]: ...
    @overload
    def typed(self, input: type[I], output: object) -> TypedSession[I, Any]: ...
    @overload
    def typed(self, input: object, output: type[O]) -> TypedSession[Any, O]: ...
    @overload
    def typed(self, input: object, output: object) -> TypedSession[Any, Any]: ...
    def typed(self, input: Any, output: Any = None) -> TypedSession[Any, Any]:
        """Return this session with values instead of bytes; see `flame.Session.typed`."""
        from flame.sync.typed import TypedSession  # noqa: PLC0415  # for those who use it

        return TypedSession(self, self._session.typed(input, output))

    def typed_as_published(self) -> TypedSession[Any, Any]:
        """Return this session with JSON values; see `flame.Session.typed_as_published`."""
        from flame.sync.typed import TypedSession  # noqa: PLC0415  # for those who use it

        return TypedSession(self, self._background.run(self._session.typed_as_published()))

    def get_task(self, task_id: str) -> Task:
        """Return a task of this session as the cluster knows it now; see `flame.Session.get_task`."""
        return self._background.run(self._session.get_task(task_id))

    def cancel_tasks(self, tasks: Iterable[str], reason: str = "") -> dict[str, TaskState]:
        """Give tasks up by their ids, and return their states; see `flame.Session.cancel_tasks`."""
        return self._background.run(self._session.cancel_tasks(listed(tasks), reason))

    def list_tasks(self, *, after: str = "", limit: int = 100) -> list[Task]:
        """Return tasks of this session as the cluster knows them now; see `flame.Session.list_tasks`."""
        return self._background.run(self._session.list_tasks(after=after, limit=limit))

    def update_common_data(self, data: bytes, *, expected_version: int | None = None) -> int:
        """Give the session other common data and return its version; see `flame.Session.update_common_data`."""
        return self._background.run(self._session.update_common_data(data, expected_version=expected_version))

    def watch(self) -> BlockingIterator[SessionEvent]:
        """Follow what happens to the session, its executors and its tasks from now on; see `flame.Session.watch`."""
        return BlockingIterator(self._background, self._session.watch)

    def close(
        self,
        mode: CloseMode | str = CloseMode.CLOSE,
        *,
        timeout_s: float | None = None,
        on_progress: Callable[[SessionInfo], None] | None = None,
    ) -> None:
        """End the session and return once every task has its record; see `flame.Session.close`.

        ``on_progress`` is called on this thread.
        """
        if on_progress is None:
            self._background.run(self._session.close(mode, timeout_s=timeout_s))
            return
        told: SimpleQueue[SessionInfo | None] = SimpleQueue()
        closing = self._background.begin(self._session.close(mode, timeout_s=timeout_s, on_progress=told.put))
        closing.add_done_callback(lambda _: told.put(None))
        try:
            while (info := told.get()) is not None:
                on_progress(info)
        except BaseException:
            self._background.give_up(closing)
            raise
        self._background.wait(closing)

    def _relay(self, informer: TaskInformer | None) -> TaskInformer | None:
        return None if informer is None else Relay(informer, self._background)


def listed(names: Iterable[str]) -> Iterable[str]:
    """Take what an iterable has on this thread; what is no list of names is refused later."""
    return names if isinstance(names, str | bytes) else list(names)
