"""`register`, `update`, `disable`, `enable` and `unregister`."""

from __future__ import annotations

from typing import Annotated

import typer

from flame_cli.options import Endpoint, File, endpoint_of, examples

_FILE = (
    "metadata:",
    "  name: openai-agent",
    "spec:",
    "  command: uv                   # looked up on the PATH of each node",
    "  arguments: [run, main.py]",
    "  working_directory: .          # relative to this file",
    "  environments:",
    "    DEEPSEEK_API_KEY: ${DEEPSEEK_API_KEY}",
    "    DEEPSEEK_BASE_URL: ${BASE_URL:-https://api.deepseek.com}",
    "  max_instances: 4              # executors of one session, at most",
    "  delay_release: 60             # seconds that one with nothing to do stays",
)
_Name = Annotated[str, typer.Option("--application", "-a", metavar="NAME", help="The application.")]
_Describe = Annotated[
    bool,
    typer.Option(
        "--describe",
        help="Run each command here, once, to ask for the JSON schemas of what the service takes and returns.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command(
        epilog=examples(
            *_FILE,
            title="Such a file:",
            end=examples("flmctl register -f agent.yaml", "cat agent.yaml | flmctl register -f -"),
        )
    )(register)
    app.command(
        short_help="Give applications what a YAML file declares.",
        epilog=examples(
            "flmctl update -f agent.yaml",
            "DEEPSEEK_API_KEY=sk-… flmctl update -f agent.yaml",
            end="The file is described in: flmctl register --help",
        ),
    )(update)
    app.command(
        short_help="Let an application take no new sessions.",
        epilog=examples("flmctl disable -a openai-agent", "flmctl list -s -a openai-agent   those that it has go on"),
    )(disable)
    app.command(epilog=examples("flmctl enable -a openai-agent"))(enable)
    app.command(epilog=examples("flmctl unregister -a openai-agent", "flmctl unregister -a openai-agent --force"))(
        unregister
    )


def register(context: typer.Context, file: File, describe: _Describe = False, endpoint: Endpoint = None) -> None:
    """Register the applications that a YAML file declares.

    A file may hold several documents, with a line of --- between them. Further fields of spec are shim (Nats,
    or Log for tests), min_instances, concurrency, session_retry_limit, fresh_process, warm_instances, url, image,
    input_schema, output_schema, common_data_schema, description and labels; of its part of the cluster
    max_executors, weight and placement (spread or pack); of sessions without tasks idle_timeout; and of each task
    timeout, expires, delay, max_attempts, retry_on (classes of exceptions) and retry_backoff. Times are seconds.

    In the values of environments ${NAME} is a variable of the shell that runs this command, ${NAME:-TEXT} the
    text if that one is unset or empty, and $$ a dollar. Paths in working_directory and command are relative to
    the file; a command without a slash is looked up on each node.
    """
    from flame_cli import applications

    applications.register(endpoint_of(context, endpoint), file, describe=describe)


def update(context: typer.Context, file: File, describe: _Describe = False, endpoint: Endpoint = None) -> None:
    """Give registered applications the specification that a YAML file declares.

    All of it: a field that the file leaves out gets its default. Executors that run keep what they were started
    with; those that start from now on get the new one.
    """
    from flame_cli import applications

    applications.update(endpoint_of(context, endpoint), file, describe=describe)


def disable(context: typer.Context, application: _Name, endpoint: Endpoint = None) -> None:
    """Let an application take no new sessions. Those that it has go on until they are closed."""
    from flame_cli import applications

    applications.disable(endpoint_of(context, endpoint), application)


def enable(context: typer.Context, application: _Name, endpoint: Endpoint = None) -> None:
    """Let an application take new sessions again."""
    from flame_cli import applications

    applications.enable(endpoint_of(context, endpoint), application)


def unregister(
    context: typer.Context,
    application: _Name,
    force: Annotated[bool, typer.Option("--force", help="Even if it has open sessions: they are ended.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """Remove an application, its waiting tasks and its results."""
    from flame_cli import applications

    applications.unregister(endpoint_of(context, endpoint), application, force=force)
