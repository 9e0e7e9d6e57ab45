"""Threads for user code that is not ``async``."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, ClassVar, Final

NAME: Final = "flame-service"


class _Work:
    """A call, and what came of it."""

    __slots__ = ("awaited", "call", "ended", "error", "future", "result")

    def __init__(self, future: asyncio.Future[Any], call: partial[Any]) -> None:
        self.future = future
        self.call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self.awaited = False
        """The event loop has gone on meanwhile, and is to be woken."""

    def run(self) -> None:
        try:
            self.result = self.call()
        except StopIteration as stop:  # no future can hold it: whoever waited would wait for ever
            name = getattr(self.call.args[0], "__name__", "a service")
            self.error = RuntimeError(f"{name} raised StopIteration")
            self.error.__cause__ = stop
        except BaseException as error:  # noqa: BLE001  # whoever waits has to hear of it
            self.error = error

    def settle(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class Threads:
    """Calls functions in threads, for one event loop. There are as many as were ever busy at once.

    A call costs half of what one by a `concurrent.futures.ThreadPoolExecutor` does, and the end of the process waits
    for none of them.
    """

    wakes_always: ClassVar[bool] = False
    """Whether the loop is woken also of a call that ended before anybody could wait, for virtual time to wait for."""

    def __init__(self) -> None:
        """Start none before there is something to do."""
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._count = 0
        self._idle = 0
        """Threads that have nothing to do and nothing coming."""
        self._lock = threading.Lock()

    def begin(self, function: Callable[..., Any], *arguments: object) -> asyncio.Future[Any]:
        """Call a function in a thread, in a copy of this context, and return what brings its outcome."""
        loop = asyncio.get_running_loop()
        call = partial(contextvars.copy_context().run, function, *arguments)
        work = _Work(loop.create_future(), call)
        with self._lock:
            more = not self._idle
            self._idle -= not more
        self._work.put(work)
        if more:
            self._count += 1
            name = f"{NAME}_{self._count - 1}"
            threading.Thread(target=self._serve, args=(loop,), name=name, daemon=True).start()
        with self._lock:
            work.awaited = not work.ended
        if not work.awaited:  # a thread that is started begins at once
            (loop.call_soon_threadsafe if self.wakes_always else loop.call_soon)(work.settle)
        return work.future

    async def to_end(self, is_cancelled: Callable[[], bool], function: Callable[..., Any], *arguments: object) -> Any:
        """Call a function in a thread and return what it returns. One that is to stop is waited for all the same.

        No other task may run beside it; what it returns or raises then counts for nothing.
        """
        running = self.begin(function, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if is_cancelled():
                await _ended(running)
            raise

    def close(self) -> None:
        """Let the threads end; one that still runs user code is not waited for."""
        for _ in range(self._count):
            self._work.put(None)

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        while (work := self._work.get()) is not None:
            work.run()
            with self._lock:
                self._idle += 1
                work.ended = True
            if work.awaited:
                with suppress(RuntimeError):  # the loop is closed: nobody waits
                    loop.call_soon_threadsafe(work.settle)
            del work


async def _ended(running: asyncio.Future[Any]) -> None:
    """Wait for a thread whose outcome counts for nothing."""
    await asyncio.wait((running,))
    if not running.cancelled() and running.exception() is None and asyncio.iscoroutine(running.result()):
        running.result().close()  # it is never to be begun
