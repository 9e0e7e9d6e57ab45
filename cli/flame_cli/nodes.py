"""Nodes: list, view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flame_cli import cluster
from flame_cli.documents import Document
from flame_cli.formats import Format, How
from flame_cli.listing import Kind, show_list
from flame_cli.output import print_document
from flame_cli.rendering import Column, amount_of_bytes, state

if TYPE_CHECKING:
    from flame.protocol.api import NodeInfo

COLUMNS: Final = (
    Column("Name"),
    Column("Hostname", shrink_to=12),
    Column("Status", state=True),
    Column("CPU", right=True),
    Column("Memory", right=True),
    Column("Arch"),
    Column("OS"),
    Column("GPU", right=True, drop=3),
    Column("Used", drop=2),
    Column("Held by", drop=1),
)


def row(info: NodeInfo) -> list[str]:
    """Return a node's cells."""
    return [
        info.name,
        info.hostname,
        state(info.state),
        f"{info.cpu:g}",
        amount_of_bytes(info.memory),
        info.arch,
        info.os,
        str(info.gpu),
        str(info.used),
        held_by(info),
    ]


def serves(info: NodeInfo) -> str:
    """Return whose sessions are served there."""
    return f"attached, for {info.application}" if info.application else "any application"


def held_by(info: NodeInfo) -> str:
    """Return how the node holds executors to what they asked for: their memory, and their processors.

    Of a process that somebody has attached, return for what: it is held to nothing.
    """
    if info.application:
        return serves(info)
    return ",".join(dict.fromkeys(by for by in (info.memory_by, info.cpu_by) if by)) or "-"


def document(info: NodeInfo) -> Document:
    """Return all that is known of a node."""
    return {
        "name": info.name,
        "hostname": info.hostname,
        "state": info.state,
        "cpu": info.cpu,
        "memory": info.memory,
        "gpu": info.gpu,
        "arch": info.arch,
        "os": info.os,
        "serves": serves(info),
        "executors": info.executors,
        "used": info.used,
        "memory_by": info.memory_by,
        "cpu_by": info.cpu_by,
    }


KIND: Final = Kind("nodes", COLUMNS, row, document)


def list_all(endpoint: str | None, how: How) -> None:
    """List every node."""
    show_list(endpoint, how, KIND, lambda connection: connection.list_nodes())


def view(endpoint: str | None, name: str, form: Format) -> None:
    """Show all that is known of a node."""
    print_document(document(cluster.run(endpoint, lambda connection: connection.get_node(name))), form)
