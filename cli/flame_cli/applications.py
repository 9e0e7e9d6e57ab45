"""Applications: list, view, register, update, disable, enable, unregister."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flame_cli import cluster
from flame_cli.documents import Document, at
from flame_cli.formats import Format, How
from flame_cli.listing import Kind, show_list
from flame_cli.masking import masked, without_passwords
from flame_cli.output import print_document
from flame_cli.rendering import Column, clock, state

if TYPE_CHECKING:
    from flame import Connection
    from flame.protocol.records import ApplicationRecord
    from flame_cli.yaml_spec import DeclaredApplication

COLUMNS: Final = (
    Column("Name"),
    Column("Shim", drop=1),
    Column("State", state=True),
    Column("Created", drop=2),
    Column("Command", shrink_to=16),
)

STDIN: Final = "-"


def row(record: ApplicationRecord) -> list[str]:
    """Return an application's cells."""
    spec = record.spec
    return [record.name, spec.shim, state(record.state), clock(record.created), spec.command or "-"]


def document(record: ApplicationRecord) -> Document:
    """Return all that is known of an application, but for secrets."""
    spec = record.spec
    return {
        "name": record.name,
        "state": record.state,
        **spec.model_dump(),
        "arguments": [without_passwords(argument) for argument in spec.arguments],
        "environments": masked(spec.environments),
        "url": without_passwords(spec.url),
        "created": at(record.created),
        "updated": at(record.updated),
    }


KIND: Final = Kind("applications", COLUMNS, row, document)


def list_all(endpoint: str | None, how: How) -> None:
    """List every application."""
    show_list(endpoint, how, KIND, lambda connection: connection.list_applications())


def view(endpoint: str | None, name: str, form: Format) -> None:
    """Show all that is known of an application."""
    print_document(document(cluster.run(endpoint, lambda connection: connection.get_application(name))), form)


def register(endpoint: str | None, file: str, *, describe: bool = False) -> None:
    """Register every application that a YAML file declares; none if the file has a mistake.

    With ``describe`` their services are asked for the schemas of what they take and return: see `described`.
    """
    declared = _declared(file, describe=describe)

    async def command(connection: Connection) -> None:
        for application in declared:
            await connection.register_application(application.name, application.spec)
            print(f"application {application.name} registered")

    cluster.run(endpoint, command)


def update(endpoint: str | None, file: str, *, describe: bool = False) -> None:
    """Give every application that a YAML file declares its new specification; none if the file has a mistake."""
    declared = _declared(file, describe=describe)

    async def command(connection: Connection) -> None:
        for application in declared:
            await connection.update_application(application.name, application.spec)
            print(f"application {application.name} updated")

    cluster.run(endpoint, command)


def disable(endpoint: str | None, name: str) -> None:
    """Let an application take no new sessions."""
    cluster.run(endpoint, lambda connection: connection.disable_application(name))
    print(f"application {name} disabled")


def enable(endpoint: str | None, name: str) -> None:
    """Let an application take new sessions again."""
    cluster.run(endpoint, lambda connection: connection.enable_application(name))
    print(f"application {name} enabled")


def unregister(endpoint: str | None, name: str, *, force: bool) -> None:
    """Remove an application with its waiting tasks and results."""
    cluster.run(endpoint, lambda connection: connection.unregister_application(name, force=force))
    print(f"application {name} unregistered")


def _declared(file: str, *, describe: bool) -> list[DeclaredApplication]:
    from flame_cli.yaml_spec import read_applications  # no other command needs a YAML parser

    source, text, folder = _read(file)
    declared = read_applications(text, source=source, folder=folder, variables=os.environ)
    if not describe:
        return declared
    from flame_cli.describing import described  # for those who ask for it

    return [replace(application, spec=described(application.name, application.spec)) for application in declared]


def _read(file: str) -> tuple[str, str, Path]:
    """Return how to name the file, its text, and the folder that its relative paths start from."""
    from flame.errors import ConfigurationError

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
