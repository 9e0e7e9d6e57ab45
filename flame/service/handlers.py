"""Calling a service's methods, whichever way they are written."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from flame.credentials import HIDDEN, hide
from flame.errors import ConfigurationError, InvalidInput
from flame.protocol import defaults
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import TaskFault
from flame.service.contexts import FlameService, TaskContext
from flame.service.generators import emitting
from flame.service.threads import Threads

Handler = Callable[..., Awaitable[Any]]


class Handlers:
    """A service's methods as coroutines: ``async`` ones as they are, others in a thread of their own."""

    def __init__(self, service: object) -> None:
        """Take the methods of an instance."""
        self._threads = Threads()
        self.on_fork: Callable[[], object] = getattr(service, "on_fork", _nothing_at_once)
        self.enter = self._coroutine(service, "on_session_enter")
        self.invoke = self._coroutine(service, "on_task_invoke", self._in_thread_to_its_end)
        self.leave = self._coroutine(service, "on_session_leave")
        self.common_data_updated = self._coroutine(service, "on_common_data_update")

    def close(self) -> None:
        """Let go of the threads; one that still runs user code is not waited for."""
        self._threads.close()

    def _coroutine(
        self, service: object, name: str, in_thread: Callable[[Callable[..., Any]], Handler] | None = None
    ) -> Handler:
        method = getattr(service, name, None)
        if method is None:
            if name == "on_task_invoke":
                raise ConfigurationError(
                    f"flame.run: {type(service).__name__} has no {name}; expected an instance of a FlameService"
                )
            return _nothing
        if getattr(method, "__func__", None) in _EMPTY:
            return _nothing  # without a thread to do it in
        if in_thread is not None:
            method = emitting(method)
        if inspect.iscoroutinefunction(method):
            coroutine: Handler = method
            return coroutine

        return (in_thread or self._in_thread)(method)

    def _in_thread(self, method: Callable[..., Any]) -> Handler:
        async def call(*arguments: object) -> Any:
            result = await self._threads.begin(method, *arguments)
            return await result if inspect.isawaitable(result) else result

        return call

    def _in_thread_to_its_end(self, method: Callable[..., Any]) -> Handler:
        """Do the same for tasks: of one that is stopped, the thread is waited for. No other task may run beside it."""

        async def call(context: TaskContext) -> Any:
            result = await self._threads.to_end(lambda: context.cancelled, method, context)
            return await result if inspect.isawaitable(result) else result

        return call


_EMPTY = (FlameService.on_session_enter, FlameService.on_session_leave, FlameService.on_common_data_update)


async def _nothing(*_: object) -> None:
    """Stand in for an optional method that a service doesn't have."""


def _nothing_at_once() -> None:
    """Stand in for one that is not ``async``."""


def fault_of(error: BaseException, secrets: Sequence[str] = ()) -> TaskFault:
    """Describe what a service raised: type, message and traceback, without Flame's own frames, and without ``secrets``.

    Those are replaced where they stand as they are, or as ``repr`` shows them: what user code made of one isn't found.
    """
    frames = traceback.TracebackException.from_exception(error)
    _drop_own_frames(frames)
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    code = ErrorCode.TASK_FAILED
    if isinstance(error, InvalidInput):
        code, name = ErrorCode.INVALID_ARGUMENT, InvalidInput.__qualname__
    texts = (hide(text, secrets) for text in (_text_of(error), "".join(frames.format())))
    message, shown = map(_sendable, texts)
    fault = TaskFault(code, message, name, shown)
    _add_details(fault, error, secrets)
    return fault


def _add_details(fault: TaskFault, error: BaseException, secrets: Sequence[str]) -> None:
    """Pass on what an exception tells besides, if its record has room for that."""
    try:
        details = getattr(error, "details", None)
    except Exception:  # noqa: BLE001  # user code, and what it would have told is not needed
        return
    if type(details) is not bytes or not details:
        return
    for secret in secrets:
        details = details.replace(secret.encode(), HIDDEN.encode())
    room = defaults.INLINE_LIMIT_BYTES - _ENVELOPE_BYTES - len(fault.message.encode()) - len(fault.traceback.encode())
    if len(details) <= room:
        fault.details = details
    else:
        fault.message = f"{fault.message}\n(its details of {len(details)} bytes are left out: {room} would fit)"


def _drop_own_frames(frames: traceback.TracebackException) -> None:
    """Let the stack begin with user code: what called it is ours, or between ours and a thread of ours."""
    own = [place for place, frame in enumerate(frames.stack) if frame.filename in _CALLERS]
    del frames.stack[: own[-1] + 1 if own else 0]


_FOLDER = __file__.rpartition("handlers.py")[0]
_CALLERS = {
    f"{_FOLDER}{name}.py" for name in ("executor", "functions", "generators", "handlers", "runs", "threads", "typed")
}
_LIMIT = 16 * 1024
_ENVELOPE_BYTES = 4 * 1024
"""What a failed task's record needs besides the texts and details of its error, generously."""


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:  # noqa: BLE001  # an exception whose text can't be had is reported all the same
        return f"its text can't be had: str() raised {type(second).__name__}"


def _sendable(text: str) -> str:
    """Limit a text in length, and to what has a UTF-8 form: half of a surrogate pair, as in file names, has none."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return (
        text
        if len(text) <= _LIMIT
        else f"{text[: _LIMIT // 2]}\n… {len(text) - _LIMIT} characters …\n{text[-_LIMIT // 2 :]}"
    )
