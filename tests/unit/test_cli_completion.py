"""What a shell is offered, by the words before the cursor."""

from __future__ import annotations

import pytest
from typer.main import get_command

from flame_cli.app import app
from flame_cli.completion import Candidate, complete
from flame_cli.verbs.programs import exec_app

ROOT = get_command(app)


class Names:
    """A cluster that has two of everything, and knows what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, noun: str, endpoint: str | None) -> list[Candidate]:
        self.asked.append((noun, endpoint))
        return [Candidate(f"{noun}-1", "the first"), Candidate(f"{noun}-2")]


def offered(line: str) -> list[str]:
    return [candidate.word for candidate in complete(ROOT, line.split(" ")[1:], Names())]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flmctl un", ["unregister"]),
        ("flmctl --debug cre", ["create"]),
        ("flmctl --endpoint nats://h:1 cl", ["close"]),
        ("flmctl zzz", []),
        ("flmctl list --sta", ["--state"]),
        ("flmctl list --state ", ["open", "closing", "closed", "failed"]),
        ("flmctl list --state=c", ["--state=closing", "--state=closed"]),
        ("flmctl list --state = c", ["closing", "closed"]),
        ("flmctl list -s -o ", ["table", "json", "yaml"]),
        ("flmctl view -o y", ["yaml"]),
        ("flmctl completion ", ["bash", "zsh", "fish"]),
        ("flmctl view -a ", ["application-1", "application-2"]),
        ("flmctl disable -a ", ["application-1", "application-2"]),
        ("flmctl view --application=application-2", ["--application=application-2"]),
        ("flmctl view -s ", ["session-1", "session-2"]),
        ("flmctl view -e executor-2", ["executor-2"]),
        ("flmctl view -n ", ["node-1", "node-2"]),
        ("flmctl logs -f -s ", ["session-1", "session-2"]),
        ("flmctl logs -fs ", ["session-1", "session-2"]),
        ("flmctl list -e --session session-2", ["session-2"]),
        ("flmctl close -s session-1", ["session-1"]),
        ("flmctl close -s session-1 --dr", ["--drain"]),
        ("flmctl cancel -s ", ["session-1", "session-2"]),
        ("flmctl cancel -s session-1 -t ", []),
        ("flmctl events -a ", ["application-1", "application-2"]),
        ("flmctl events -t -s ", ["session-1", "session-2"]),
        ("flmctl create -a ", ["application-1", "application-2"]),
        ("flmctl invoke ", ["application-1", "application-2"]),
        ("flmctl invoke -v ", ["application-1", "application-2"]),
        ("flmctl invoke --timeout 3 ", ["application-1", "application-2"]),
        ("flmctl invoke application-1 ", []),
        ("flmctl register -f ", []),
        ("flmctl create -p ", []),
    ],
)
def test_the_words_before_say_what_is_offered(line: str, expected: list[str]) -> None:
    assert offered(line) == expected


def test_every_verb_is_offered_with_what_it_does() -> None:
    found = complete(ROOT, [""], Names())
    assert [candidate.word for candidate in found] == list(ROOT.commands)  # type: ignore[attr-defined]  # it is a group
    assert all(candidate.about for candidate in found)
    assert complete(ROOT, [], Names()) == found


def test_options_are_offered_where_nothing_else_is_left() -> None:
    assert {"--applications", "--watch", "--endpoint"} <= set(offered("flmctl list "))
    assert {"-a", "--applications"} <= set(offered("flmctl list -"))
    assert "-a" not in offered("flmctl list --")


def test_the_cluster_that_was_named_is_asked_and_only_for_names() -> None:
    names = Names()
    for line in ("--endpoint nats://h:1 view -a ", "view --endpoint nats://h:2 -s ", "view --endpoint=nats://h:3 -n "):
        complete(ROOT, line.split(" "), names)
    complete(ROOT, ["li"], names)
    complete(ROOT, ["list", "--st"], names)
    assert names.asked == [("application", "nats://h:1"), ("session", "nats://h:2"), ("node", "nats://h:3")]


def test_the_other_programs_are_completed_too() -> None:
    assert [c.word for c in complete(get_command(exec_app), ["-l", ""], Names())] == ["shell", "python"]
