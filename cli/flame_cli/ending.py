"""`flmctl close` and `flmctl cancel`: the ends of sessions and of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from flame_cli import cluster
from flame_cli.errors import CommandFailed
from flame_cli.progress import Progress

if TYPE_CHECKING:
    from flame import Connection, SessionInfo

_PAGE: Final = 1000
"""Tasks that are looked at together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """A session to end."""

    session: str
    mode: str
    """See `flame.CloseMode`."""
    wait: bool = False
    """Until every task has its record, telling how far that is."""
    limit_s: float | None = None
    """How long to wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelling:
    """Tasks to give up."""

    session: str
    tasks: Sequence[str] = ()
    """Their ids; none: all that wait or run."""
    reason: str = ""


def close(endpoint: str | None, wanted: Closing) -> None:
    """Ask for a session's end, and wait for it if that is wanted."""
    print(cluster.run(endpoint, lambda connection: _close(connection, wanted)))


async def _close(connection: Connection, wanted: Closing) -> str:
    record = await connection.request_close(wanted.session, wanted.mode)
    if not wanted.wait or record.settled:
        return f"session {record.id} {record.state.value}"
    from flame import TimedOut
    from flame.client.session import Session

    session = Session(connection, record)
    await session.listen()
    with Progress() as progress:
        try:
            await session.close(
                wanted.mode, timeout_s=wanted.limit_s, on_progress=lambda info: progress.tell(how_far(info))
            )
        except TimedOut as error:
            raise CommandFailed(str(error)) from None
    return summary(await connection.get_session(record.id))


def how_far(info: SessionInfo) -> str:
    """Return how much of a session there is still to end."""
    return f"session {info.session.id} {info.session.state.value}: {info.pending} pending, {info.running} running"


def summary(info: SessionInfo) -> str:
    """Return what has become of a session and its tasks."""
    counts = f"{info.succeeded} succeeded, {info.failed} failed, {info.cancelled} cancelled"
    return f"session {info.session.id} {info.session.state.value}: {counts}"


def cancel(endpoint: str | None, wanted: Cancelling) -> None:
    """Give tasks up and print the states that they then have, or how many were cancelled of all."""
    if wanted.tasks:
        cluster.run(endpoint, lambda connection: _cancel_some(connection, wanted))
    else:
        print(cluster.run(endpoint, lambda connection: _cancel_all(connection, wanted)))


async def _cancel_some(connection: Connection, wanted: Cancelling) -> None:
    states = await connection.cancel_tasks(wanted.session, wanted.tasks, wanted.reason)
    for task in dict.fromkeys(wanted.tasks):
        if task in states:
            print(f"task {task} {states[task].value}")
    unknown = [task for task in dict.fromkeys(wanted.tasks) if task not in states]
    if unknown:
        named = ", ".join(repr(task) for task in unknown)
        raise CommandFailed(f"session {wanted.session} has no task {named}, or its result has aged out")


async def _cancel_all(connection: Connection, wanted: Cancelling) -> str:
    """Cancel page after page, so that memory holds no more than that however many tasks there are."""
    cancelled = 0
    after = ""
    with Progress() as progress:
        while True:
            tasks = await connection.list_tasks(wanted.session, after=after, limit=_PAGE)
            unfinished = [task.id for task in tasks if not task.state.terminal]
            states = await connection.cancel_tasks(wanted.session, unfinished, wanted.reason)
            cancelled += sum(state == "cancelled" for state in states.values())
            if len(tasks) < _PAGE:
                break
            after = tasks[-1].id
            progress.tell(f"session {wanted.session}: {_tasks(cancelled)} cancelled")
    return f"session {wanted.session}: {_tasks(cancelled)} cancelled"


def _tasks(count: int) -> str:
    return "1 task" if count == 1 else f"{count} tasks"
