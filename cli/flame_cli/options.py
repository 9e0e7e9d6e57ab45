"""What the verbs share: options, and how help is written."""

from __future__ import annotations

import textwrap
from typing import Annotated, Final

import typer

from flame_cli import errors
from flame_cli.documents import FIELDS
from flame_cli.formats import Format

PROGRAM: Final = {
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}
"""How every program is set up."""

_WIDTH: Final = 76
"""Of lines that help shows as they are: it may be 80 columns wide, and indents them."""


def examples(*lines: str, title: str = "Examples:", end: str = "") -> str:
    """Return what stands below the options: lines that are shown as they are, and one last paragraph."""
    return "\n".join(["\b", title, *(f"  {line}" for line in lines), "", end])


def field_names(*kinds: str) -> str:
    """Return the names that ``-o json`` and ``-o yaml`` have for kinds of things, as lines for `examples`."""
    lines = ["\b", "Fields of -o json and -o yaml (times are RFC 3339, in UTC):"]
    for kind in kinds:
        text = f"{kind}: {', '.join(FIELDS[kind])}"
        lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join([*lines, ""])


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
        help="Where the cluster is: nats://HOST:PORT[,…]. Otherwise FLAME_ENDPOINT, the current context of"
        " ~/.flame/flame.yaml (or FLAME_CONFIG), or nats://127.0.0.1:4222.",
    ),
]
Version = Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks and logs (also FLAME_DEBUG=1).", callback=_debug),
]
Output = Annotated[
    Format, typer.Option("--output", "-o", help="For people, or all fields for programs.", case_sensitive=False)
]
File = Annotated[str, typer.Option("--file", "-f", metavar="FILE", help="YAML file; - for standard input.")]
CommonData = Annotated[
    str | None,
    typer.Option("--common-data", metavar="TEXT|@FILE", help="What every executor of the session gets."),
]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="NAME=VALUE", help="A label; may be given several times.")
]


def endpoint_of(context: typer.Context, endpoint: str | None) -> str | None:
    """Return what was given after the verb, otherwise before it."""
    before: str | None = context.obj
    return before if endpoint is None else endpoint


def check_one(choices: dict[str, object]) -> None:
    """Refuse a command line that has none or several of what excludes each other."""
    if sum(value not in (None, False) for value in choices.values()) != 1:
        *first, last = choices
        raise typer.BadParameter(f"expected exactly one of {', '.join(first)} and {last}")
