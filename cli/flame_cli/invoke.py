"""`flmctl invoke`: one line from nothing to an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from flame import FlameError, TaskError, TaskInformer, TimedOut
from flame.cancel import end_task
from flame_cli import cluster
from flame_cli.errors import CommandFailed, ExitCode, one_line
from flame_cli.output import note, print_bytes

if TYPE_CHECKING:
    from flame import Connection, Session, Task


PATIENCE_S: Final = 3.0
"""After so long it is told if nobody is there to run the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """A task to run."""

    application: str
    input: bytes
    session: str | None = None
    """An open session to run it in; ``None``: one of its own, which ends with it."""
    common_data: bytes = b""
    """Of the session of its own."""
    limit_s: float | None = None
    """How long to wait."""
    verbose: bool = False
    """Tell every change of its state."""


def invoke(endpoint: str | None, invocation: Invocation) -> None:
    """Run the task and print its output as it is, and nothing else, on standard output."""
    print_bytes(cluster.run(endpoint, lambda connection: _invoke(connection, invocation)))


async def _invoke(connection: Connection, invocation: Invocation) -> bytes:
    teller = Teller() if invocation.verbose else None
    async with _session(connection, invocation) as session:
        if teller is not None:
            teller.tell(f"session {session.id} {session.state.value}")
        watch = asyncio.ensure_future(_tell_if_nobody_can_run_it(connection))
        try:
            task = await session.invoke(invocation.input, teller, timeout_s=invocation.limit_s)
        except TaskError as error:
            trace = "" if error.task.error is None or teller is None else error.task.error.traceback
            raise CommandFailed(str(error), trace) from None
        except TimedOut:
            what = "it goes on" if invocation.session else "its session ends as soon as it does"
            raise CommandFailed(
                f"the task of session {session.id} has not ended after {invocation.limit_s:g} s; {what}"
            ) from None
        finally:
            await end_task(watch)
        return task.output


async def _tell_if_nobody_can_run_it(connection: Connection) -> None:
    """Tell whoever waits why they do."""
    await asyncio.sleep(PATIENCE_S)
    with suppress(FlameError):
        if (await connection.info()).nodes == 0:
            note("(the cluster has no node that is ready: the task waits for one)")


@asynccontextmanager
async def _session(connection: Connection, invocation: Invocation) -> AsyncIterator[Session]:
    """Open a session, and ask for its end afterwards, however it comes; or use the one that was named."""
    if invocation.session is not None:
        session = await connection.open_session(invocation.session)
        if session.application != invocation.application:
            raise CommandFailed(
                f"session {session.id} is one of application {session.application}, not of {invocation.application}",
                code=ExitCode.USAGE,
            )
        yield session
        return
    session = await connection.create_session(invocation.application, invocation.common_data)
    try:
        yield session
    finally:
        try:
            await connection.close_session(session.id)
        except FlameError as error:
            note(f"(session {session.id} is not closed: {one_line(str(error))})")


class Teller(TaskInformer):
    """Tells a person on standard error what becomes of a task, and when."""

    def __init__(self) -> None:
        """Begin to count the time."""
        self._begin = time.perf_counter()

    def tell(self, text: str) -> None:
        """Print one line."""
        note(f"{time.perf_counter() - self._begin:8.3f} s  {one_line(text)}")

    def on_update(self, task: Task) -> None:
        """Tell a state."""
        who = f" on executor {task.executor}" if task.executor else ""
        self.tell(f"task {task.id} {task.state.value}{who}")
