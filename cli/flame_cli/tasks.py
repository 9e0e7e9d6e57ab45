"""Tasks of a session: list, view."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Final

from flame_cli import cluster
from flame_cli.documents import Document, at, output_fields, text_of
from flame_cli.errors import one_line
from flame_cli.fields import block
from flame_cli.formats import Format
from flame_cli.listing import Kind
from flame_cli.output import formatted, note, on_terminal, print_document, print_lines, print_table
from flame_cli.rendering import Column, clipped, clock, state

if TYPE_CHECKING:
    from flame import Connection, Session, Task, TaskFault

PREVIEW: Final = 60
"""Characters of an output or error in a list."""
LINES: Final = 40
"""Of an output or a traceback, in a terminal."""
COLUMNS: Final = (
    Column("ID"),
    Column("State", state=True),
    Column("Started", drop=2),
    Column("Took", right=True, drop=3),
    Column("Executor", drop=1),
    Column("Output", shrink_to=8),
)


def row(task: Task) -> list[str]:
    """Return a task's cells."""
    return [
        task.id,
        state(task.state),
        clock(task.started) if task.started else "-",
        took(task.started, task.finished),
        task.executor or "-",
        preview(task),
    ]


def document(task: Task) -> Document:
    """Return all that is known of a task."""
    return {
        "id": task.id,
        "session": task.session_id,
        "application": task.application,
        "state": task.state,
        "executor": task.executor,
        "attempt": task.attempt,
        "chunks": task.chunks,
        "started": at(task.started),
        "finished": at(task.finished),
        "output_size": task.output_size or len(task.output),
        **output_fields(task.output),
        "error": None if task.error is None else _error(task.error),
    }


KIND: Final = Kind("tasks", COLUMNS, row, document)


def took(started: float, finished: float) -> str:
    """Write how long a run took."""
    if not started or not finished:
        return "-"
    seconds = max(0.0, finished - started)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def preview(task: Task) -> str:
    """Return the beginning of what came of a task, in one line."""
    text = text_of(task.output) if task.error is None else failure(task.error)
    if text is None or task.output_size > len(task.output):
        return f"({task.output_size or len(task.output)} bytes)"
    return clipped(" ".join(text[: 4 * PREVIEW].split()), PREVIEW) or "-"


def failure(fault: TaskFault) -> str:
    """Return why a task failed, in one line."""
    return one_line(f"{fault.type}: {fault.message}" if fault.type else fault.message)


def view_all(endpoint: str | None, session_id: str, form: Format, *, limit: int) -> None:
    """List a session's tasks, the oldest first; not more than ``limit``."""
    tasks = cluster.run(endpoint, lambda connection: connection.list_tasks(session_id, limit=limit + 1))
    more, tasks = len(tasks) > limit, tasks[:limit]
    if form is Format.TABLE:
        print_table(COLUMNS, KIND.rows(tasks))
    else:
        print(formatted(KIND.documents(tasks), form))
    if more:
        note(f"(the first {limit} tasks; --limit shows more)")


def view(endpoint: str | None, session_id: str, task_id: str, form: Format) -> None:
    """Show all that is known of a task."""

    async def command(connection: Connection) -> Task:
        return await (await _session(connection, session_id)).get_task(task_id)

    task = cluster.run(endpoint, command)
    shown = document(task)
    if form is not Format.TABLE:
        print_document(shown, form)
        return
    for part in ("output", "output_base64"):
        del shown[part]
    shown["error"] = None if task.error is None else failure(task.error)
    shown["took"] = took(task.started, task.finished)
    print_document(shown, form)
    print_lines(_blocks(task, limit=LINES if on_terminal() else None))


def _blocks(task: Task, *, limit: int | None) -> list[str]:
    """Return what a task brought, in full."""
    lines: list[str] = []
    if task.error is not None and task.error.traceback:
        lines += block("Traceback", task.error.traceback, limit=limit)
    if task.output:
        size = "1 byte" if len(task.output) == 1 else f"{len(task.output)} bytes"
        text = text_of(task.output)
        if text is None:
            lines.append(f"Output: {size} that are no text, see -o json")
        else:
            lines += block(f"Output, {size}", text, limit=limit)
    return lines


def _error(fault: TaskFault) -> Document:
    return {
        "code": str(fault.code),
        "type": fault.type,
        "message": fault.message,
        "traceback": fault.traceback,
        "details_base64": base64.b64encode(fault.details).decode() or None,
    }


async def _session(connection: Connection, session_id: str) -> Session:
    """Return a session to ask about its tasks, whether or not it is still open."""
    from flame.client.session import Session

    return Session(connection, (await connection.get_session(session_id)).session)
