"""Shell completion: what may come next on the command line.

A shell's script calls the program with `COMPLETE`, then the words up to the cursor; the last one is the one to
complete, maybe empty. The answer is a line for each candidate: the word, and after a tab what it is. No line: there
is nothing to offer but files. What goes wrong is nobody's business here: there are no candidates then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flame_cli.choices import CHOICES

COMPLETE: Final = "__complete"
"""The first argument of a call by a shell."""
LIMIT_S: Final = 0.5
"""How long the cluster may take to bring names."""

_NOUNS: Final = frozenset({"application", "session", "executor", "node"})
"""Parameters that stand for something that the cluster can name."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A word that may come next."""

    word: str
    about: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """What the command line is up to at the cursor."""

    command: Any
    """The one whose argument or option is next; Typer's, with the attributes that all its versions share."""
    pending: Any
    """The option whose value is next, or ``None``."""
    positional: int
    """How many arguments it has already had."""
    endpoint: str | None


Names = Callable[[str, str | None], list[Candidate]]
"""Brings the names of one noun from the cluster at an endpoint."""


def complete(root: Any, words: Sequence[str], names: Names) -> list[Candidate]:
    """Return what the last word may become. Pure but for ``names``."""
    *before, current = [word for word in words if word != "="] or [""]
    place = locate(root, before)
    prefix = ""
    if place.pending is None and current.startswith("--") and "=" in current:
        option, _, current = current.partition("=")
        prefix = f"{option}="
        place = Place(place.command, _option(place.command, option), place.positional, place.endpoint)
    candidates = _candidates(place, current, names)
    return [Candidate(prefix + c.word, c.about) for c in candidates if c.word.startswith(current)]


def locate(root: Any, words: Sequence[str]) -> Place:
    """Follow the words to the command that they name."""
    command, pending, positional = root, None, 0
    endpoint: str | None = None
    for word in words:
        if pending is not None:
            if pending.name == "endpoint":
                endpoint = word
            pending = None
        elif word.startswith("-") and len(word) > 1:
            name, equals, value = word.partition("=")
            option = _option(command, name)
            if option is not None and option.name == "endpoint" and equals:
                endpoint = value
            if option is not None and not option.is_flag and not equals:
                pending = option
        elif word in getattr(command, "commands", {}):
            command, positional = command.commands[word], 0
        else:
            positional += 1
    return Place(command, pending, positional, endpoint)


def from_cluster(noun: str, endpoint: str | None) -> list[Candidate]:
    """Return the names that the cluster has now; raise anything if it can't be asked within `LIMIT_S`.

    The loop is not closed: that would wait for a thread that looks up a host's name. The process ends right after.
    """
    import asyncio

    from flame_cli.cluster import quiet_logs

    quiet_logs()
    return asyncio.new_event_loop().run_until_complete(_bounded(noun, endpoint))


def _candidates(place: Place, current: str, names: Names) -> list[Candidate]:
    parameter = place.pending
    if parameter is None:
        if current.startswith("-"):
            return [
                Candidate(name, _about(option.help))
                for option in _options(place.command)
                for name in option.opts
                if name.startswith("--" if current.startswith("--") else "-")
            ]
        commands = getattr(place.command, "commands", None)
        if commands is not None:
            return [
                Candidate(name, command.get_short_help_str(60))
                for name, command in commands.items()
                if not command.hidden
            ]
        arguments = [parameter for parameter in place.command.params if parameter.param_type_name == "argument"]
        if place.positional >= len(arguments):
            return [Candidate(option.opts[0], _about(option.help)) for option in _options(place.command)]
        parameter = arguments[place.positional]
    if parameter.name in CHOICES:
        return [Candidate(choice.value) for choice in CHOICES[parameter.name]]
    return names(parameter.name, place.endpoint) if parameter.name in _NOUNS else []


def _options(command: Any) -> list[Any]:
    return [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]


def _option(command: Any, name: str) -> Any:
    """Return the option of that name; of ``-abc`` it is the last letter that may want a value."""
    if name.startswith("-") and not name.startswith("--"):
        name = f"-{name[-1]}"
    return next((option for option in _options(command) if name in option.opts), None)


def _about(text: str | None) -> str:
    return (text or "").partition(".")[0]


async def _bounded(noun: str, endpoint: str | None) -> list[Candidate]:
    import asyncio

    from flame import connect

    async with asyncio.timeout(LIMIT_S):
        async with await connect(endpoint, name="flmctl-completion", timeout_s=LIMIT_S) as connection:
            if noun == "application":
                return [Candidate(a.name, a.spec.description) for a in await connection.list_applications()]
            if noun == "session":
                return [
                    Candidate(i.session.id, f"{i.session.application}, {i.session.state.value}")
                    for i in await connection.list_sessions()
                ]
            if noun == "executor":
                return [Candidate(e.id, f"{e.state.value}, {e.session}") for e in await connection.list_executors()]
            return [Candidate(n.name, n.hostname) for n in await connection.list_nodes()]
