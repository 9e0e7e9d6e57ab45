"""`ping`, and the programs `flmping` and `flmexec`."""

from __future__ import annotations

from typing import Annotated

import typer

from flame_cli import errors
from flame_cli.choices import Language
from flame_cli.options import PROGRAM, Debug, Endpoint, Version, endpoint_of, examples

ping_app = typer.Typer(name="flmping", **PROGRAM)  # type: ignore[arg-type]  # the same for all programs
exec_app = typer.Typer(name="flmexec", **PROGRAM)  # type: ignore[arg-type]  # as above

Tasks = Annotated[int, typer.Option("--tasks", "-t", metavar="N", min=1, max=10_000_000, help="Tasks in each session.")]
Sessions = Annotated[int, typer.Option("--sessions", "-c", metavar="N", min=1, max=1000, help="Sessions at once.")]
PayloadBytes = Annotated[int, typer.Option("--bytes", "-m", metavar="BYTES", min=0, help="Size of each task's input.")]
Performance = Annotated[
    bool, typer.Option("--performance", "-p", help="Keep many tasks in flight and print a summary.")
]
Limit = Annotated[
    float,
    typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Give up when no task ends for this long."),
]


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("ping", epilog=examples("flmctl ping", "flmctl ping -t 1000 -p"))(ping)


def ping(
    context: typer.Context,
    tasks: Tasks = 10,
    sessions: Sessions = 1,
    payload_bytes: PayloadBytes = 64,
    performance: Performance = False,
    timeout: Limit = 60.0,
    endpoint: Endpoint = None,
) -> None:
    """Run tasks that echo their input, and measure them. The same as flmping."""
    from flame_cli.ping import PingOptions
    from flame_cli.ping import ping as run_ping

    options = PingOptions(
        tasks=tasks, sessions=sessions, payload_bytes=payload_bytes, measure=performance, limit_s=timeout
    )
    run_ping(endpoint_of(context, endpoint), options, program="flmctl")


@ping_app.command(
    epilog=examples("flmping", "flmping -t 1000 -p", "flmping -t 1000 -c 10 -m 4096 -p", end=errors.EXIT_CODES_HELP)
)
def flmping(
    tasks: Tasks = 10,
    sessions: Sessions = 1,
    payload_bytes: PayloadBytes = 64,
    performance: Performance = False,
    timeout: Limit = 60.0,
    endpoint: Endpoint = None,
    version: Version = False,  # noqa: ARG001 (its callback shows it)
    debug: Debug = False,  # noqa: ARG001 (its callback sees to it)
) -> None:
    """Run tasks that echo their input, and measure them.

    Without -p a session's tasks run one after the other, and each has a line with its executor and the time
    from its creation to its output. With -p many are in flight at once, and what is printed is a summary:
    throughput, and the times that half of the tasks (p50) and 99 of 100 (p99) stayed below. Starting the
    sessions is not counted.
    """
    from flame_cli.ping import PingOptions
    from flame_cli.ping import ping as run_ping

    options = PingOptions(
        tasks=tasks, sessions=sessions, payload_bytes=payload_bytes, measure=performance, limit_s=timeout
    )
    run_ping(endpoint, options, program="flmping")


@exec_app.command(
    epilog=examples(
        "flmexec -c 'uname -a'",
        "flmexec -l python -c 'print(sum(range(10)))'",
        "flmexec -c @script.sh -i @data.csv",
        "echo hello | flmexec -c 'tr a-z A-Z' -i -",
        "flmexec -t 100 -c 'hostname' | sort | uniq -c",
        end=(
            "Exit status: that of the script; 128 and the signal's number if a signal ended it; 124 if it took"
            " longer than --timeout; with -t that of the first run that failed. If no script could be run,"
            " standard error has a line that begins with flmexec: error, and the status is 1 (refused or lost),"
            " 2 (wrong arguments or installation), 3 (the cluster is not reachable) or 130 (interrupted)."
        ),
    )
)
def flmexec(
    *,
    code: Annotated[str, typer.Option("--code", "-c", metavar="CODE|@FILE", help="The script.")],
    language: Annotated[
        Language, typer.Option("--language", "-l", help="What it is written in.", case_sensitive=False)
    ] = Language.SHELL,
    text: Annotated[
        str, typer.Option("--input", "-i", metavar="TEXT|@FILE|-", help="Its standard input.", show_default=False)
    ] = "",
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="End a run that takes longer.")
    ] = None,
    times: Annotated[int, typer.Option("--times", "-t", metavar="N", min=1, help="Run it this often.")] = 1,
    endpoint: Endpoint = None,
    version: Version = False,  # noqa: ARG001 (its callback shows it)
    debug: Debug = False,  # noqa: ARG001 (its callback sees to it)
) -> None:
    """Run a script in the cluster.

    What it writes to standard output and standard error comes out here, once it has ended. With -t the runs
    are tasks of one session, as many at once as it gets executors, and come out in order.
    """
    from flame_cli.inputs import read_bytes
    from flame_cli.scripts import Job, run_script

    run_script(
        endpoint,
        Job(
            language=language.value,
            code=read_bytes("--code", code).decode("utf-8", "surrogateescape"),
            input=read_bytes("--input", text),
            times=times,
            limit_s=timeout,
        ),
    )
