"""`completion`."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from flame_cli.choices import Shell
from flame_cli.options import examples
from flame_cli.shells import script

PROGRAMS: Final = ("flmctl", "flmping", "flmexec")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        short_help="Print what a shell needs to complete commands and names.",
        epilog=examples(
            "source <(flmctl completion bash)             in ~/.bashrc",
            "source <(flmctl completion zsh)              in ~/.zshrc, after compinit",
            "flmctl completion fish | source              in ~/.config/fish/config.fish",
        ),
    )(completion)


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", case_sensitive=False)],
) -> None:
    """Print what a shell needs to complete commands, options and names.

    The names of applications, sessions, executors and nodes come from the cluster; when it does not answer
    within half a second there are none.
    """
    print(script(shell, PROGRAMS))
