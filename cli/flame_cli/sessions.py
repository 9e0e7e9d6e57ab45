"""Sessions: list, close."""

from __future__ import annotations

from typing import Final

from flame.protocol.api import SessionInfo
from flame_cli import cluster
from flame_cli.output import print_table
from flame_cli.rendering import Column, clock, state

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


def show_list(endpoint: str | None) -> None:
    """Print every session that the cluster knows, those that have ended included."""
    print_table(COLUMNS, [_row(info) for info in cluster.run(endpoint, lambda c: c.list_sessions())])


def close(endpoint: str | None, session_id: str) -> None:
    """Ask for a session's end: running tasks finish, waiting ones are cancelled."""
    record = cluster.run(endpoint, lambda connection: connection.request_close(session_id))
    print(f"session {record.id} {record.state.value}")


def _row(info: SessionInfo) -> list[str]:
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
