"""Lists: once, or again and again as they change."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from flame_cli import cluster
from flame_cli.documents import Document
from flame_cli.formats import Format, How
from flame_cli.output import formatted, print_table
from flame_cli.rendering import Column

if TYPE_CHECKING:
    from flame import Connection

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """What is listed."""

    title: str
    columns: Sequence[Column]
    row: Callable[[T], list[str]]
    document: Callable[[T], Document]

    def rows(self, items: Sequence[T]) -> list[list[str]]:
        """Return the cells of a table."""
        return [self.row(item) for item in items]

    def documents(self, items: Sequence[T]) -> list[Document]:
        """Return what ``-o json`` shows."""
        return [self.document(item) for item in items]


def show_list(
    endpoint: str | None, how: How, kind: Kind[T], fetch: Callable[[Connection], Awaitable[Sequence[T]]]
) -> None:
    """Print a list, or keep showing it."""
    if how.watch:
        from flame_cli.watching import watch

        cluster.run(endpoint, lambda connection: watch(how.form, kind, lambda: fetch(connection)))
        return
    items = cluster.run(endpoint, fetch)
    if how.form is Format.TABLE:
        print_table(kind.columns, kind.rows(items))
    else:
        print(formatted(kind.documents(items), how.form))
