"""What turns a fork of a template into an executor: everything that it must not share with its parent and siblings."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterable
from types import FrameType
from typing import Any, Final, NoReturn, TextIO

from flame.cancel import end_tasks
from flame.protocol.forking import ForkOrder, decode_for_template
from flame.service import sockets

FAILED: Final = 1


def leave_template(close: Iterable[int]) -> None:
    """Make a process of its own of one that was just forked. ``close`` are the template's descriptors."""
    os.setsid()
    for descriptor in close:
        os.close(descriptor)
    default_signals()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    atexit._clear()  # noqa: SLF001 (what was registered before the fork is the template's to run)
    _reseed()


def carry_out(order: ForkOrder, stdout: int, stderr: int) -> None:
    """Take on the streams, environment, folder and limits of an executor; raise `OSError` if one is refused."""
    flush_streams()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    for stream in _streams():
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(line_buffering=True)
    for name, value in order.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.chdir(order.folder)
    _limit(order.limits)


def leave_loop(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any] | None) -> None:
    """Forget that this thread runs a loop and a task, those that the template was called from."""
    set_loop, leave_task = asyncio.events._set_running_loop, asyncio.tasks._leave_task  # noqa: SLF001 (for loops' own use)
    set_loop(loop)  # some versions of Python have forgotten it by now
    if task is not None:
        leave_task(loop, task)
    set_loop(None)


async def receive_order(channel: socket.socket, connecting: asyncio.Future[Any]) -> tuple[ForkOrder, list[int]] | None:
    """Wait for the order of this process; ``None`` if none will come, or if ``connecting`` has failed before.

    The descriptors are those of its standard output and error.
    """
    loop = asyncio.get_running_loop()
    with channel:
        readable = loop.create_future()
        loop.add_reader(channel.fileno(), lambda: None if readable.done() else readable.set_result(None))
        try:
            await asyncio.wait((readable, connecting), return_when=asyncio.FIRST_COMPLETED)
            if not readable.done() and connecting.exception() is None:
                await readable
        finally:
            loop.remove_reader(channel.fileno())
        if not readable.done():
            return None
        data, descriptors = sockets.receive(channel)
    order = decode_for_template(data) if data else None
    return (order, descriptors) if isinstance(order, ForkOrder) and len(descriptors) == sockets.STREAMS else None


def run_executor(serve: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Run a coroutine in a loop of its own and end this process with the status that it returns."""
    status = FAILED
    try:
        # As `asyncio.Runner` does it, but for a process that ends right after: nothing has to be closed.
        loop = (loop_factory() or asyncio.new_event_loop)()
        asyncio.set_event_loop(loop)
        status = loop.run_until_complete(_alone(serve))
    except SystemExit as request:
        status = _status_of(request)
    except BaseException:  # noqa: BLE001 (above this is the stack of the template, which must not see it)
        traceback.print_exc()
    finally:
        end_process(status)


async def _alone(serve: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Serve, then end what user code has left running in the loop."""
    try:
        return await serve()
    finally:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await end_tasks(others)
        for task in others:
            if not task.cancelled() and (error := task.exception()) is not None:
                traceback.print_exception(error)
        await asyncio.get_running_loop().shutdown_asyncgens()


def end_process(status: int) -> NoReturn:
    """End this process as the interpreter would, but without going up its stack."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 (waits for threads that are no daemons)
        atexit._run_exitfuncs()  # noqa: SLF001
    except BaseException:  # noqa: BLE001 (as the interpreter does)
        traceback.print_exc()
    finally:
        flush_streams()
        os._exit(status)


def default_signals() -> None:
    """Have every signal do what it does by default, but for those that are ignored."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        handler: Callable[[int, FrameType | None], Any] | int | None = signal.getsignal(number)
        if handler not in (signal.SIG_DFL, signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_DFL)


def flush_streams() -> None:
    """Write out what standard output and error hold back."""
    for stream in _streams():
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last: a signal came while it was written to
            stream.flush()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the fastest event loop that is installed; ``None`` for asyncio's own."""
    try:
        import uvloop  # noqa: PLC0415 (it may be missing)
    except ImportError:
        return None
    return uvloop.new_event_loop


def _limit(limits: dict[int, tuple[int, int]]) -> None:
    if limits:
        import resource  # noqa: PLC0415 (rarely needed)

        for number, limit in limits.items():
            resource.setrlimit(number, limit)


def _reseed() -> None:
    """Give numpy's own generator a new beginning; `random` does that by itself."""
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()


def _status_of(request: SystemExit) -> int:
    """Return the status that an exit asks for, as the interpreter understands it."""
    if request.code is None:
        return 0
    if isinstance(request.code, int):
        return request.code & 0xFF
    print(request.code, file=sys.stderr)  # noqa: T201 (where the interpreter writes it)
    return FAILED


def _streams() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
