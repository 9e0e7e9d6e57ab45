"""Executors: list."""

from __future__ import annotations

from typing import Final

from flame.protocol.records import ExecutorRecord
from flame_cli import cluster
from flame_cli.output import print_table
from flame_cli.rendering import Column, state

COLUMNS: Final = (
    Column("ID"),
    Column("State", state=True),
    Column("Session"),
    Column("Node", shrink_to=8),
)


def show_list(endpoint: str | None) -> None:
    """Print every executor."""
    print_table(COLUMNS, [_row(record) for record in cluster.run(endpoint, lambda c: c.list_executors())])


def _row(record: ExecutorRecord) -> list[str]:
    return [record.id, state(record.state), record.session or "-", record.node]
