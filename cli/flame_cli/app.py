"""The programs of the command line: `flmctl` with its verbs, `flmping` and `flmexec`."""

from __future__ import annotations

import os
import sys
from typing import Final

import typer

from flame_cli import errors
from flame_cli.completion import COMPLETE, complete, from_cluster
from flame_cli.options import PROGRAM, Debug, Endpoint, Version, examples
from flame_cli.verbs import applications, cluster, completion, look, programs, sessions

app = typer.Typer(
    name="flmctl",
    no_args_is_help=True,
    epilog=examples(
        "flmctl up                       a cluster in this terminal",
        "flmctl register -f agent.yaml   an application of it",
        "flmctl invoke agent 'Hello!'    a task, and its answer",
        "flmctl list -a                  what is registered",
        end=errors.EXIT_CODES_HELP,
    ),
    **PROGRAM,  # type: ignore[arg-type]  # the same for all programs
)


@app.callback()
def flmctl(
    context: typer.Context,
    endpoint: Endpoint = None,
    version: Version = False,  # noqa: ARG001 (its callback shows it)
    debug: Debug = False,  # noqa: ARG001 (its callback sees to it)
) -> None:
    """Run and use Flame clusters."""
    context.obj = endpoint


for _module in (cluster, applications, sessions, look, programs, completion):
    _module.add_to(app)

_PROGRAMS: Final = {"flmctl": app, "flmping": programs.ping_app, "flmexec": programs.exec_app}


def run(program: str) -> None:
    """Run a program with the arguments of this process; ends in `SystemExit` or in what went wrong."""
    if sys.argv[1:2] == [COMPLETE]:
        _complete(program, sys.argv[2:])
    else:
        _PROGRAMS[program](prog_name=program)


def _complete(program: str, words: list[str]) -> None:
    """Answer a shell that wants to know what may come next."""
    try:
        for candidate in complete(typer.main.get_command(_PROGRAMS[program]), words, from_cluster):
            print(f"{candidate.word}\t{errors.one_line(candidate.about)}")
        sys.stdout.flush()
    except Exception as error:  # noqa: BLE001 (a shell that waits for words has no use for a reason)
        if errors.debugging():
            errors.report(program, error)
    os._exit(errors.ExitCode.OK)  # whatever still runs: whoever types waits
