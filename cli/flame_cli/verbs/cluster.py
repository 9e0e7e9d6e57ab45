"""`up`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flame_cli.options import examples


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command(
        short_help="Run a cluster in this terminal.",
        epilog=examples("flmctl up", "flmctl up --data-dir /tmp/flame --port 0"),
    )(up)


def up(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(metavar="DIR", help="Holds everything that the cluster keeps.")] = Path(
        "~/.flame/data"
    ),
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port of the broker; 0 for a free one.")
    ] = 4222,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address that the broker listens on.")] = "127.0.0.1",
    client_code: Annotated[
        bool,
        typer.Option(
            help="Have the applications that run what clients send, flmexec and flmfunc. Without, a new cluster has"
            " neither; those of an old one stay."
        ),
    ] = True,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the logs of the services here, not in files.")
    ] = False,
) -> None:
    """Run a cluster in this terminal: a broker, a scheduler and an executor manager.

    When it takes work it prints one line on standard output, "Flame is ready at nats://HOST:PORT". Ctrl-C or
    SIGTERM stops it; what it keeps is there at the next start. Its logs are scheduler.log,
    executor-manager.log and nats-server.log in the data folder.
    """
    if context.obj is not None:
        raise typer.BadParameter("up starts a broker of its own: use --host and --port", param_hint="--endpoint")
    from flame_cli.up import UpOptions
    from flame_cli.up import up as run_up

    folder = data_dir.expanduser().absolute()
    run_up(UpOptions(data_dir=folder, host=host, port=port, client_code=client_code, verbose=verbose))
