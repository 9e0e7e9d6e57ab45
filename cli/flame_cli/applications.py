"""Applications: list, register, unregister."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from flame import Connection
from flame.errors import ConfigurationError
from flame.protocol.records import ApplicationRecord
from flame_cli import cluster
from flame_cli.output import print_table
from flame_cli.rendering import Column, clock, state

COLUMNS: Final = (
    Column("Name"),
    Column("Shim"),
    Column("State", state=True),
    Column("Created"),
    Column("Command", shrink_to=16),
)

STDIN: Final = "-"


def show_list(endpoint: str | None) -> None:
    """Print every application."""
    print_table(COLUMNS, [_row(record) for record in cluster.run(endpoint, lambda c: c.list_applications())])


def register(endpoint: str | None, file: str) -> None:
    """Register every application that a YAML file declares; none if the file has a mistake."""
    from flame_cli.yaml_spec import read_applications  # no other command needs a YAML parser

    source, text, folder = _read(file)
    declared = read_applications(text, source=source, folder=folder)

    async def command(connection: Connection) -> None:
        for application in declared:
            await connection.register_application(application.name, application.spec)
            print(f"application {application.name} registered")

    cluster.run(endpoint, command)


def unregister(endpoint: str | None, name: str, *, force: bool) -> None:
    """Remove an application with its waiting tasks and results."""
    cluster.run(endpoint, lambda connection: connection.unregister_application(name, force=force))
    print(f"application {name} unregistered")


def _row(record: ApplicationRecord) -> list[str]:
    spec = record.spec
    return [record.name, spec.shim, state(record.state), clock(record.created), spec.command or "-"]


def _read(file: str) -> tuple[str, str, Path]:
    """Return how to name the file, its text, and the folder that its relative paths start from."""
    path = Path(file)
    try:
        data = sys.stdin.buffer.read() if file == STDIN else path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}: expected a YAML file of applications") from None
    source, folder = ("standard input", Path.cwd()) if file == STDIN else (file, path.absolute().parent)
    try:
        return source, data.decode("utf-8-sig"), folder
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{source}, line {line}: not UTF-8 text, expected a YAML file") from None
