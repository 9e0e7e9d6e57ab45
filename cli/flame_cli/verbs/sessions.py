"""`create`, `invoke`, `cancel` and `close`."""

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
            "flmctl create -a openai-agent --weight 2 --idle-timeout 3600",
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
    app.command(
        short_help="Give tasks up.",
        epilog=examples(
            "flmctl cancel -s openai-agent-1N1sIX -t TASK",
            "flmctl cancel -s openai-agent-1N1sIX -t TASK1 TASK2 --reason 'no use'",
            "flmctl cancel -s openai-agent-1N1sIX --all",
            "flmctl view -s openai-agent-1N1sIX -t       the session's tasks",
        ),
    )(cancel)
    app.command(
        short_help="End a session.",
        epilog=examples(
            "flmctl close -s openai-agent-1N1sIX",
            "flmctl close -s openai-agent-1N1sIX --drain --wait",
            "flmctl close -s openai-agent-1N1sIX --force",
        ),
    )(close)


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
    weight: Annotated[
        float | None,
        typer.Option("--weight", metavar="N", min=0.001, help="Its part of a full cluster, in relation to others."),
    ] = None,
    idle_timeout: Annotated[
        float | None,
        typer.Option(
            "--idle-timeout", metavar="SECONDS", min=0, help="Close it after so long without tasks; 0: never."
        ),
    ] = None,
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
            weight=weight,
            idle_timeout_s=idle_timeout,
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


def cancel(
    context: typer.Context,
    session: Annotated[str, typer.Option("--session", "-s", metavar="SESSION", help="The session's ID.")],
    tasks: Annotated[list[str] | None, typer.Argument(metavar="TASK", help="The tasks' IDs.")] = None,
    named: Annotated[  # noqa: ARG001 (as with view, the IDs follow it)
        bool, typer.Option("--task", "-t", help="The TASKs that follow; may be left out.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Every task that waits or runs when it is its turn.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Kept with the tasks.")] = "",
    endpoint: Endpoint = None,
) -> None:
    """Give tasks of a session up, whether they wait or run, and print the states that they then have.

    One that had ended before keeps its state. A running one is stopped; if it does not stop within 5 s, its
    process is ended. With --all the tasks are not listed but counted.
    """
    if bool(tasks) == everything:
        raise typer.BadParameter("expected either tasks (-t TASK...) or --all")
    from flame_cli import ending

    ending.cancel(
        endpoint_of(context, endpoint), ending.Cancelling(session=session, tasks=tuple(tasks or ()), reason=reason)
    )


def close(
    context: typer.Context,
    session: Annotated[str, typer.Option("--session", "-s", metavar="SESSION", help="The session's ID.")],
    drain: Annotated[bool, typer.Option("--drain", help="Waiting tasks run first.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Running tasks are stopped and cancelled, too.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Until every task has ended, and tell how far that is.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", min=0.001, help="With --wait: give up after this long."),
    ] = None,
    endpoint: Endpoint = None,
) -> None:
    """End a session: its running tasks finish, its waiting ones are cancelled.

    With --drain the waiting ones run first, with --force nothing does. It takes no more tasks from now on. Of a
    session that is closing already, what goes further counts: it can be forced while it drains.

    Returns at once, and flmctl list -s shows when it is closed; or with --wait, when every task has its result.
    """
    if drain and force:
        raise typer.BadParameter("--drain lets tasks run, --force stops them: expected one of both")
    if timeout is not None and not wait:
        raise typer.BadParameter("--timeout goes with --wait")
    from flame_cli import ending

    mode = "drain" if drain else "force" if force else "close"
    ending.close(endpoint_of(context, endpoint), ending.Closing(session=session, mode=mode, wait=wait, limit_s=timeout))
