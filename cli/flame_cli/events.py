"""`flmctl events`: what happens in the cluster, as it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flame_cli import cluster
from flame_cli.documents import Document, at
from flame_cli.formats import Format
from flame_cli.output import colours_wanted, formatted, note, on_terminal, terminal_width
from flame_cli.rendering import clipped, clock, coloured, first_line, state, visible

if TYPE_CHECKING:
    from flame import ClusterEvent, Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """Which events to show, and in which form."""

    session: str | None = None
    application: str | None = None
    tasks: bool = False
    form: Format = Format.TABLE


def document(event: ClusterEvent) -> Document:
    """Return all that an event says."""
    return {
        "at": at(event.at),
        "noun": event.noun,
        "id": event.id,
        "event": event.event,
        "state": event.state,
        "before": event.before,
        "application": event.application,
        "session": event.session,
        "node": event.node,
        "executor": event.executor,
        "code": event.code,
        "reason": event.reason,
    }


def line(event: ClusterEvent, *, width: int | None = None, colour: bool = False) -> str:
    """Write an event in one line: when, what, its new state and why; cut to ``width`` for a terminal."""
    happened = state(event.event)
    place = " ".join(
        f"{name}={value}"
        for name, value in (("session", event.session), ("node", event.node), ("executor", event.executor))
        if value and value != event.id
    )
    why = first_line(event.reason) or ("no more" if event.event == "waiting" else "")
    reason = f"[{event.code}] {why}" if event.code else why
    before = f"{clock(event.at)}  {event.noun.value:<11}  {visible(event.id)}  "
    after = "  ".join(part for part in (place, visible(reason) if reason else "") if part)
    text = f"{before}{happened}{f'  {after}' if after else ''}"
    if width is not None:
        text = clipped(text, width)
    if colour and text.startswith(before + happened):
        text = f"{before}{coloured(happened)}{text[len(before + happened) :]}"
    return text


def events(endpoint: str | None, followed: Followed) -> None:
    """Print each event when it comes, until Ctrl-C."""
    cluster.run(endpoint, lambda connection: _follow(connection, followed))


async def _follow(connection: Connection, followed: Followed) -> None:
    # Whoever reads a file afterwards must know where events may be missing.
    connection.broker.on_reconnect(lambda: note("(connected again: what happened meanwhile is not shown)"))
    stream = connection.events(session=followed.session, application=followed.application, tasks=followed.tasks)
    async with stream as heard:
        if on_terminal() and followed.form is Format.TABLE:
            note("(listening, Ctrl-C ends)")
        async for event in heard:
            if followed.form is Format.TABLE:
                text = line(event, width=terminal_width() if on_terminal() else None, colour=colours_wanted())
            else:
                text = formatted(document(event), followed.form, compact=True)
            print(text, flush=True)
