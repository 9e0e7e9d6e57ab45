"""Calling a service's methods, however they are written, and telling what they raised."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import re
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from flame import FlameService, SessionContext, TaskContext, TaskOutput
from flame.errors import ConfigurationError, InvalidArgument
from flame.protocol import defaults
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.codes import ErrorCode
from flame.protocol.messages import ResultRecord, TaskFault
from flame.protocol.states import TaskState
from flame.service.contexts import output_bytes
from flame.service.executor import check_service
from flame.service.handlers import Handlers, fault_of

TASK = TaskContext("session", "task", b"input")
SESSION = SessionContext("session", "application", b"data")
LIMIT_S = 10.0


@pytest.fixture
async def handlers_of() -> AsyncIterator[Callable[..., Handlers]]:
    """Make handlers and let go of their threads afterwards."""
    made: list[Handlers] = []

    def make(service: object, concurrency: int = 1) -> Handlers:
        made.append(Handlers(service))
        return made[-1]

    yield make
    for handlers in made:
        handlers.close()


HandlersOf = Callable[..., Handlers]

# ---- where they run


async def test_an_async_handler_runs_in_the_loop(handlers_of: HandlersOf) -> None:
    class Service:
        async def on_task_invoke(self, context: TaskContext) -> tuple[int, object]:
            return threading.get_ident(), asyncio.get_running_loop()

    assert await handlers_of(Service()).invoke(TASK) == (threading.get_ident(), asyncio.get_running_loop())


async def test_a_sync_handler_runs_in_a_thread_and_the_loop_goes_on(handlers_of: HandlersOf) -> None:
    entered, go = threading.Event(), threading.Event()

    class Service:
        def on_task_invoke(self, context: TaskContext) -> tuple[int, bytes]:
            entered.set()
            assert go.wait(LIMIT_S)
            return threading.get_ident(), context.input

    async with asyncio.timeout(LIMIT_S):
        running = asyncio.ensure_future(handlers_of(Service()).invoke(TASK))
        await asyncio.to_thread(entered.wait)  # the loop turns while user code blocks
        go.set()
        thread, seen = await running
    assert thread != threading.get_ident()
    assert seen == b"input"


async def test_all_sync_methods_of_a_service_that_runs_one_task_at_a_time_share_a_thread(
    handlers_of: HandlersOf,
) -> None:
    seen: list[int] = []

    class Service:
        def on_session_enter(self, context: SessionContext) -> None:
            seen.append(threading.get_ident())

        def on_task_invoke(self, context: TaskContext) -> None:
            seen.append(threading.get_ident())

        def on_session_leave(self) -> None:
            seen.append(threading.get_ident())

    handlers = handlers_of(Service())
    await handlers.enter(SESSION)
    await handlers.invoke(TASK)
    await handlers.invoke(TASK)
    await handlers.leave()
    assert len(seen) == 4
    assert len(set(seen)) == 1


async def test_as_many_sync_handlers_run_at_once_as_the_service_asks_for(handlers_of: HandlersOf) -> None:
    together = threading.Barrier(3)

    class Service:
        def on_task_invoke(self, context: TaskContext) -> int:
            return together.wait(LIMIT_S)

    invoke = handlers_of(Service(), 3).invoke
    assert sorted(await asyncio.gather(*(invoke(TASK) for _ in range(3)))) == [0, 1, 2]


async def test_a_sync_handler_may_return_something_to_await(handlers_of: HandlersOf) -> None:
    class Service:
        def on_task_invoke(self, context: TaskContext) -> Any:
            async def later() -> bytes:
                return context.input

            return later()

    assert await handlers_of(Service()).invoke(TASK) == b"input"


async def test_an_object_that_is_called_and_awaited_is_a_handler(handlers_of: HandlersOf) -> None:
    async def answer(prefix: bytes, context: TaskContext) -> bytes:
        return prefix + context.input

    class Service:
        on_task_invoke = functools.partial(answer, b"> ")

    assert await handlers_of(Service()).invoke(TASK) == b"> input"


async def test_a_handler_in_a_thread_sees_the_context_of_its_task(handlers_of: HandlersOf) -> None:
    seen: contextvars.ContextVar[str] = contextvars.ContextVar("seen")
    seen.set("by the task")

    class Service:
        def on_task_invoke(self, context: TaskContext) -> str:
            return seen.get()

    assert await handlers_of(Service()).invoke(TASK) == "by the task"


async def test_closing_does_not_wait_for_user_code(handlers_of: HandlersOf) -> None:
    entered, go = threading.Event(), threading.Event()

    class Service:
        def on_task_invoke(self, context: TaskContext) -> None:
            entered.set()
            go.wait(LIMIT_S)

    handlers = handlers_of(Service())
    running = asyncio.ensure_future(handlers.invoke(TASK))
    async with asyncio.timeout(LIMIT_S):
        await asyncio.to_thread(entered.wait)
        handlers.close()
        go.set()
        await running


# ---- what a service is


async def test_a_service_need_not_call_its_base_class(handlers_of: HandlersOf) -> None:
    class Service(FlameService):
        def __init__(self) -> None:
            self.seen: list[bytes] = []  # and no super().__init__()

        async def on_task_invoke(self, context: TaskContext) -> TaskOutput:
            self.seen.append(context.input)
            return TaskOutput(context.input)

    handlers = handlers_of(Service())
    await handlers.enter(SESSION)
    assert await handlers.invoke(TASK) == TaskOutput(b"input")
    await handlers.leave()


async def test_a_service_need_not_have_a_base_class_nor_the_methods_it_has_no_use_for(handlers_of: HandlersOf) -> None:
    class Service:
        def on_task_invoke(self, context: TaskContext) -> None: ...

    service = Service()
    check_service(service)
    handlers = handlers_of(service)
    assert await handlers.enter(SESSION) is None
    assert await handlers.invoke(TASK) is None
    assert await handlers.leave() is None


async def test_a_base_class_without_a_handler_fails_each_task(handlers_of: HandlersOf) -> None:
    class Mine(FlameService):
        pass

    with pytest.raises(NotImplementedError, match="Mine has no on_task_invoke"):
        await handlers_of(Mine()).invoke(TASK)


class _Agent(FlameService):
    pass


@pytest.mark.parametrize(
    ("service", "text"),
    [
        (_Agent, "got the class _Agent; pass an instance, _Agent()"),
        (None, "NoneType has no on_task_invoke"),
        (object(), "object has no on_task_invoke"),
        (lambda context: b"", "function has no on_task_invoke"),
    ],
)
def test_what_is_no_service_is_refused_with_the_likely_mistake(service: object, text: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(text)):
        check_service(service)


def test_handlers_of_what_has_no_handler_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="object has no on_task_invoke"):
        Handlers(object())


# ---- what they return

OUTPUTS: list[tuple[object, bytes]] = [
    (None, b""),
    (b"bytes", b"bytes"),
    ("text é", "text é".encode()),
    (bytearray(b"array"), b"array"),
    (memoryview(b"view"), b"view"),
    (TaskOutput(), b""),
    (TaskOutput(b"output"), b"output"),
    (TaskOutput("text"), b"text"),  # type: ignore[arg-type]
    (TaskOutput(None), b""),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("returned", "sent"), OUTPUTS, ids=lambda value: type(value).__name__)
def test_an_output_is_bytes_text_or_nothing(returned: object, sent: bytes) -> None:
    assert output_bytes(returned) == sent
    assert type(output_bytes(returned)) is bytes


@pytest.mark.parametrize(
    "returned",
    [42, {}, [b"x"], object(), True, TaskOutput({})],  # type: ignore[arg-type]
    ids=lambda value: type(value).__name__,
)
def test_any_other_output_is_refused_by_its_type(returned: object) -> None:
    with pytest.raises(InvalidArgument, match=r"on_task_invoke returned \w+: expected TaskOutput, bytes, str or None"):
        output_bytes(returned)


# ---- what they raise


async def _fault_of(handlers: Handlers) -> Any:
    async with asyncio.timeout(LIMIT_S):
        (error,) = await asyncio.gather(handlers.invoke(TASK), return_exceptions=True)
    assert isinstance(error, Exception)
    fault = fault_of(error)
    assert unpack(pack({"v": VERSION, "error": fault.fields()}))["error"] == fault.fields()
    return fault


class AsyncService:
    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error = error

    async def on_task_invoke(self, context: TaskContext) -> None:
        raise self.error()


class SyncService:
    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error = error

    def on_task_invoke(self, context: TaskContext) -> None:
        raise self.error()


BOTH = pytest.mark.parametrize("service", [AsyncService, SyncService])


class Broken(Exception):
    """An exception with no text of its own."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@BOTH
