"""The event loop behind the synchronous API: one for a process, in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from flame.cancel import end_tasks
from flame.errors import BrokerUnavailable, FlameError, WrongThread
from flame.sync.callbacks import Callbacks

if TYPE_CHECKING:
    from flame.client.connection import Connection

T = TypeVar("T")

NAME: Final = "flame-sync"
STOP_S: Final = 10.0
"""How long an end waits for connections to be closed."""
CALLBACK_S: Final = 2.0
"""How long an end waits for callbacks that are being made."""

_NOT_THERE: Final = object()


class Outstanding(Protocol):
    """A future that is waited for."""

    def lose(self, error: FlameError) -> None:
        """End it: nothing more can be learned."""

    def lose_by_fork(self, error: FlameError) -> None:
        """End it in a process that was forked."""


class Background:
    """A thread with an event loop, in which everything of the synchronous API happens."""

    def __init__(self) -> None:
        """Start it, and return when the loop runs."""
        self.callbacks = Callbacks()
        """Where the program's own functions are called."""
        self.outstanding: set[Outstanding] = set()
        """Tasks whose ends have not been heard of."""
        self._calls: dict[Future[Any], asyncio.Task[Any] | None] = {}
        """What is waited for, and what works on it."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()
        self.silent = False
        """The program has ended: no thread of it is told anything any more, since those that still wait are daemons."""
        self._ended = False
        self._forked = False
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=self._serve, args=(started,), name=NAME, daemon=True)
        self._thread.start()
        self._loop, self._stopping = started.result()

    @property
    def ended(self) -> bool:
        """Whether nothing can be asked or heard any more."""
        return self._ended or self._forked

    # ---- for callers, on their threads

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the background and return what it returns; raises also as `begin`.

        An exception that arrives at the waiting thread, as that of Ctrl-C does, cancels the coroutine and is raised at
        once.
        """
        return self.wait(self.begin(coroutine))

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin a coroutine in the background, to be waited for with `wait`.

        Raises:
            WrongThread: This is the background: it would wait for itself.
            BrokerUnavailable: It has ended, or belongs to the process that this one was forked from.
        """
        future: Future[T] = Future()
        try:
            self.check()
            self._calls[future] = None
            self._loop.call_soon_threadsafe(self._begin, coroutine, future)
        except FlameError:
            coroutine.close()
            raise
        except RuntimeError:  # the loop has just been closed
            self._calls.pop(future, None)
            coroutine.close()
            raise self.gone() from None
        if self._ended and self._calls.pop(future, _NOT_THERE) is not _NOT_THERE:  # nobody will answer
            coroutine.close()
            raise self.gone()
        return future

    def wait(self, future: Future[T]) -> T:
        """Return what a coroutine that was begun returns."""
        try:
            return future.result()
        except BaseException:
            self.give_up(future)  # without effect unless the waiting was interrupted
            raise
        finally:
            del future  # which holds the error, whose traceback holds this frame

    def give_up(self, future: Future[Any]) -> None:
        """Cancel a coroutine that was begun, unless it has ended."""
        task = self._calls.pop(future, None)
        if task is not None:
            self.post(task.cancel)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in the background and return what it returns; raises as `run`."""

        async def called() -> T:
            return function()

        return self.run(called())

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """Have a function called in the background, if that goes on, and don't wait. May be called from anywhere."""
        if not self._forked:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(function, *arguments)

    def check(self) -> None:
        """Raise what `run` would."""
        if self._forked or self._ended:
            raise self.gone()
        if self.is_here():
            raise WrongThread(
                "flame.sync was called from its own background thread, which would wait for itself:"
                " use the asynchronous API in coroutines, or call from another thread"
            )

    def is_here(self) -> bool:
        """Whether this is the background's thread."""
        return threading.current_thread() is self._thread

    def gone(self) -> BrokerUnavailable:
        """Return the error of whoever asks or waits when nothing answers any more."""
        if self._forked:
            return BrokerUnavailable(
                "this was made before the process was forked, and what answers it lives in the parent:"
                " connect again in this process"
            )
        return BrokerUnavailable("flame.sync was closed: connect again")

    def stop(self) -> None:
        """Close every connection and end the thread. Idempotent."""
        if self._forked:
            return
        if self.is_here():
            self.check()
        self.post(self._stopping.set)
        self._thread.join(STOP_S)
        self.callbacks.stop(CALLBACK_S)

    def stop_at_exit(self) -> None:
        """End as `stop` does, but tell nobody."""
        self.silent = True
        self.callbacks.drop()
        self.stop()

    def forget_after_fork(self) -> None:
        """Note that this is another process: the thread is not here, and nothing of the loop may be touched."""
        self._forked = True
        outstanding, self.outstanding = self.outstanding, set()
        for handle in outstanding:
            handle.lose_by_fork(self.gone())

    # ---- in the background

    @property
    def stopping(self) -> bool:
        """Whether the end has begun."""
        return self._stopping.is_set()

    def keep(self, connection: Connection) -> None:
        """Close a connection at the end."""
        self._connections.add(connection)

    def forget(self, connection: Connection) -> None:
        """Drop a connection that was closed."""
        self._connections.discard(connection)

    def _begin(self, coroutine: Coroutine[Any, Any, T], future: Future[T]) -> None:
        if future not in self._calls:  # it was given up
            coroutine.close()
            return
        if self.stopping:
            coroutine.close()
            if self._calls.pop(future, _NOT_THERE) is not _NOT_THERE and not self.silent:
                future.set_exception(self.gone())
            return
        task = self._calls[future] = self._loop.create_task(coroutine)
        task.add_done_callback(partial(self._answer, future))

    def _answer(self, future: Future[T], task: asyncio.Task[T]) -> None:
        error = self.gone() if task.cancelled() else task.exception()
        if self._calls.pop(future, None) is None or self.silent:
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine that ends by itself or with the background."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _serve(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._main(started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)
        finally:
            self._end()

    async def _main(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        started.set_result((loop, stopping))
        await stopping.wait()
        await end_tasks([*self._tasks, *(task for task in self._calls.values() if task is not None)])
        for connection in tuple(self._connections):
            with suppress(FlameError):
                await connection.close()
        await loop.shutdown_asyncgens()  # the default connection is closed by its own

    def _end(self) -> None:
        self._ended = True
        if self.silent:
            return
        for call in tuple(self._calls):
            if self._calls.pop(call, _NOT_THERE) is not _NOT_THERE:
                call.set_exception(self.gone())
        for handle in tuple(self.outstanding):
            handle.lose(self.gone())


class _Process:
    """What a process has of it."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._background: Background | None = None
        self._over = False
        self._left: list[Background] = []
        """Those of the processes before this one: kept, since even their destruction would touch what is shared."""

    def background(self) -> Background:
        current = self._background
        if current is None or current.ended:
            with self._starting:
                current = self._background
                if current is None or current.ended:
                    if self._over:
                        raise BrokerUnavailable("the program ends: nothing more can be asked of a cluster")
                    current = self._background = Background()
        return current

    def close(self) -> None:
        current = self._background
        if current is not None:
            current.stop()
            with self._starting:
                if self._background is current:
                    self._background = None

    def at_exit(self) -> None:
        self._over = True
        if self._background is not None:
            self._background.stop_at_exit()

    def after_fork(self) -> None:
        self._starting = threading.Lock()
        current, self._background = self._background, None
        if current is not None:
            self._left.append(current)
            current.forget_after_fork()


_process = _Process()


def background() -> Background:
    """Return the process's background, started if need be."""
    return _process.background()


def close() -> None:
    """Close every connection that was made with `flame.sync`, and end its threads; the next call starts them anew.

    Sessions stay open in the cluster; what waits for tasks gets an error. A program need not call it: its end does the
    same.
    """
    _process.close()


atexit.register(_process.at_exit)
os.register_at_fork(after_in_child=_process.after_fork)
