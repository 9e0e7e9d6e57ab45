"""`list`, `view`, `logs` and `events`."""

from __future__ import annotations

from typing import Annotated

import typer

from flame_cli.choices import SessionStateName
from flame_cli.formats import Format, How
from flame_cli.options import Endpoint, Output, check_one, endpoint_of, examples, field_names


def add_to(app: typer.Typer) -> None:
    """Register the verbs."""
    app.command(
        "list",
        epilog=examples(
            "flmctl list -a",
            "flmctl list -s --state open --label team=search",
            "flmctl list -e --session openai-agent-1N1sIX",
            "flmctl list -s --watch",
            "flmctl list -s -o json | jq '.[].id'",
            end=field_names("application", "session", "executor", "node"),
        ),
    )(list_)
    app.command(
        epilog=examples(
            "flmctl view -a openai-agent",
            "flmctl view -s openai-agent-1N1sIX          the session",
            "flmctl view -s openai-agent-1N1sIX -t       its tasks",
            "flmctl view -s openai-agent-1N1sIX -t TASK  one of them, with its output",
            "flmctl view -n node-1 -o yaml",
            end=field_names("application", "session", "executor", "node", "task"),
        ),
    )(view)
    app.command(
        short_help="Show what services wrote.",
        epilog=examples(
            "flmctl logs -s openai-agent-1N1sIX -f",
            "flmctl logs -e EXECUTOR --tail 20 --timestamps",
        ),
    )(logs)
    app.command(
        short_help="Show what happens, as it happens.",
        epilog=examples(
            "flmctl events",
            "flmctl events -s openai-agent-1N1sIX --tasks",
            "flmctl events -o json | jq 'select(.code)'",
            end=field_names("event"),
        ),
    )(events)


def list_(  # noqa: PLR0913 (an argument for each option)
    context: typer.Context,
    *,
    applications: Annotated[bool, typer.Option("--applications", "-a", help="List applications.")] = False,
    sessions: Annotated[bool, typer.Option("--sessions", "-s", help="List sessions.")] = False,
    executors: Annotated[bool, typer.Option("--executors", "-e", help="List executors.")] = False,
    nodes: Annotated[bool, typer.Option("--nodes", "-n", help="List nodes.")] = False,
    application: Annotated[
        str | None, typer.Option("--application", metavar="NAME", help="Of sessions: those of this application.")
    ] = None,
    state: Annotated[
        SessionStateName | None, typer.Option("--state", help="Of sessions: those in this state.", case_sensitive=False)
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="NAME=VALUE", help="Of sessions: those with this label (or all of several)."),
    ] = None,
    session: Annotated[
        str | None, typer.Option("--session", metavar="SESSION", help="Of executors: those of this session.")
    ] = None,
    node: Annotated[
        str | None, typer.Option("--node", metavar="NAME", help="Of executors: those on this node.")
    ] = None,
    output: Output = Format.TABLE,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C, and show the list when it changes.")
    ] = False,
    endpoint: Endpoint = None,
) -> None:
    """List what the cluster has, of one kind.

    In a terminal that is too narrow some columns are cut or left out; behind a pipe there is everything. With
    --watch a table in a terminal is drawn anew every second; otherwise each list that differs from the one
    before is printed, with -o json in a line of its own.
    """
    check_one({"-a": applications, "-s": sessions, "-e": executors, "-n": nodes})
    if not sessions and (application is not None or state is not None or label):
        raise typer.BadParameter("--application, --state and --label go with -s")
    if not executors and (session is not None or node is not None):
        raise typer.BadParameter("--session and --node go with -e")
    where, how = endpoint_of(context, endpoint), How(output, watch)
    if applications:
        from flame_cli.applications import list_all as list_applications

        list_applications(where, how)
    elif sessions:
        from flame_cli.inputs import read_labels
        from flame_cli.sessions import Filter
        from flame_cli.sessions import list_all as list_sessions

        list_sessions(
            where,
            how,
            Filter(application=application, state=state and state.value, labels=read_labels(label or [])),
        )
    elif executors:
        from flame_cli.executors import list_all as list_executors

        list_executors(where, how, session=session, node=node)
    else:
        from flame_cli.nodes import list_all as list_nodes

        list_nodes(where, how)


