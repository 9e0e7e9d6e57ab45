"""`create`, `invoke` and `close`."""

from __future__ import annotations

from typing import Annotated

import typer

from flame_cli.options import CommonData, Endpoint, Labels, endpoint_of, examples


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command(
        short_help="Open a session and print its ID.",
        epilog=examples(
            "flmctl create -a openai-agent --common-data 'You are a weather forecaster.'",
            "flmctl create -a openai-agent -p 10 -r cpu=0.5,mem=512m --label team=search",
            "session=$(flmctl create -a openai-agent)",
        ),
    )(create)
    app.command(
        short_help="Run one task and print its output.",
        epilog=examples(
            "flmctl invoke flmping hello",
            "flmctl invoke openai-agent 'Who are you?' --common-data @prompt.txt -v",
            "flmctl invoke openai-agent --session openai-agent-1N1sIX 'And tomorrow?'",
            "cat question.txt | flmctl invoke openai-agent - > answer.txt",
        ),
    )(invoke)
    app.command(short_help="End a session.", epilog=examples("flmctl close -s openai-agent-1N1sIX"))(close)


def create(  # noqa: PLR0913 (an argument for each option)
    context: typer.Context,
    *,
    application: Annotated[str, typer.Option("--application", "-a", metavar="NAME", help="The application.")],
    priority: Annotated[int, typer.Option("--priority", "-p", metavar="N", min=0, help="Higher is served first.")] = 0,
    resources: Annotated[
        str | None,
        typer.Option("--resources", "-r", metavar="AMOUNTS", help="Of each executor: cpu=0.5,mem=512m,gpu=1."),
    ] = None,
    session_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="The session's ID; otherwise a new one is made up.")
    ] = None,
    min_instances: Annotated[
        int | None, typer.Option("--min", metavar="N", min=0, help="Executors from beginning to end.")
    ] = None,
    max_instances: Annotated[int | None, typer.Option("--max", metavar="N", min=1, help="Executors at most.")] = None,
    label: Labels = None,
    common_data: CommonData = None,
    endpoint: Endpoint = None,
) -> None:
    """Open a session, print its ID, and leave it open.

    Run tasks in it with flmctl invoke --session, and end it with flmctl close -s.
    """
    from flame_cli import sessions
    from flame_cli.inputs import read_bytes, read_labels

    sessions.create(
        endpoint_of(context, endpoint),
        sessions.Wanted(
            application=application,
            session_id=session_id,
            common_data=b"" if common_data is None else read_bytes("--common-data", common_data),
            priority=priority,
            resources=resources,
            min_instances=min_instances,
            max_instances=max_instances,
            labels=read_labels(label or []),
        ),
    )


def invoke(
    context: typer.Context,
    application: Annotated[str, typer.Argument(metavar="APP", help="The application.")],
    text: Annotated[str, typer.Argument(metavar="INPUT", help="Text, @FILE, or - for standard input.")],
    session: Annotated[
        str | None, typer.Option("--session", "-s", metavar="SESSION", help="Run it in this open session.")
    ] = None,
    common_data: CommonData = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Give up after this long.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell every change of state on standard error.")
    ] = False,
    endpoint: Endpoint = None,
) -> None:
    """Run one task and print its output, as it is and nothing else, on standard output.

    Without --session it gets a session of its own, which ends with it. If the task fails, its error is on
    standard error and the exit status is 1.
    """
    if session is not None and common_data is not None:
        raise typer.BadParameter("an open session has its common data already", param_hint="--common-data")
    from flame_cli.inputs import read_bytes
    from flame_cli.invoke import Invocation
    from flame_cli.invoke import invoke as run_invoke

    run_invoke(
        endpoint_of(context, endpoint),
        Invocation(
            application=application,
            input=read_bytes("INPUT", text),
            session=session,
            common_data=b"" if common_data is None else read_bytes("--common-data", common_data),
            limit_s=timeout,
            verbose=verbose,
        ),
    )


def close(
    context: typer.Context,
    session: Annotated[str, typer.Option("--session", "-s", metavar="SESSION", help="The session's ID.")],
    endpoint: Endpoint = None,
) -> None:
    """End a session: its running tasks finish, its waiting ones are cancelled.

    Returns at once; flmctl list -s shows when it is closed.
    """
    from flame_cli import sessions

    sessions.close(endpoint_of(context, endpoint), session)