async def test_a_fault_names_what_was_raised_and_where(service: type[Any], handlers_of: HandlersOf) -> None:
    fault = await _fault_of(handlers_of(service(lambda: ValueError("no such city"))))
    assert (fault.code, fault.type, fault.message) == (ErrorCode.TASK_FAILED, "ValueError", "no such city")
    assert "raise self.error()" in fault.traceback
    assert fault.traceback.endswith("ValueError: no such city\n")


@BOTH
async def test_a_traceback_begins_with_user_code(service: type[Any], handlers_of: HandlersOf) -> None:
    fault = await _fault_of(handlers_of(service(lambda: ValueError("x"))))
    files = re.findall(r'File "([^"]+)"', fault.traceback)
    # The first frame is this test's own call of the handler, since nothing of Flame stands before it here.
    assert files
    assert set(files) == {__file__}


@BOTH
async def test_the_type_of_a_users_exception_is_its_full_name(service: type[Any], handlers_of: HandlersOf) -> None:
    fault = await _fault_of(handlers_of(service(lambda: re.error("x"))))
    assert fault.type == "re.error"


@BOTH
async def test_a_text_without_a_utf8_form_is_sent_all_the_same(service: type[Any], handlers_of: HandlersOf) -> None:
    fault = await _fault_of(handlers_of(service(lambda: FileNotFoundError("caf\udce9"))))
    assert fault.message == "caf\\udce9"


