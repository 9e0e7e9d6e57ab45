"""Functions and objects of a client's own, in the cluster in memory: what they return, raise, wait for and refuse."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

import flame
from flame.calls.call import _UNREAD
from flame.calls.messages import Call, Definitions
from flame.calls.pickling import dump, module_of
from flame.calls.sending import definition_bytes
from flame.errors import MalformedMessage
from flame.protocol.states import SessionState, TaskState
from flame.service.functions import FunctionService
from flame.testing import MemoryCluster, VirtualClock

GLOBAL_LOCK = threading.Lock()
KEPT = ValueError("again")


class Refusal(Exception):
    """Something of this program's own."""

    def __init__(self, value: Any, why: str) -> None:
        super().__init__(value, why)
        self.value = value


class Counter:
    """Counts."""

    unit = "things"

    def __init__(self, start: int, step: int = 1) -> None:
        if start < 0:
            raise ValueError("there can't be fewer than none")
        self.count, self.step = start, step
        self.thread = threading.get_ident()

    def increment(self, by: int | None = None) -> int:
        assert threading.get_ident() == self.thread
        self.count += self.step if by is None else by
        return self.count

    async def later(self) -> int:
        await asyncio.sleep(0)
        return self.count

    def fail(self) -> None:
        raise Refusal(self.count, "no more")


