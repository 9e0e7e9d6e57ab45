"""What the services of a session, or one executor, wrote to their standard streams."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flame_cli import cluster
from flame_cli.documents import at, instant

if TYPE_CHECKING:
    from flame import Connection
    from flame.client.logs import LogLine


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which lines, and what to say of each."""

    session: str | None = None
    executor: str | None = None
    follow: bool = False
    tail: int | None = None
    timestamps: bool = False
    prefix: bool = False


def logs(endpoint: str | None, wanted: Wanted) -> None:
    """Print the lines, both streams on standard output."""

    async def command(connection: Connection) -> None:
        async for line in connection.read_logs(
            session=wanted.session, executor=wanted.executor, follow=wanted.follow, tail=wanted.tail
        ):
            sys.stdout.write(f"{written(line, wanted)}\n")
            if wanted.follow:
                sys.stdout.flush()

    cluster.run(endpoint, command)


def written(line: LogLine, wanted: Wanted) -> str:
    """Return a line as it is printed: a service's own colours are left alone."""
    time = at(line.at) if wanted.timestamps else None
    parts = [instant(time)] if time is not None else []
    if wanted.prefix:
        parts.append(f"{line.executor} {line.stream}")
    return " ".join([*parts, line.text.rstrip("\r\n")])