@BOTH
async def test_an_exception_whose_text_can_not_be_had_is_a_fault_all_the_same(
    service: type[Any], handlers_of: HandlersOf
) -> None:
    fault = await _fault_of(handlers_of(service(Broken)))
    assert "str() raised RuntimeError" in fault.message
    assert fault.type.endswith("Broken")


@BOTH
async def test_the_end_of_an_iterator_is_a_fault_and_no_endless_wait(
    service: type[Any], handlers_of: HandlersOf
) -> None:
    fault = await _fault_of(handlers_of(service(lambda: StopIteration(3))))
    assert fault.type == "RuntimeError"
    assert "raised StopIteration" in fault.message


@BOTH
async def test_a_very_long_text_loses_its_middle(service: type[Any], handlers_of: HandlersOf) -> None:
    fault = await _fault_of(handlers_of(service(lambda: ValueError("begin" + "x" * 1_000_000 + "end"))))
    assert fault.message.startswith("begin")
    assert fault.message.endswith("end")
    assert len(fault.message) + len(fault.traceback) < 40_000


@BOTH
async def test_the_details_of_an_exception_go_with_it(service: type[Any], handlers_of: HandlersOf) -> None:
    fault = await _fault_of(handlers_of(service(lambda: with_details(b"\0details"))))
    assert fault.details == b"\0details"
    assert TaskFault.from_fields(unpack(pack({"v": VERSION, **fault.fields()}))) == fault
    fault = await _fault_of(handlers_of(service(lambda: with_details(b"x" * 240_000))))
    record = ResultRecord(TaskState.FAILED, error=fault, executor="x" * 64).encode()
    assert 240_000 < len(record) <= defaults.INLINE_LIMIT_BYTES


@BOTH
async def test_details_that_are_too_many_or_none_are_left_out(service: type[Any], handlers_of: HandlersOf) -> None:
    fault = await _fault_of(handlers_of(service(lambda: with_details(b"x" * 262_144))))
    assert fault.details == b""
    assert "its details of 262144 bytes are left out" in fault.message
    for details in ("text", None, 1, b""):
        fault = await _fault_of(handlers_of(service(lambda details=details: with_details(details))))
        assert (fault.details, fault.message) == (b"", "no")

    class Awkward(Exception):
        @property
        def details(self) -> bytes:
            raise RuntimeError("not even that")

    fault = await _fault_of(handlers_of(service(lambda: Awkward("no"))))
    assert (fault.details, fault.message) == (b"", "no")


def with_details(details: object) -> BaseException:
    error = ValueError("no")
    error.details = details  # type: ignore[attr-defined]  # as a service may
    return error


@BOTH
async def test_the_cause_is_told_too(service: type[Any], handlers_of: HandlersOf) -> None:
    def error() -> BaseException:
        outer = ValueError("unknown place")
        outer.__cause__ = KeyError("city")
        return outer

    fault = await _fault_of(handlers_of(service(error)))
    assert "KeyError: 'city'" in fault.traceback
    assert "direct cause" in fault.traceback
