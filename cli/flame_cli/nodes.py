"""Nodes: list."""

from __future__ import annotations

from typing import Final

from flame.protocol.api import NodeInfo
from flame_cli import cluster
from flame_cli.output import print_table
from flame_cli.rendering import Column, amount_of_bytes, state

COLUMNS: Final = (
    Column("Name"),
    Column("Hostname", shrink_to=12),
    Column("Status", state=True),
    Column("CPU", right=True),
    Column("Memory", right=True),
    Column("Arch"),
    Column("OS"),
)


def show_list(endpoint: str | None) -> None:
    """Print every node."""
    print_table(COLUMNS, [_row(info) for info in cluster.run(endpoint, lambda c: c.list_nodes())])


def _row(info: NodeInfo) -> list[str]:
    return [
        info.name,
        info.hostname,
        state(info.state),
        f"{info.cpu:g}",
        amount_of_bytes(info.memory),
        info.arch,
        info.os,
    ]