def view(  # noqa: PLR0913 (an argument for each option)
    context: typer.Context,
    *,
    application: Annotated[
        str | None, typer.Option("--application", "-a", metavar="NAME", help="An application.")
    ] = None,
    session: Annotated[str | None, typer.Option("--session", "-s", metavar="SESSION", help="A session.")] = None,
    executor: Annotated[str | None, typer.Option("--executor", "-e", metavar="EXECUTOR", help="An executor.")] = None,
    node: Annotated[str | None, typer.Option("--node", "-n", metavar="NAME", help="A node.")] = None,
    tasks: Annotated[
        bool, typer.Option("--task", "-t", help="With -s: TASK of that session, or all of its tasks.")
    ] = False,
    task: Annotated[str | None, typer.Argument(metavar="TASK", help="With -t: a task's ID.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, max=9999, help="With -t: show this many tasks at most.")
    ] = 100,
    output: Output = Format.TABLE,
    endpoint: Endpoint = None,
) -> None:
    """Show all that is known of one thing.

    Values of environments whose names look secret (such as ..._KEY, ..._TOKEN or ..._PASSWORD) are never shown.
    """
    check_one({"-a": application, "-s": session, "-e": executor, "-n": node})
    if (tasks or task) and session is None:
        raise typer.BadParameter("-t goes with -s: tasks belong to a session")
    if task is not None and not tasks:
        raise typer.BadParameter(f"{task!r} is one too many: a task's ID comes after -t")
    where = endpoint_of(context, endpoint)
    if application is not None:
        from flame_cli.applications import view as view_application

        view_application(where, application, output)
    elif session is not None and task is not None:
        from flame_cli.tasks import view as view_task

        view_task(where, session, task, output)
    elif session is not None and tasks:
        from flame_cli.tasks import view_all as view_tasks

        view_tasks(where, session, output, limit=limit)
    elif session is not None:
        from flame_cli.sessions import view as view_session

        view_session(where, session, output)
    elif executor is not None:
        from flame_cli.executors import view as view_executor

        view_executor(where, executor, output)
    elif node is not None:
        from flame_cli.nodes import view as view_node

        view_node(where, node, output)


def logs(
    context: typer.Context,
    session: Annotated[
        str | None, typer.Option("--session", "-s", metavar="SESSION", help="All executors of a session.")
    ] = None,
    executor: Annotated[str | None, typer.Option("--executor", "-e", metavar="EXECUTOR", help="One executor.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until it has ended or Ctrl-C.")
    ] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", metavar="N", min=0, help="Only the last N lines of what is there.")
    ] = None,
    timestamps: Annotated[
        bool, typer.Option("--timestamps", help="Begin each line with its time (RFC 3339, in UTC).")
    ] = False,
    prefix: Annotated[
        bool, typer.Option("--prefix", help="Begin each line with its executor and stdout or stderr.")
    ] = False,
    endpoint: Endpoint = None,
) -> None:
    """Show what services wrote to standard output and standard error.

    It is kept for a day, after the executor's end, too. Both streams come out on standard output.
    """
    check_one({"-s": session, "-e": executor})
    from flame_cli.logs import Wanted
    from flame_cli.logs import logs as show_logs

    show_logs(
        endpoint_of(context, endpoint),
        Wanted(session=session, executor=executor, follow=follow, tail=tail, timestamps=timestamps, prefix=prefix),
    )


def events(
    context: typer.Context,
    session: Annotated[
        str | None, typer.Option("--session", "-s", metavar="SESSION", help="Only a session and its executors.")
    ] = None,
    application: Annotated[
        str | None, typer.Option("--application", "-a", metavar="NAME", help="Only an application and its sessions.")
    ] = None,
    tasks: Annotated[
        bool, typer.Option("--tasks", "-t", help="Also tasks: that they run (if for 0.1 s), and their ends.")
    ] = False,
    output: Output = Format.TABLE,
    endpoint: Endpoint = None,
) -> None:
    """Show every change of state of applications, sessions, executors and nodes, with its reason, until Ctrl-C.

    Of sessions also what they wait for, and that an executor failed to enter one and another will try. Each
    event is a line, with -o json a JSON object, cut only in a terminal. What was before is not shown: see list.
    """
    from flame_cli.events import Followed
    from flame_cli.events import events as follow

    follow(endpoint_of(context, endpoint), Followed(session=session, application=application, tasks=tasks, form=output))
