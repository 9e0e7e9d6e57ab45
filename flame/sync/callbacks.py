"""The thread on which a program's own functions are called: informers, and what is to be called at a task's end."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final

from flame.client.task import Task, TaskInformer
from flame.errors import WrongThread
from flame.logs import get_logger
from flame.protocol.progress import Progress

if TYPE_CHECKING:
    from flame.sync.background import Background

log = get_logger("flame.sync")

NAME: Final = "flame-sync-callbacks"


class Callbacks:
    """Calls functions one after another, in the order they were given, on a thread that starts with the first."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._dropping = False

    def put(self, call: Callable[[], object]) -> None:
        """Have a function called. What it raises is logged."""
        if self._dropping:
            return
        self._calls.put(call)
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._serve, name=NAME, daemon=True)
                    self._thread.start()

    def drain(self) -> None:
        """Wait until everything that was put so far has been called."""
        done: Future[None] = Future()
        self.put(partial(done.set_result, None))
        if not self._dropping:
            done.result()

    def check_elsewhere(self, what: str) -> None:
        """Raise `WrongThread` on this very thread: ``what`` would wait for calls that it is to make itself."""
        if threading.current_thread() is self._thread:
            raise WrongThread(
                f"{what} waits for calls of an informer, and all of those are made on the thread {NAME!r}, from which"
                " this was asked: create the task without an informer, or ask from another thread"
            )

    def drop(self) -> None:
        """Call nothing more."""
        self._dropping = True

    def stop(self, timeout_s: float) -> None:
        """End the thread after what was put so far; wait for that for a limited time."""
        thread = self._thread
        if thread is not None:
            self._calls.put(None)
            if thread is not threading.current_thread():
                thread.join(timeout_s)
        self._dropping = True

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._dropping:
                continue
            try:
                call()
            except Exception:  # it is the program's, and others wait for their turn
                log.exception("a callback raised")


class Relay(TaskInformer):
    """Passes what an informer is to hear on to the thread of callbacks. Its ``async`` methods run in the background."""

    def __init__(self, informer: TaskInformer, background: Background) -> None:
        """Wrap an informer."""
        self._informer = informer
        self._background = background

    def on_update(self, task: Task) -> None:
        """Pass a state on."""
        self._background.callbacks.put(partial(self._call, partial(self._informer.on_update, task)))

    def on_progress(self, task: Task, progress: Progress) -> None:
        """Pass a progress on."""
        self._background.callbacks.put(partial(self._call, partial(self._informer.on_progress, task, progress)))

    def on_error(self) -> None:
        """Pass an error on."""
        self._background.callbacks.put(partial(self._call, self._informer.on_error))

    def _call(self, method: Callable[[], Awaitable[None] | None]) -> None:
        result = method()
        if inspect.isawaitable(result):
            self._background.run(_awaited(result))


async def _awaited(result: Awaitable[None]) -> None:
    await result
