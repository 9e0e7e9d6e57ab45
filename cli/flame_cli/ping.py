"""`flmping`: runs tasks of the built-in application ``flmping`` and measures how long they take."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from flame import Connection, FlameError, ProgressBar, Session, TaskError
from flame_cli import cluster
from flame_cli.errors import CommandFailed, ExitCode, one_line
from flame_cli.output import note
from flame_cli.waiting import all_of, first_of

APPLICATION: Final = "flmping"
IN_FLIGHT: Final = 1000
"""Tasks of one session that wait or run at once, in a measurement."""
CLOSE_LIMIT_S: Final = 10.0
"""How long the end of a session is waited for; it goes on after that."""
_PROGRESS_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class PingOptions:
    """What to run."""

    tasks: int
    """In each session."""
    sessions: int
    payload_bytes: int
    """Of each task's input."""
    measure: bool
    """Keep many tasks in flight and print a summary, rather than one after the other and a line for each."""
    limit_s: float
    """Give up when no task ends for this long."""


@dataclass(slots=True)
class Tally:
    """What has come of the tasks so far."""

    latencies_s: list[float] = field(default_factory=list)
    """Of those that succeeded, from before they were stored until the client had their output."""
    failed: int = 0
    first_failure: str = ""

    @property
    def ended(self) -> int:
        """How many tasks have ended."""
        return len(self.latencies_s) + self.failed

    def fail(self, error: TaskError) -> None:
        """Count a task that ended without an output."""
        self.failed += 1
        self.first_failure = self.first_failure or str(error)


def ping(endpoint: str | None, options: PingOptions, *, program: str) -> None:
    """Run the tasks; raise `CommandFailed` if any of them failed."""
    tally = cluster.run(endpoint, lambda connection: _Ping(connection, options).run(), name=program)
    if tally.failed:
        raise CommandFailed(f"{tally.failed} of {tally.ended} tasks failed; the first: {tally.first_failure}")


def summary(options: PingOptions, tally: Tally, *, ready_s: float, duration_s: float) -> list[str]:
    """Return the lines that sum a measurement up."""
    sessions = "1 session" if options.sessions == 1 else f"{options.sessions} sessions"
    rate = len(tally.latencies_s) / duration_s if duration_s > 0 else 0.0
    return [
        f"tasks: {options.tasks * options.sessions} in {sessions}, {options.payload_bytes} bytes each",
        f"session ready: {ready_s * 1000:.1f} ms",
        f"duration: {duration_s:.3f} s",
        f"succeeded: {len(tally.latencies_s)}",
        f"failed: {tally.failed}",
        f"throughput: {rate:.0f} tasks/s" if rate >= 100 else f"throughput: {rate:.1f} tasks/s",
        f"latency p50: {_milliseconds(percentile(tally.latencies_s, 50))}",
        f"latency p99: {_milliseconds(percentile(tally.latencies_s, 99))}",
    ]


def percentile(values: list[float], percent: float) -> float | None:
    """Return the value that ``percent`` of the values are not above; ``None`` if there are none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.2f} ms"


class _Ping:
    """One run."""

    def __init__(self, connection: Connection, options: PingOptions) -> None:
        self._connection = connection
        self._options = options
        self._payload = bytes(options.payload_bytes)
        self._tally = Tally()

    async def run(self) -> Tally:
        """Open the sessions, run the tasks, close the sessions, and tell."""
        if (await self._connection.info()).nodes == 0:
            raise CommandFailed(
                f"the cluster at {self._connection.endpoint} has no node that is ready: start flame-executor-manager",
                code=ExitCode.UNREACHABLE,
            )
        begin = time.perf_counter()
        async with self._sessions() as sessions:
            # Every service answers once, so that its start is not measured.
            await all_of(session.invoke(self._payload, timeout_s=self._options.limit_s) for session in sessions)
            ready_s = time.perf_counter() - begin
            run = self._measure if self._options.measure else self._one_by_one
            begin = time.perf_counter()
            total = self._options.tasks * self._options.sessions
            with ProgressBar("tasks", total=total, show=None if self._options.measure else False) as bar:
                await first_of(self._watch(bar), all_of(run(session) for session in sessions))
            duration_s = time.perf_counter() - begin
        if self._options.measure:
            for line in summary(self._options, self._tally, ready_s=ready_s, duration_s=duration_s):
                print(line)
        return self._tally

    @asynccontextmanager
    async def _sessions(self) -> AsyncIterator[list[Session]]:
        """Open the sessions and close them in the end, however it comes."""
        sessions: list[Session] = []
        try:
            for _ in range(self._options.sessions):
                sessions.append(await self._connection.create_session(APPLICATION))  # noqa: PERF401 (each counts)
            yield sessions
        finally:
            closing = [session.close(timeout_s=CLOSE_LIMIT_S) for session in sessions]
            for error in await asyncio.gather(*closing, return_exceptions=True):
                if isinstance(error, FlameError):
                    note(f"(a session is not closed yet: {one_line(str(error))})")

    async def _one_by_one(self, session: Session) -> None:
        for _ in range(self._options.tasks):
            await self._invoke(session)

    async def _measure(self, session: Session) -> None:
        """Run the session's tasks with a bounded number of them in flight."""
        left = iter(range(self._options.tasks))

        async def worker() -> None:
            for _ in left:
                await self._invoke(session)

        await all_of(worker() for _ in range(min(IN_FLIGHT, self._options.tasks)))

    async def _invoke(self, session: Session) -> None:
        begin = time.perf_counter()
        try:
            task = await session.invoke(self._payload)
        except TaskError as error:
            self._tally.fail(error)
            line = f"task {error.task.id}  failed: {one_line(str(error))}"
        else:
            latency_s = time.perf_counter() - begin
            self._tally.latencies_s.append(latency_s)
            line = f"task {task.id}  executor {task.executor}  {latency_s * 1000:.2f} ms"
        if not self._options.measure:
            print(line, flush=True)

    async def _watch(self, bar: ProgressBar) -> None:
        """Show progress to a person, and raise when nothing happens any more."""
        seen, since = -1, time.monotonic()
        while True:
            if self._tally.ended != seen:
                seen, since = self._tally.ended, time.monotonic()
            elif time.monotonic() - since > self._options.limit_s:
                raise CommandFailed(f"no task has ended for {self._options.limit_s:g} s, {seen} had before: gave up")
            bar(self._tally.ended)
            await asyncio.sleep(_PROGRESS_S)
