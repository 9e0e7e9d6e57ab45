"""Executors: list, view."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flame_cli import cluster
from flame_cli.documents import Document, at
from flame_cli.formats import Format, How
from flame_cli.listing import Kind, show_list
from flame_cli.output import print_document
from flame_cli.rendering import Column, first_line, state

if TYPE_CHECKING:
    from flame.protocol.records import ExecutorRecord

COLUMNS: Final = (
    Column("ID"),
    Column("State", state=True),
    Column("Session"),
    Column("Node", shrink_to=8),
    Column("Reason", shrink_to=8, drop=1),
)


def row(record: ExecutorRecord) -> list[str]:
    """Return an executor's cells."""
    return [record.id, state(record.state), record.session or "-", record.node, first_line(record.reason) or "-"]


def document(record: ExecutorRecord) -> Document:
    """Return all that is known of an executor."""
    return {
        "id": record.id,
        "state": record.state,
        "application": record.application,
        "session": record.session,
        "node": record.node,
        "pid": record.pid or None,
        "started": record.started,
        "process_started": at(record.process_started),
        "entered": record.entered,
        "idle": record.idle,
        "pending": record.pending,
        "running": record.running,
        "succeeded": record.succeeded,
        "failed": record.failed,
        "cancelled": record.cancelled,
        "clean": record.clean,
        "code": record.code,
        "reason": record.reason,
        "epoch": record.epoch,
        "created": at(record.created),
        "updated": at(record.updated),
    }


KIND: Final = Kind("executors", COLUMNS, row, document)


def list_all(endpoint: str | None, how: How, *, session: str | None = None, node: str | None = None) -> None:
    """List the executors, or those of one session or node."""
    show_list(endpoint, how, KIND, lambda connection: connection.list_executors(session=session, node=node))


def view(endpoint: str | None, executor_id: str, form: Format) -> None:
    """Show all that is known of an executor."""
    print_document(document(cluster.run(endpoint, lambda connection: connection.get_executor(executor_id))), form)
