"""Subjects, and the names they are made of."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.client.spec import SessionSpec
from flame.errors import InvalidName, MalformedMessage
from flame.protocol import subjects
from flame.protocol.records import BindingRecord, NodeRecord, SessionRecord
from flame.protocol.subjects import MAX_APPLICATION, MAX_TOKEN, check_application, check_token, to_token
from flame.service.environment import EXECUTOR, NODE, ExecutorEnvironment
from tests.unit.strategies import ILLEGAL, LEGAL, application_names, illegal_names, tokens

# ---- names


@given(tokens)
def test_a_legal_name_passes_as_it_is(name: str) -> None:
    assert check_token("session", name) == name


@given(illegal_names)
def test_no_illegal_name_passes(name: str) -> None:
    with pytest.raises(InvalidName):
        check_token("session", name)
    with pytest.raises(InvalidName):
        check_application(name)


@pytest.mark.parametrize("value", [None, 5, b"abc", ["a"], True, object()])
def test_what_is_no_text_is_no_name(value: object) -> None:
    with pytest.raises(InvalidName):
        check_token("session", value)


def test_a_refusal_names_the_thing_the_value_and_the_rule() -> None:
    with pytest.raises(InvalidName, match=re.escape("session 'a.b' is not a legal name: expected 1 to 64 characters")):
        check_token("session", "a.b")


@given(illegal_names)
def test_a_refusal_is_one_short_line(name: str) -> None:
    with pytest.raises(InvalidName) as refusal:
        check_token("session", name)
    text = str(refusal.value)
    assert len(text) < 300
    assert text.isprintable()


def test_names_have_their_limits() -> None:
    assert check_token("session", "a" * MAX_TOKEN)
    assert check_application("a" * MAX_APPLICATION)
    with pytest.raises(InvalidName, match="1 to 48 characters"):
        check_application("a" * (MAX_APPLICATION + 1))


def test_a_minted_session_id_of_the_longest_application_is_a_legal_name() -> None:
    assert MAX_APPLICATION + len("-123456") <= MAX_TOKEN


@given(st.text())
def test_any_text_can_be_made_a_legal_name(text: str) -> None:
    assert LEGAL.fullmatch(to_token(text))


@given(tokens.filter(lambda name: name == name.strip("-")))
def test_a_legal_name_is_kept_when_text_is_made_a_name(name: str) -> None:
    assert to_token(name) == name


def _environment(name: str) -> Any:
    # Here an empty value is a missing one, which has an error of its own: so it is looked at with a blank.
    return ExecutorEnvironment.read({"FLAME_ENDPOINT": "nats://h:1", NODE: "n", EXECUTOR: name or " "})


def _node(name: str) -> Any:
    fields = {"name": name, "hostname": "h", "arch": "a", "os": "o", "capacity": (1, 1, 1), "started": 1.0}
    return NodeRecord.model_validate(fields)


def _session(name: str) -> Any:
    return SessionRecord.model_validate({"id": name, "application": "a", "created": 1.0})


def _binding(name: str) -> Any:
    fields = {"executor": "x", "node": "n", "application": "a", "session": name, "epoch": 1, "consumer": "c"}
    return BindingRecord.model_validate({**fields, "created": 1.0})


EDGES: dict[str, Callable[[str], Any]] = {
    "an application of a new session": lambda name: SessionSpec(application=name).request(None),
    "an id of a new session": lambda name: SessionSpec(application="a").request(name),
    "an executor's environment": _environment,
    "a node's record": _node,
    "a session's record": _session,
    "a binding's record": _binding,
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ILLEGAL, ids=repr)
def test_an_illegal_name_is_refused_at_every_edge(edge: str, name: str) -> None:
    with pytest.raises(ValueError, match="is not a legal name"):
        EDGES[edge](name)


# ---- subjects

BUILDERS: dict[str, Callable[[str, str, str], str]] = {
    "task": subjects.task,
    "result": subjects.result,
    "done": lambda a, s, t: subjects.event(a, s, t, "done"),
    "running": lambda a, s, t: subjects.event(a, s, t, "running"),
    "session_events": lambda a, s, _: subjects.session_events(a, s),
    "control": lambda a, s, _: subjects.control(a, s),
    "executor_report": lambda a, s, _: subjects.executor_report(a, s),
    "log": subjects.log,
    "api": lambda a, _s, _t: subjects.api(a),
}


@given(application_names, tokens, tokens)
def test_every_subject_made_of_legal_names_is_literal_and_legal(application: str, session: str, task: str) -> None:
    for build in BUILDERS.values():
        subject = build(application, session, task)
        assert subject.startswith("flame.")
        assert all(LEGAL.fullmatch(token) for token in subject.split("."))


@given(st.tuples(application_names, tokens, tokens), st.tuples(application_names, tokens, tokens))
def test_different_tasks_have_different_subjects(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    made = [BUILDERS[name](*address) for name in ("task", "result", "done", "running") for address in {one, other}]
    assert len(set(made)) == len(made)


@given(application_names, tokens, tokens)
def test_what_is_built_can_be_parsed(application: str, session: str, task: str) -> None:
    address = (application, session, task)
    assert subjects.parse_task(subjects.task(*address)) == address
    assert subjects.parse_result(subjects.result(*address)) == address
    assert subjects.parse_event(subjects.event(*address, "done")) == (address, "done")
    assert subjects.parse_event(subjects.event(*address, "running")) == (address, "running")


PARSERS: dict[str, tuple[Callable[[str], Any], set[str]]] = {
    "task": (subjects.parse_task, {"task"}),
    "result": (subjects.parse_result, {"result"}),
    "event": (subjects.parse_event, {"done", "running"}),
}


@pytest.mark.parametrize("parser", PARSERS)
@given(st.data())
def test_a_parser_refuses_every_other_kind_of_subject(parser: str, data: st.DataObject) -> None:
    parse, own = PARSERS[parser]
    address = data.draw(st.tuples(application_names, tokens, tokens))
    for name, build in BUILDERS.items():
        if name not in own:
            with pytest.raises(MalformedMessage):
                parse(build(*address))


@pytest.mark.parametrize("parser", PARSERS)
@given(st.data())
def test_a_parser_refuses_a_subject_with_a_token_changed(parser: str, data: st.DataObject) -> None:
    parse, own = PARSERS[parser]
    subject = BUILDERS[min(own)]("app", "session", "task")
    parts = subject.split(".")
    place = data.draw(st.integers(0, len(parts) - 1))
    wrong = data.draw(st.one_of(st.sampled_from(["", "*", ">", "a b", "é", "a\n", "x.y"]), illegal_names))
    with pytest.raises(MalformedMessage):
        parse(".".join([*parts[:place], wrong, *parts[place + 1 :]]))


@pytest.mark.parametrize("parser", PARSERS)
@given(st.text())
def test_a_parser_refuses_any_foreign_text(parser: str, text: str) -> None:
    with pytest.raises(MalformedMessage):
        PARSERS[parser][0](text)


@pytest.mark.parametrize("parser", PARSERS)
def test_a_parser_refuses_a_subject_with_more_or_fewer_tokens(parser: str) -> None:
    parse, own = PARSERS[parser]
    subject = BUILDERS[min(own)]("app", "session", "task")
    for wrong in (f"{subject}.more", subject.rpartition(".")[0], f"x.{subject}", subject.removeprefix("flame.")):
        with pytest.raises(MalformedMessage):
            parse(wrong)


@given(application_names, tokens, tokens)
def test_a_sessions_pattern_matches_its_subjects_and_no_others(application: str, session: str, task: str) -> None:
    def matches(pattern: str, subject: str) -> bool:
        names, given_names = pattern.split("."), subject.split(".")
        return len(names) == len(given_names) and all(p in ("*", n) for p, n in zip(names, given_names, strict=True))

    assert matches(subjects.session_tasks(application, session), subjects.task(application, session, task))
    assert matches(subjects.session_results(application, session), subjects.result(application, session, task))
    assert matches(
        subjects.session_task_events(application, session), subjects.event(application, session, task, "done")
    )
    assert not matches(subjects.session_tasks(application, session), subjects.task(application, session + "x", task))
    assert not matches(subjects.session_tasks(application, session), subjects.result(application, session, task))
    assert matches(subjects.executor_reports(session), subjects.executor_report(session, task))


# ---- streams, consumers, buckets


@given(application_names)
def test_an_applications_streams_have_names_that_a_server_takes_and_no_two_alike(application: str) -> None:
    names = [make(application) for make in (subjects.task_stream, subjects.result_stream, subjects.log_stream)]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,255}", name) for name in names)


@given(tokens, st.integers(min_value=0, max_value=2**63))
def test_a_consumers_name_tells_its_session_and_epoch(session: str, epoch: int) -> None:
    name = subjects.consumer(session, epoch)
    assert subjects.consumer_session(name) == (session, epoch)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,255}", name)


@pytest.mark.parametrize("name", ["", "-", "session", "session-", "-5", "session-x", "session-1x", "session-٣", "5"])
def test_a_foreign_consumers_name_is_refused(name: str) -> None:
    with pytest.raises(MalformedMessage):
        subjects.consumer_session(name)


@given(tokens, tokens)
def test_an_executors_key_lies_among_those_of_its_node(node: str, executor: str) -> None:
    key = subjects.executor_key(node, executor)
    assert key.split(".") == [node, executor]
    assert subjects.node_executors(node) == f"{node}.*"
