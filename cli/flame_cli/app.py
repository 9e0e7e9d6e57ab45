"""The verbs of the command line: names, options and help. What they do is in a module for each noun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from flame_cli import errors

_PROGRAM: Final = {
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}


def _examples(*lines: str, title: str = "Examples:", end: str = "") -> str:
    """Return what stands below the options: lines that are shown as they are, and one last paragraph."""
    return "\n".join(["\b", title, *(f"  {line}" for line in lines), "", end])


app = typer.Typer(
    name="flmctl",
    no_args_is_help=True,
    epilog=_examples(
        "flmctl up                       a cluster in this terminal",
        "flmctl register -f agent.yaml   an application of it",
        "flmctl list -a                  what is registered",
        end=errors.EXIT_CODES_HELP,
    ),
    **_PROGRAM,  # type: ignore[arg-type]  # the same for both programs
)
ping_app = typer.Typer(name="flmping", **_PROGRAM)  # type: ignore[arg-type]  # as above


def run(program: str) -> None:
    """Run a program with the arguments of this process; ends in `SystemExit` or in what went wrong."""
    (ping_app if program == "flmping" else app)(prog_name=program)


def _show_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        from flame.version import __version__

        print(f"{context.info_name} {__version__}")
        raise typer.Exit


def _debug(wanted: bool) -> None:
    if wanted:
        errors.debug()


Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Where the cluster is: nats://HOST:PORT[,…]. Otherwise FLAME_ENDPOINT, or nats://127.0.0.1:4222.",
    ),
]
Version = Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks and logs (also FLAME_DEBUG=1).", callback=_debug),
]


@app.callback()
def flmctl(
    context: typer.Context,
    endpoint: Endpoint = None,
    version: Version = False,  # noqa: ARG001 (its callback shows it)
    debug: Debug = False,  # noqa: ARG001 (its callback sees to it)
) -> None:
    """Run and use Flame clusters."""
    context.obj = endpoint


def _endpoint(context: typer.Context, endpoint: str | None) -> str | None:
    """Return what was given after the verb, otherwise before it."""
    before: str | None = context.obj
    return before if endpoint is None else endpoint


# ---- the cluster


@app.command(
    short_help="Run a cluster in this terminal.",
    epilog=_examples("flmctl up", "flmctl up --data-dir /tmp/flame --port 0"),
)
def up(
    context: typer.Context,
    data_dir: Annotated[Path, typer.Option(metavar="DIR", help="Holds everything that the cluster keeps.")] = Path(
        "~/.flame/data"
    ),
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port of the broker; 0 for a free one.")
    ] = 4222,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address that the broker listens on.")] = "127.0.0.1",
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

    run_up(UpOptions(data_dir=data_dir.expanduser().absolute(), host=host, port=port, verbose=verbose))


@app.command("list", epilog=_examples("flmctl list -a", "flmctl list -s | grep Open"))
def list_(
    context: typer.Context,
    applications: Annotated[bool, typer.Option("--applications", "-a", help="List applications.")] = False,
    sessions: Annotated[bool, typer.Option("--sessions", "-s", help="List sessions.")] = False,
    executors: Annotated[bool, typer.Option("--executors", "-e", help="List executors.")] = False,
    nodes: Annotated[bool, typer.Option("--nodes", "-n", help="List nodes.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """List what the cluster has, of one kind.

    In a terminal that is too narrow some columns are cut or left out; behind a pipe there is everything.
    """
    if [applications, sessions, executors, nodes].count(True) != 1:
        raise typer.BadParameter("expected exactly one of -a, -s, -e and -n")
    show: Callable[[str | None], None]
    if applications:
        from flame_cli.applications import show_list as show
    elif sessions:
        from flame_cli.sessions import show_list as show
    elif executors:
        from flame_cli.executors import show_list as show
    else:
        from flame_cli.nodes import show_list as show
    show(_endpoint(context, endpoint))


# ---- applications


@app.command(
    epilog=_examples(
        "metadata:",
        "  name: openai-agent",
        "spec:",
        "  command: uv                   # looked up on the PATH of each node",
        "  arguments: [run, main.py]",
        "  working_directory: .          # relative to this file",
        "  environments:",
        "    DEEPSEEK_BASE_URL: https://api.deepseek.com",
        "  max_instances: 4              # executors of one session, at most",
        "  delay_release: 60             # seconds that one with nothing to do stays",
        title="Such a file:",
        end=_examples("flmctl register -f agent.yaml", "cat agent.yaml | flmctl register -f -"),
    )
)
def register(
    context: typer.Context,
    file: Annotated[str, typer.Option("--file", "-f", metavar="FILE", help="YAML file; - for standard input.")],
    endpoint: Endpoint = None,
) -> None:
    """Register the applications that a YAML file declares.

    A file may hold several documents, with a line of --- between them. Further fields of spec are shim (Nats,
    or Log for tests), min_instances, concurrency, session_retry_limit, description and labels.
    """
    from flame_cli import applications

    applications.register(_endpoint(context, endpoint), file)


@app.command(epilog=_examples("flmctl unregister -a openai-agent"))
def unregister(
    context: typer.Context,
    application: Annotated[str, typer.Option("--application", "-a", metavar="NAME", help="The application.")],
    force: Annotated[bool, typer.Option("--force", help="Even if it has open sessions: they are ended.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """Remove an application, its waiting tasks and its results."""
    from flame_cli import applications

    applications.unregister(_endpoint(context, endpoint), application, force=force)


# ---- sessions


@app.command(short_help="End a session.", epilog=_examples("flmctl close -s openai-agent-1N1sIX"))
def close(
    context: typer.Context,
    session: Annotated[str, typer.Option("--session", "-s", metavar="SESSION", help="The session's ID.")],
    endpoint: Endpoint = None,
) -> None:
    """End a session: its running tasks finish, its waiting ones are cancelled.

    Returns at once; flmctl list -s shows when it is closed.
    """
    from flame_cli import sessions

    sessions.close(_endpoint(context, endpoint), session)


# ---- ping

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


@app.command("ping", epilog=_examples("flmctl ping", "flmctl ping -t 1000 -p"))
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
    run_ping(_endpoint(context, endpoint), options, program="flmctl")


@ping_app.command(
    epilog=_examples("flmping", "flmping -t 1000 -p", "flmping -t 1000 -c 10 -m 4096 -p", end=errors.EXIT_CODES_HELP)
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
