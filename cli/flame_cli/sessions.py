"""Sessions: list, view, create."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from flame_cli import cluster
from flame_cli.documents import Document, at
from flame_cli.formats import Format, How
from flame_cli.listing import Kind, show_list
from flame_cli.output import print_document
from flame_cli.rendering import Column, clock, state

if TYPE_CHECKING:
    from flame import Connection
    from flame.protocol.api import SessionInfo

_ENDING: Final = ("closing", "closed")
COLUMNS: Final = (
    Column("ID"),
    Column("State", state=True),
    Column("App", drop=3),
    Column("Resources", drop=1),
    Column("Priority", right=True, drop=2),
    Column("Pending", right=True),
    Column("Running", right=True),
    Column("Succeed", right=True),
    Column("Failed", right=True),
    Column("Created", drop=4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which sessions to list; by default all, those that have ended included."""

    application: str | None = None
    state: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """All of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A session to create; ``None`` leaves it to the application or the cluster."""

    application: str
    session_id: str | None = None
    common_data: bytes = b""
    priority: int
    resources: str | None = None
    min_instances: int | None = None
    max_instances: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    weight: float | None = None
    idle_timeout_s: float | None = None


def row(info: SessionInfo) -> list[str]:
    """Return a session's cells."""
    record = info.session
    return [
        record.id,
        state(record.state),
        record.application,
        str(record.options.resources),
        str(record.options.priority),
        str(info.pending),
        str(info.running),
        str(info.succeeded),
        str(info.failed),
        clock(record.created),
    ]


def document(info: SessionInfo) -> Document:
    """Return all that is known of a session."""
    record, options = info.session, info.session.options
    return {
        "id": record.id,
        "application": record.application,
        "state": record.state,
        "code": record.code,
        "reason": record.reason,
        "waits_for": info.waits_for,
        "labels": options.labels,
        "priority": options.priority,
        "weight": options.weight,
        "resources": options.resources,
        "min_instances": options.min_instances,
        "max_instances": options.max_instances,
        "idle_timeout_s": options.idle_timeout_s,
        "common_data": bool(record.common_data_key),
        "pending": info.pending,
        "running": info.running,
        "succeeded": info.succeeded,
        "failed": info.failed,
        "cancelled": info.cancelled,
        "created": at(record.created),
        "idle_since": at(record.idle_since),
        "ended": at(record.ended),
        "close_mode": record.close_mode if record.state in _ENDING else None,
        "settled": record.settled,
        "epoch": record.epoch,
        "bind_failures": record.bind_failures,
    }


KIND: Final = Kind("sessions", COLUMNS, row, document)


def list_all(endpoint: str | None, how: How, which: Filter) -> None:
    """List sessions that the cluster knows."""

    async def fetch(connection: Connection) -> list[SessionInfo]:
        return await connection.list_sessions(
            application=which.application, state=which.state, labels=dict(which.labels) or None
        )

    show_list(endpoint, how, KIND, fetch)


def view(endpoint: str | None, session_id: str, form: Format) -> None:
    """Show all that is known of a session."""
    print_document(document(cluster.run(endpoint, lambda connection: connection.get_session(session_id))), form)


def create(endpoint: str | None, wanted: Wanted) -> None:
    """Open a session, which stays open, and print its id."""

    async def command(connection: Connection) -> str:
        session = await connection.create_session(
            wanted.application,
            wanted.common_data,
            session_id=wanted.session_id,
            min_instances=wanted.min_instances,
            max_instances=wanted.max_instances,
            priority=wanted.priority,
            resources=wanted.resources,
            labels=dict(wanted.labels),
            weight=wanted.weight,
            idle_timeout_s=wanted.idle_timeout_s,
        )
        return session.id

    print(cluster.run(endpoint, command))