class Blocking:
    """Has no coroutine: it lives in one thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def same_thread(self) -> bool:
        return threading.get_ident() == self.thread


def square(x: int) -> int:
    return x * x


async def add(a: int, b: int, *, scale: int = 1) -> int:
    await asyncio.sleep(0)
    return (a + b) * scale


def total(values: dict[str, Any]) -> int:
    first, *others = values["numbers"]
    return int(first + sum(others) + values["nested"][0]["x"])


def refuse(value: Any) -> None:
    raise Refusal(value, "not this")


def raise_again() -> None:
    raise KEPT


def uses_a_lock() -> None:
    with GLOBAL_LOCK:
        pass


def calls_what_uses_a_lock() -> None:
    uses_a_lock()


@pytest_asyncio.fixture
async def cluster() -> AsyncIterator[MemoryCluster]:
    async with MemoryCluster() as made:
        yield made


@pytest_asyncio.fixture
async def fs(cluster: MemoryCluster) -> AsyncIterator[flame.FunctionSession]:
    async with flame.functions(max_instances=1, labels={"of": "tests"}) as opened:
        yield opened


# ---- calls


async def test_functions_and_coroutines_are_called(fs: flame.FunctionSession) -> None:
    call = fs.function(square)(3)
    assert (call.done(), call.task_id) == (False, "")
    assert await call == 9
    assert call.done()
    assert (await fs.session.get_task(call.task_id)).state is TaskState.SUCCEED
    assert await fs.function(add)(1, 2, scale=4) == 12
    assert await fs.function(functools.partial(add, b=1))(1) == 2
    assert await fs.function(lambda: "λ")() == "λ"
    assert fs.session.application == "flmfunc"
    assert "square" in repr(call)
    assert call.task_id in repr(call)


async def test_calls_are_made_in_their_order_without_being_awaited(fs: flame.FunctionSession) -> None:
    seen = await fs.create(Counter, 0)
    for _ in range(50):
        seen.increment()
    assert await seen.increment() == 51
    later = [fs.function(square)(n) for n in range(100)]
    assert [await call for call in later] == [n * n for n in range(100)]


async def test_results_are_arguments_wherever_they_are(fs: flame.FunctionSession) -> None:
    sq = fs.function(square)
    assert await sq(sq(sq(2))) == 256
    two = sq(2)
    assert await fs.function(add)(two, two, scale=sq(3)) == 72
    values = {"numbers": [sq(1), sq(2), 3], "nested": ({"x": sq(sq(2))},)}
    assert await fs.function(total)(values) == 24
    assert await fs.function(lambda pair: pair[0] is pair[1])([two, two])  # one value, twice


async def test_arguments_are_what_they_were_at_the_call(fs: flame.FunctionSession) -> None:
    numbers = [1, 2]
    call = fs.function(sum)(numbers)
    numbers.append(3)
    assert await call == 3


async def test_values_of_other_sessions_are_brought_by_the_client(fs: flame.FunctionSession) -> None:
    counter = await fs.create(Counter, fs.function(square)(3), step=2)
    assert await fs.function(square)(counter.increment()) == 121
    assert await counter.increment(fs.function(square)(2)) == 15
    async with flame.functions() as other:
        assert await other.function(add)(counter.increment(), 1) == 18


async def test_a_failure_has_its_exception_as_its_cause(fs: flame.FunctionSession) -> None:
    for function in (refuse, fs.function(refuse).function):
        with pytest.raises(flame.TaskFailed, match=r"Refusal: .*not this") as raised:
            await fs.function(function)(7)
        cause = raised.value.__cause__
        assert isinstance(cause, Refusal)
        assert cause.value == 7
        error = raised.value.task.error
        assert error is not None
        assert error.type.endswith("Refusal")
        assert "in refuse" in error.traceback
        assert "flame/service" not in error.traceback


async def test_a_function_that_would_end_its_executor_fails(fs: flame.FunctionSession) -> None:
    async def leave() -> None:
        sys.exit("enough")

    for function in (sys.exit, leave):
        with pytest.raises(flame.TaskFailed, match=r"sys.exit\(.*\) was called"):
            await fs.function(function)()


async def test_what_needs_a_failed_call_is_not_made_and_fails_like_it(fs: flame.FunctionSession) -> None:
    failing = fs.function(refuse)(1)
    first = fs.function(square)(failing)
    second = fs.function(add)(fs.function(square)(2), first)
    for call in (first, second, second):
        with pytest.raises(flame.TaskFailed, match="not this") as raised:
            await call
        assert isinstance(raised.value.__cause__, Refusal)
        assert raised.value.task.id == failing.task_id
        assert call.task_id == ""
        assert call.done()
    assert len(await fs.session.list_tasks()) == 2


async def test_cancelling_reaches_what_waits_for_it(fs: flame.FunctionSession) -> None:
    slow = fs.function(asyncio.sleep)(3600)
    waiting = fs.function(square)(slow)
    after = fs.function(square)(waiting)
    await fs.function(square)(1).cancel()  # those before it are submitted by then
    assert await waiting.cancel("not needed") is TaskState.CANCELLED
    with pytest.raises(flame.TaskCancelled, match="not needed"):
        await after
    assert await slow.cancel("enough") is TaskState.CANCELLED
    with pytest.raises(flame.TaskCancelled, match="enough"):
        await slow
    assert await slow.cancel() is TaskState.CANCELLED
    call = fs.function(square)(2)
    assert [await call.cancel() for _ in range(2)] == [TaskState.CANCELLED] * 2  # it was not sent yet
    with pytest.raises(flame.TaskCancelled):
        await call


async def test_cancelling_the_wait_leaves_the_call_alone(fs: flame.FunctionSession) -> None:
    call = fs.function(add)(1, 1)
    for _ in range(2):
        wait = asyncio.ensure_future(_waited(call))
        await asyncio.sleep(0)
        wait.cancel()
        await asyncio.gather(wait, return_exceptions=True)
    assert list(await asyncio.gather(_waited(call), _waited(call))) == [2, 2]


async def listed(values: AsyncIterator[Any]) -> list[Any]:
    return [value async for value in values]


async def _waited(call: flame.FunctionCall[Any]) -> Any:
    return await call


async def test_options_are_those_of_its_tasks(fs: flame.FunctionSession) -> None:
    @fs.function(options=flame.TaskOptions(timeout_s=0.05))
    async def slow() -> None:
        await asyncio.sleep(3600)

    with pytest.raises(flame.TaskTimeout):
        await slow()


async def test_a_function_may_look_at_its_task(fs: flame.FunctionSession) -> None:
    async def keep() -> str:
        task = flame.current_task()
        await task.state.put("key", "value")
        return task.task_id

    def look() -> Any:
        return flame.current_task().state.sync.get("key")

    call = fs.function(keep)()
    assert await call == call.task_id
    assert await fs.function(look)() == "value"
    with pytest.raises(flame.ConfigurationError, match="no function"):
        flame.current_task()


async def test_functions_call_one_another_as_plain_functions(fs: flame.FunctionSession) -> None:
    @fs.function
    def twice(x: int) -> int:
        return 2 * x if x > 100 else twice(101)  # type: ignore[return-value]  # a plain call there

    @fs.function
    def outer(x: int) -> Any:
        return twice(x)

    assert await outer(1) == 202


# ---- many


async def test_map_yields_values_in_order_or_as_they_come(fs: flame.FunctionSession) -> None:
    sq = fs.function(square)
    seen: list[tuple[int, int | None]] = []
    in_order = await listed(fs.map(sq, range(30), in_flight=4, on_progress=lambda *step: seen.append(step)))
    assert in_order == [n * n for n in range(30)]
    assert seen[-1] == (30, 30)
    assert sorted(await listed(fs.map(sq, range(30), ordered=False))) == [n * n for n in range(30)]

    async def inputs() -> AsyncIterator[Any]:
        yield 2
        yield sq(2)

    assert [v async for v in fs.map(sq, inputs())] == [4, 16]


async def test_map_raises_or_yields_what_failed(fs: flame.FunctionSession) -> None:
    def picky(x: int) -> int:
        if x == 3:
            raise Refusal(x, "not three")
        return x

    with pytest.raises(flame.TaskFailed, match="not three") as raised:
        await listed(fs.map(fs.function(picky), range(10)))
    assert isinstance(raised.value.__cause__, Refusal)
    outcomes = [v async for v in fs.map(fs.function(picky), range(5), raise_failed=False)]
    assert outcomes[:3] == [0, 1, 2]
    assert isinstance(outcomes[3], flame.TaskFailed)
    assert outcomes[4] == 4


async def test_time_is_virtual_for_functions_too() -> None:
    clock = VirtualClock()
    async with MemoryCluster(clock=clock), flame.functions() as fs:
        before = clock.elapsed
        await fs.function(time.sleep)(0.1)
        await fs.function(asyncio.sleep)(300)
        assert 300 <= clock.elapsed - before < 330


# ---- objects


async def test_an_object_keeps_its_state(fs: flame.FunctionSession) -> None:
    counter = await fs.create(Counter, 10, step=5)
    assert await counter.increment() == 15
    assert await counter.increment(by=2) == 17
    assert await counter.later() == 17
    with pytest.raises(flame.TaskFailed, match="no more") as raised:
        await counter.fail()
    assert isinstance(raised.value.__cause__, Refusal)
    assert raised.value.__cause__.value == 17
    other = await fs.create(Counter, 0)
    assert [await other.increment(), await counter.increment()] == [1, 22]
    assert await (await fs.create(Blocking)).same_thread()
    await fs.release(other)
    await fs.release(other)
    with pytest.raises(flame.SessionNotOpen, match="closed: create another"):
        other.increment()
    with pytest.raises(flame.InvalidArgument, match="expected an Instance, got int"):
        await fs.release(5)  # type: ignore[arg-type]  # that is the point


async def test_what_its_constructor_raises_its_calls_raise(fs: flame.FunctionSession) -> None:
    counter = await fs.create(Counter, -1)
    for _ in range(2):
        with pytest.raises(flame.TaskFailed, match="fewer than none") as raised:
            await counter.increment()
        assert isinstance(raised.value.__cause__, ValueError)


async def test_a_lost_object_is_made_anew_and_nobody_is_deceived(
    cluster: MemoryCluster, fs: flame.FunctionSession
) -> None:
    counter = await fs.create(Counter, 10)
    assert await counter.increment() == 11
    [executor] = cluster.executors
    cluster.kill_executor(executor)
    calls = [counter.increment() for _ in range(3)]
    for call in calls:
        with pytest.raises(flame.InstanceLost, match="was lost with its executor"):
            await call
    assert await counter.increment() == 11
    assert await counter.increment() == 12


async def test_an_object_that_was_lost_before_it_was_used_is_not_missed(
    cluster: MemoryCluster, fs: flame.FunctionSession
) -> None:
    async with cluster.events() as events:
        counter = await fs.create(Counter, 10)
        await events.expect(noun="executor", state="bound", within_s=60)
    cluster.kill_executor(cluster.executors[0])
    assert await counter.increment() == 11


async def test_arguments_of_its_constructor_are_not_loaded_here(fs: flame.FunctionSession) -> None:
    call = fs.function(square)(2)
    counter = await fs.create(Counter, call)
    assert await counter.increment() == 5
    assert call._value is _UNREAD
    with pytest.raises(flame.TaskFailed, match="not this"):
        await fs.create(Counter, fs.function(refuse)(1))


# ---- the end


async def test_closing_can_be_tried_again(cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unavailable(*_: object) -> None:
        raise flame.SchedulerUnavailable("not now")

    fs = await cluster.connection.functions()
    await fs.create(Counter, 0)
    with monkeypatch.context() as patch:
        patch.setattr(cluster.connection, "request_close", unavailable)
        with pytest.raises(flame.SchedulerUnavailable):
            await fs.close()
    with pytest.raises(flame.SessionNotOpen):
        fs.function(square)(1)
    await asyncio.gather(fs.close(), fs.close())
    await fs.close()
    sessions = [info.session for info in await cluster.connection.list_sessions()]
    assert [session.state for session in sessions] == [SessionState.CLOSED] * 2


async def test_an_object_that_is_made_during_the_closing_is_closed(cluster: MemoryCluster) -> None:
    fs = await cluster.connection.functions()
    creating = asyncio.ensure_future(fs.create(Counter, fs.function(asyncio.sleep)(0.1, 5)))
    await asyncio.sleep(0)
    await fs.close()
    with pytest.raises(flame.SessionNotOpen, match="was closed"):
        await creating
    sessions = [info.session for info in await cluster.connection.list_sessions()]
    assert {session.state for session in sessions} == {SessionState.CLOSED}


async def test_an_object_may_be_released_twice_at_once(fs: flame.FunctionSession) -> None:
    counter = await fs.create(Counter, 0)
    await asyncio.gather(fs.release(counter), fs.release(counter))


async def test_idle_means_that_nothing_waits(fs: flame.FunctionSession) -> None:
    slow = fs.function(asyncio.sleep)(3600)
    waiting = [fs.function(square)(slow) for _ in range(3)]
    caller = fs.caller()
    idle = [asyncio.ensure_future(caller.idle()) for _ in range(2)]
    await waiting[0].cancel()
    await asyncio.sleep(0.05)
    assert caller.busy
    assert not any(each.done() for each in idle)
    await slow.cancel()
    await asyncio.wait_for(asyncio.gather(*idle), 10)
    await asyncio.wait_for(caller.idle(), 10)


async def test_leaving_waits_for_every_call(cluster: MemoryCluster) -> None:
    async with flame.functions() as fs:
        counter = await fs.create(Counter, 0)
        calls = [fs.function(add)(counter.increment(), n) for n in range(5)]
        last = counter.increment(calls[-1])
    assert [await call for call in calls] == [1, 3, 5, 7, 9]
    assert await last == 14
    sessions = [info.session for info in await cluster.connection.list_sessions()]
    assert {session.state for session in sessions} == {SessionState.CLOSED}
    assert len(sessions) == 2
    function = fs.function(square)
    with pytest.raises(flame.SessionNotOpen, match="was closed"):
        function(1)
    await fs.close()


async def test_leaving_by_an_exception_makes_no_more_calls(cluster: MemoryCluster) -> None:
    async def leave() -> None:
        async with flame.functions() as fs:
            calls.append(fs.function(square)(fs.function(asyncio.sleep)(3600)))
            await fs.function(square)(1)
            raise KeyError

    calls: list[flame.FunctionCall[int]] = []
    with pytest.raises(KeyError):
        await leave()
    with pytest.raises(flame.SessionNotOpen, match="before the call was made"):
        await calls[0]


async def test_it_may_be_opened_without_a_context(cluster: MemoryCluster) -> None:
    fs = await cluster.connection.functions(session_id="of-mine", priority=1)
    assert fs.session.id == "of-mine"
    assert await fs.function(square)(2) == 4
    await fs.close()
    with pytest.raises(flame.ConfigurationError, match="opened before"):
        await fs
    with pytest.raises(flame.ConfigurationError, match="not opened yet"):
        flame.functions().function(square)(1)


# ---- what can't be sent


def test_calls_of_another_event_loop_are_refused() -> None:
    async def made() -> flame.FunctionCall[int]:
        async with MemoryCluster(), flame.functions() as fs:
            return fs.function(square)(2)

    async def passed_on(call: flame.FunctionCall[int]) -> None:
        async with MemoryCluster(), flame.functions() as fs:
            with pytest.raises(flame.WrongThread, match="another event loop"):
                fs.function(square)(call)
            with pytest.raises(flame.WrongThread, match="another event loop"):
                await fs.create(Counter, call)
            assert await fs.function(square)(3) == 9

    asyncio.run(passed_on(asyncio.run(made())))


async def test_what_can_not_be_begun_is_not_waited_for(
    fs: flame.FunctionSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(_: object) -> None:
        raise RuntimeError("Event loop is closed")

    call = fs.function(asyncio.sleep)(0)
    with monkeypatch.context() as patch:
        patch.setattr(flame.FunctionCall, "ended", closed)
        with pytest.raises(RuntimeError, match="is closed"):
            fs.function(square)(call)
    await asyncio.wait_for(fs.caller().idle(), 10)


async def test_what_can_not_be_sent_is_named(fs: flame.FunctionSession) -> None:
    lock = threading.Lock()

    def closes_over() -> None:
        with lock:
            pass

    class Holder:
        member = lock

    def wants(x: Any = lock) -> None: ...

    held: Any = functools.partial(refuse, lock)

    cases: list[tuple[Any, str]] = [
        (fs.function(uses_a_lock), r"function uses_a_lock can't be sent: the global 'GLOBAL_LOCK' \(lock\)"),
        (fs.function(calls_what_uses_a_lock), r"in the global 'uses_a_lock', the global 'GLOBAL_LOCK'"),
        (fs.function(closes_over), r"the variable 'lock' \(lock\) can't be pickled"),
        (fs.function(wants), "a default of its arguments"),
        (fs.function(held), "argument 1 of its partial"),
        (lambda: fs.function(square)(lock), r"call of square: argument 1 \(lock\) can't be pickled"),
        (lambda: fs.function(add)(1, b=[lock]), r"argument 'b' \(list\)"),
        (fs.function(lambda: fs), "FunctionSession can't be sent"),
    ]
    for act, says in cases:
        with pytest.raises(flame.Unpicklable, match=says):
            act()
    with pytest.raises(flame.Unpicklable, match=r"class .*Holder can't be sent: its member 'member' \(lock\)"):
        await fs.create(Holder)
    call = fs.function(square)(1)
    with pytest.raises(flame.Unpicklable, match="pass it to the function as an argument"):
        fs.function(lambda: call)()
    with pytest.raises(flame.TaskFailed, match="returned lock, which can't be pickled"):
        await fs.function(threading.Lock)()
    assert await call == 1


async def test_what_can_not_be_loaded_is_named(cluster: MemoryCluster, fs: flame.FunctionSession) -> None:
    broken = Call("gone", fs.function(square).prepare(fs.caller(), (1,), {}).message.function, b"cno_such\nthing\n.")
    await fs.function(square)(1)
    with pytest.raises(flame.TaskFailed, match=r"arguments of gone can't be loaded.*register_pickle_by_value.no_such"):
        await fs.session.invoke(broken.encode())
    unknown = Call("nobody", b"x" * 16, b"")
    with pytest.raises(flame.TaskFailed, match="nobody is no function of this session"):
        await fs.session.invoke(unknown.encode())


async def test_an_executor_reads_a_few_arguments_at_once() -> None:
    class Context:
        now = most = 0

        async def output_of(self, _: str) -> bytes:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0)
            self.now -= 1
            return dump(7)

    context: Any = Context()
    assert await FunctionService()._values(context, ["task"] * 100) == [7] * 100
    assert context.most == 16


async def test_an_exception_that_is_raised_again_says_the_same(fs: flame.FunctionSession) -> None:
    sizes = set()
    for _ in range(3):
        with pytest.raises(flame.TaskFailed, match="again") as raised:
            await fs.function(raise_again)()
        error = raised.value.task.error
        assert error is not None
        sizes.add(len(error.details))
    assert 0 < max(sizes) < min(sizes) + 10, "it does not contain what was told before"


def test_definitions_are_read_as_they_are_written() -> None:
    assert Definitions.decode(b"") == Definitions()
    instance = Call("Counter", b"class", b"arguments", ["id", b"value"], 3)
    assert Definitions.decode(Definitions({b"a": b"b"}, instance).encode()) == Definitions({b"a": b"b"}, instance)
    with pytest.raises(MalformedMessage, match="references: expected list, got int"):
        Call.decode(b"\x82\xa1v\x01\xaareferences\x05")


def test_only_a_programs_own_modules_travel() -> None:
    assert module_of(square) == __name__
    assert module_of(functools.partial(square, 1)) == __name__
    for installed in (asyncio.sleep, sum, pytest.raises, flame.connect, functools.partial(max, 1)):
        assert module_of(installed) == ""
    assert definition_bytes(square, "function", [__name__]) == definition_bytes(square, "function", [__name__])


def test_whoever_does_not_use_it_does_not_load_it() -> None:
    script = (
        "import sys\n"
        "import flame, flame.sync\n"
        "flame.connect, flame.Session, flame.run, flame.functions\n"
        "assert 'cloudpickle' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
