"""Time that a test controls: hours pass in milliseconds, timers fire in order, and nothing sleeps for real.

    async with flame.testing.MemoryCluster(clock=VirtualClock()) as cluster:
        ...
        await cluster.clock.advance(3600)

The clock takes over the running loop's time, `time.monotonic`, `time.time` and `time.time_ns`. It doesn't know of
`time.sleep`, `time.perf_counter` and `datetime.datetime.now`, nor of functions that were imported out of `time` before.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import selectors
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, Final, Self, TypeVar
from unittest import mock

from flame.errors import ConfigurationError
from flame.service.threads import Threads

T = TypeVar("T")

LIMIT_S: Final = 3600.0
"""Of virtual time that passes by itself: what waits for ever ends here."""
TURN_S: Final = 1e-6
"""What one turn of the loop takes while time passes by itself: nothing takes no time at all."""
_BEGIN_S: Final = 1_750_000_000.0
"""What the wall clock shows first in `run_virtually`, Unix seconds."""
_TURNS_MOST: Final = 200_000
"""Turns of the loop without waiting for anything: nothing honest takes so many."""
_LOOK_TURNS: Final = 16
"""A loop that doesn't wait looks this seldom for what comes from outside, unless something is expected."""
_PATIENCE_S: Final = 1.0
"""How long something from outside the loop may take, in real time, where everything waits without a timer."""
_BRIEF_S: Final = 0.05
"""A thread that ends within this, in real time, takes no time at all: so the same seed takes the same course."""
_SETTLING_TURNS: Final = 32
"""Turns that follow an `advance`, for what it has set off. A request and its answer take two."""


class Stuck(AssertionError):
    """The program waits for nothing that could come, runs in circles, or waits longer than the clock's limit."""


class VirtualClock:
    """The time of one event loop, moved by a test.

    With ``auto``, the default, time jumps to the next timer whenever everything waits: an ``asyncio.sleep(60)``
    returns at once, 60 seconds later. Without it time stands still but for `advance`. Either can be switched at any
    moment, by setting `auto`.

    By itself time jumps only while nothing real is under way. While something runs in a thread (a service's method
    that is not ``async``, `asyncio.to_thread`) or the loop has a socket or a pipe open, time passes as usual;
    `advance` jumps all the same. What ends in a thread within 50 ms takes no time.

    Example::

        with VirtualClock() as clock:          # in a coroutine; a MemoryCluster does this by itself
            sleeper = asyncio.create_task(asyncio.sleep(60))
            await clock.advance(59)
            assert not sleeper.done()
            await clock.advance(1)
            assert sleeper.done()

    Args:
        auto: Whether time passes by itself where everything waits.
        limit_s: The most time that may pass by itself, counted anew from each `advance`; then the test ends with
            `Stuck`, since it waits for something that doesn't come.
        seed: Makes what is random take the same course every time: ids, back-off, whatever uses `random.random`.
    """

    def __init__(self, *, auto: bool = True, limit_s: float = LIMIT_S, seed: int | None = None) -> None:
        """Touch nothing before `install`."""
        self.auto = auto
        """Whether time passes by itself where everything waits."""
        self.limit_s = limit_s
        self._seed = seed
        self._now = self._began = 0.0
        self._wall = 0.0
        self._until = 0.0
        """To here time may jump, whatever is under way."""
        self._limit_at = 0.0
        self._turns = 0
        self._threads: set[asyncio.Future[Any]] = set()
        """What runs in threads."""
        self._long = 0
        """How many of these are known not to be brief."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._selector: selectors.BaseSelector | None = None
        self._files = 0
        self._select: Callable[[float | None], list[Any]] = lambda _timeout: []
        self._undo = ExitStack()

    # ---- its time

    def time(self) -> float:
        """Return the monotonic time, seconds; that of the loop and of `time.monotonic` while it is installed."""
        return self._now

    @property
    def elapsed(self) -> float:
        """Return how many seconds have passed since it was installed."""
        return self._now - self._began

    async def advance(self, seconds: float) -> None:
        """Let time pass: what falls due happens in order, each at its time, and what follows from it then.

        Returns when the time is there and what it has set off has settled.
        """
        if seconds < 0:
            raise ValueError(f"advance: time can't go back, got {seconds!r} seconds")
        loop = self._loop
        if loop is None or loop is not asyncio.get_running_loop():
            raise ConfigurationError("VirtualClock.advance: the clock is not installed in the running loop")
        target = self._now + seconds
        there = asyncio.Event()
        timer = loop.call_at(target, there.set)
        self._until = max(self._until, target)
        self._limit_at = self._until + self.limit_s
        try:
            await there.wait()
        finally:
            timer.cancel()
            self._until = min(self._until, self._now)
        for _ in range(_SETTLING_TURNS):
            await asyncio.sleep(0)

    # ---- taking a loop over

    def install(self) -> None:
        """Take over the time of the running loop, going on from the present.

        Raises:
            ConfigurationError: The loop is none of asyncio's own (uvloop keeps its time to itself), or another clock is
                installed.
        """
        self._install(asyncio.get_running_loop(), begin=None, wall=time.time())

    def uninstall(self) -> None:
        """Give the loop its own time back. Safe before `install`, and again."""
        global _installed  # noqa: PLW0603  # the clocks that it replaces are global, too
        if self._loop is not None:
            self._undo.close()
            self._loop = self._selector = _installed = None

    def __enter__(self) -> Self:
        """Install it."""
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        """Uninstall it."""
        self.uninstall()

    def _install(self, loop: asyncio.AbstractEventLoop, *, begin: float | None, wall: float) -> None:
        global _installed  # noqa: PLW0603  # see `uninstall`
        selector = getattr(loop, "_selector", None)
        if not isinstance(loop, asyncio.SelectorEventLoop) or not isinstance(selector, selectors.BaseSelector):
            raise ConfigurationError(
                f"VirtualClock: expected one of asyncio's own selector event loops, got {type(loop).__module__}."
                f"{type(loop).__qualname__}, whose time can't be taken over"
            )
        if _installed is not None:
            raise ConfigurationError("VirtualClock: another one is installed; there is one time for all of a process")
        self._now = self._began = self._until = loop.time() if begin is None else begin
        self._limit_at = self._now + self.limit_s
        self._wall = wall
        self._turns = self._long = 0
        self._threads.clear()
        self._loop, self._selector, self._select = loop, selector, selector.select
        self._files = len(selector.get_map() or ())
        _installed = self
        with ExitStack() as undo:
            undo.enter_context(mock.patch.object(loop, "time", self.time))
            undo.enter_context(mock.patch.object(loop, "run_in_executor", self._counting(loop.run_in_executor)))
            undo.enter_context(mock.patch.object(Threads, "begin", self._counting(Threads.begin)))
            undo.enter_context(mock.patch.object(Threads, "wakes_always", True))
            undo.enter_context(mock.patch.object(selector, "select", self._wait))
            undo.enter_context(mock.patch.object(time, "monotonic", self.time))
            undo.enter_context(mock.patch.object(time, "time", self._wall_time))
            undo.enter_context(mock.patch.object(time, "time_ns", self._wall_time_ns))
            if self._seed is not None:
                _seed_chance(undo, self._seed)
            self._undo = undo.pop_all()

    def _wall_time(self) -> float:
        return self._wall + self.elapsed

    def _wall_time_ns(self) -> int:
        return int(self._wall_time() * 1e9)

    def _counting(self, run_in_thread: Callable[..., asyncio.Future[Any]]) -> Callable[..., asyncio.Future[Any]]:
        def run(*arguments: Any) -> asyncio.Future[Any]:
            future = run_in_thread(*arguments)
            self._threads.add(future)
            future.add_done_callback(self._threads.discard)
            return future

        return run

    # ---- waiting

    def _wait(self, timeout: float | None = None) -> list[Any]:
        """Wait as a selector does, by moving time on."""
        waits = timeout is None or timeout > 0
        if self._is_brief():
            events = self._select(_BRIEF_S)
            if events:
                return events
            self._long = self._busy_threads()
            if self.auto:
                self._now += _BRIEF_S
        if waits or self._turns % _LOOK_TURNS == 0 or self._real():
            events = self._select(0)
            if events:
                return events
        if not waits:
            self._turn()
            return []
        self._turns = 0
        if self._now < self._until:
            self._now = self._until if timeout is None else min(self._until, self._now + timeout)
            return []
        if not self.auto:
            return self._select(timeout)
        if self._real():
            began = time.perf_counter()
            events = self._select(timeout)
            self._now += time.perf_counter() - began
            return events
        return self._jump(timeout)

    def _turn(self) -> None:
        self._turns += 1
        if self.auto:
            self._now += TURN_S
        if self._turns > _TURNS_MOST:
            self._turns = 0
            raise Stuck(f"{_TURNS_MOST} turns of the loop without waiting for anything")

    def _jump(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            events = self._select(_PATIENCE_S)
            if not events:
                raise Stuck("everything waits, and no timer runs")
            return events
        self._now += max(timeout, TURN_S)
        if self._now > self._limit_at:
            self._limit_at = self._now + self.limit_s  # for what cleans up after this
            raise Stuck(
                f"{self.limit_s:g} s of virtual time have passed without an end: the test waits for something that"
                " doesn't come (VirtualClock's limit_s)"
            )
        return []

    def _busy_threads(self) -> int:
        return sum(not future.done() for future in self._threads)

    def _is_brief(self) -> bool:
        """Whether something runs in a thread that may end at once, as most of it does."""
        busy = self._busy_threads()
        self._long = min(self._long, busy)
        return busy > self._long

    def _real(self) -> bool:
        """Whether something is under way that takes real time."""
        return self._busy_threads() > 0 or (
            self._selector is not None and len(self._selector.get_map() or ()) > self._files
        )


_installed: VirtualClock | None = None


def _seed_chance(undo: ExitStack, seed: int) -> None:
    """Have all chance go by a seed."""
    chance = random.Random(seed)

    def token(size: int = 32) -> str:
        return chance.randbytes(size).hex()

    undo.enter_context(mock.patch.object(secrets, "token_hex", token))
    undo.enter_context(mock.patch.object(secrets, "randbelow", chance.randrange))
    undo.enter_context(mock.patch.object(secrets, "choice", chance.choice))
    undo.enter_context(mock.patch.object(random, "random", chance.random))


class _Task(asyncio.Task[Any]):
    """A task whose place in a set doesn't depend on where it lies in memory."""

    def __init__(self, number: int, *args: Any, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


def _repeatable_loop() -> asyncio.AbstractEventLoop:
    """Return a loop on which the same program takes the same course every time."""
    loop = asyncio.SelectorEventLoop()
    loop.set_debug(False)  # noting where every callback comes from takes ten times as long as running it
    numbers = itertools.count()
    loop.set_task_factory(lambda loop, coro, **kwargs: _Task(next(numbers), coro, loop=loop, **kwargs))
    return loop


def run_virtually(main: Coroutine[Any, Any, T], *, seed: int = 0, limit_s: float = LIMIT_S) -> T:
    """Run a program in virtual time, in a loop of its own that begins at 0; the same way every time.

    For tests without a plugin for asyncio, and for those that must be repeatable to the last step: tasks are ordered
    by when they were made, and chance goes by ``seed``.

    Raises:
        TimeoutError: It takes longer than ``limit_s`` of virtual time.
        Stuck: It waits for nothing that could come, or runs in circles.
    """

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await main

    clock = VirtualClock(limit_s=float("inf"), seed=seed)
    try:
        with asyncio.Runner(loop_factory=_repeatable_loop) as runner:
            clock._install(runner.get_loop(), begin=0.0, wall=_BEGIN_S)  # noqa: SLF001  # this module's own
            return runner.run(limited())
    finally:
        clock.uninstall()
