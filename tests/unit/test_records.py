"""The control plane's records, and what users may write into them."""

from __future__ import annotations

import contextlib
import inspect
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import InvalidArgument, MalformedMessage, UnsupportedVersion
from flame.protocol import records as protocol
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.records import (
    ApplicationRecord,
    ApplicationSpec,
    BindingRecord,
    ExecutorRecord,
    NodeRecord,
    Record,
    SessionOptions,
    SessionRecord,
    decode_record,
)
from flame.protocol.resources import Resources
from tests.unit.strategies import anything, application_names, made_of_fields, newer_keys, safe_text, tokens

names_of_variables = safe_text.filter(lambda text: text and "=" not in text)
specs = made_of_fields(
    ApplicationSpec,
    command=safe_text.filter(bool),
    arguments=st.lists(safe_text, max_size=3).map(tuple),
    environments=st.dictionaries(names_of_variables, safe_text, max_size=3),
    working_directory=safe_text,
    max_instances=st.integers(5, 10_000),
    min_instances=st.integers(0, 5),
)
options = made_of_fields(
    SessionOptions,
    max_instances=st.none() | st.integers(5, 10_000),
    min_instances=st.none() | st.integers(0, 5),
)
names = {"application": application_names, "session": tokens, "node": tokens}
RECORDS: dict[type[Record], st.SearchStrategy[Record]] = {
    ApplicationRecord: made_of_fields(ApplicationRecord, name=application_names, spec=specs),
    SessionRecord: made_of_fields(SessionRecord, id=tokens, options=options, **names),
    NodeRecord: made_of_fields(NodeRecord, name=tokens),
    BindingRecord: made_of_fields(BindingRecord, executor=tokens, **names),
    ExecutorRecord: made_of_fields(ExecutorRecord, id=tokens, **names),
}
records = st.sampled_from(list(RECORDS)).flatmap(lambda kind: RECORDS[kind])


def _with_newer_keys(value: Any, newer: dict[str, Any]) -> Any:
    """Put keys into a map and into every map of ours within it, as a newer version might."""
    if not isinstance(value, dict):
        return value
    ours = {"spec", "options"}
    return {name: _with_newer_keys(inner, newer) if name in ours else inner for name, inner in value.items()} | newer


# ---- records


def test_every_kind_of_record_is_tested_here() -> None:
    kinds = {value for value in vars(protocol).values() if inspect.isclass(value) and issubclass(value, Record)}
    assert kinds - {Record} == set(RECORDS)


@given(records)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    assert type(record).decode(record.encode()) == record


@given(records, newer_keys)
def test_keys_of_a_newer_version_are_ignored_at_every_depth(record: Record, newer: dict[str, Any]) -> None:
    fields = _with_newer_keys(unpack(record.encode()), newer)
    assert type(record).decode(pack(fields)) == record


@given(records)
def test_a_record_of_a_newer_version_is_refused_as_such(record: Record) -> None:
    fields = {**unpack(record.encode()), "v": VERSION + 1}
    with pytest.raises(UnsupportedVersion):
        type(record).decode(pack(fields))
    assert decode_record(type(record), pack(fields)) is None


@pytest.mark.parametrize("kind", RECORDS)
@given(st.binary(max_size=100))
def test_rubbish_is_never_taken_for_a_record(kind: type[Record], data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        kind.decode(data)
    assert decode_record(kind, data) is None


@given(records, st.data())
def test_a_record_with_a_field_of_any_other_type_is_read_or_malformed(record: Record, data: st.DataObject) -> None:
    fields = unpack(record.encode())
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(anything)
    with contextlib.suppress(MalformedMessage):
        type(record).decode(pack(fields))


@given(records)
def test_a_record_is_changed_by_making_another(record: Record) -> None:
    name = next(iter(type(record).model_fields))
    changed = record.changed(**{name: "other"})
    assert getattr(changed, name) == "other"
    assert getattr(record, name) != "other" or changed == record
    with pytest.raises(ValueError, match="frozen"):
        setattr(record, name, "other")


def test_a_malformed_record_says_what_is_wrong_with_which_field() -> None:
    with pytest.raises(MalformedMessage, match=r"SessionRecord: application: Field required; created: Field required"):
        SessionRecord.decode(pack({"v": VERSION, "id": "s"}))


# ---- what users write

WRONG_SPECS: dict[str, tuple[object, str]] = {
    "not a map": ([], ".*valid dictionary"),
    "nothing": ({}, "command: missing"),
    "an unknown field": ({"command": "x", "comand": "y"}, "comand: unknown field"),
    "a wrong type": ({"command": ["x"]}, r"command: .*valid string.*got \"?'?\['x'\]"),
    "a wrong number": ({"command": "x", "max_instances": "many"}, "max_instances: .*integer.*got 'many'"),
    "no executors at all": ({"command": "x", "max_instances": 0}, "max_instances: .*greater than or equal to 1"),
    "less than none": ({"command": "x", "min_instances": -1}, "min_instances: .*greater than or equal to 0"),
    "more at least than at most": ({"command": "x", "min_instances": 3, "max_instances": 2}, "min_instances 3 is over"),
    "an endless delay": ({"command": "x", "delay_release_s": math.inf}, "delay_release_s: .*finite"),
    "a delay before the end": ({"command": "x", "delay_release_s": -1}, "delay_release_s: .*greater than or equal"),
    "an unknown shim": ({"command": "x", "shim": "Wasm"}, "shim: .*'Nats' or 'Log', got 'Wasm'"),
    "a variable without a name": (
        {"command": "x", "environments": {"": "y"}},
        "environments: '' is no name of a variable",
    ),
    "a variable with an equals sign": (
        {"command": "x", "environments": {"A=B": "y"}},
        "environments: 'A=B' is no name",
    ),
    "a NUL in a command": ({"command": "x\0y"}, ".*NUL"),
    "a NUL in an argument": ({"command": "x", "arguments": ["a\0"]}, ".*NUL"),
    "a NUL in a variable": ({"command": "x", "environments": {"A": "\0"}}, ".*NUL"),
    "a schema as text": ({"command": "x", "input_schema": "{}"}, "input_schema: .*dictionary"),
    "a schema that is none of JSON": ({"command": "x", "output_schema": {"a": {1: 2}}}, "output_schema: .*JSON object"),
    "a schema with an endless number": (
        {"command": "x", "input_schema": {"a": math.inf}},
        "input_schema: .*JSON object",
    ),
    "a schema with an object of Python": (
        {"command": "x", "input_schema": {"a": {1, 2}}},
        "input_schema: .*JSON object",
    ),
    "a schema with half a character": (
        {"command": "x", "input_schema": {"a": "\udce9"}},
        "input_schema: .*JSON object",
    ),
    "a schema with a huge number": ({"command": "x", "input_schema": {"a": 2**70}}, "input_schema: .*JSON object"),
    "a schema that is too large": (
        {"command": "x", "common_data_schema": {"a": "x" * 70_000}},
        "common_data_schema: .*65536",
    ),
}


@pytest.mark.parametrize("case", WRONG_SPECS)
def test_a_wrong_application_is_refused_by_name(case: str) -> None:
    fields, text = WRONG_SPECS[case]
    with pytest.raises(InvalidArgument, match=rf"^application 'a': (.*; )?{text}") as refusal:
        ApplicationSpec.check("application 'a'", fields)
    assert "\n" not in str(refusal.value)


def test_every_wrong_field_is_named_at_once() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        ApplicationSpec.check("it", {"command": 1, "concurrency": 0, "nonsense": 0})
    for name in ("command", "concurrency", "nonsense"):
        assert name in str(refusal.value)


def test_the_log_shim_needs_no_command() -> None:
    assert ApplicationSpec.check("it", {"shim": "Log"}).command == ""


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a negative priority": ({"priority": -1}, "priority"),
    "resources that can't be read": ({"resources": "cpu=lots"}, "resources .*'lots' is no amount of cpu"),
    "less than no cpu": ({"resources": [-1.0, 0, 0]}, "resources"),
    "less than no memory": ({"resources": [1.0, -1, 0]}, "resources"),
    "less than no gpu": ({"resources": [1.0, 0, -1]}, "resources"),
    "a cpu that is no number": ({"resources": [math.nan, 0, 0]}, "resources"),
    "an endless cpu": ({"resources": [math.inf, 0, 0]}, "resources"),
    "a label without a key": ({"labels": {"": "x"}}, "labels: key '' is no key of a label"),
    "a label with a blank": ({"labels": {"a b": "x"}}, "labels: key 'a b' is no key of a label: expected 1 to 63"),
    "a label with a strange value": (
        {"labels": {"a": "é"}},
        "labels: value 'é' is no value of a label: expected 0 to 63",
    ),
    "a label with a line break": ({"labels": {"a": "b\n"}}, "labels: value"),
    "a long label": ({"labels": {"a" * 64: ""}}, "labels: key"),
    "a number for a label": ({"labels": {"a": 1}}, "labels.a: .*string"),
    "too many labels": ({"labels": {str(n): "" for n in range(33)}}, "labels: expected at most 32 labels, got 33"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_of_a_session_are_refused_by_name(case: str) -> None:
    fields, text = WRONG_OPTIONS[case]
    with pytest.raises(InvalidArgument, match=text):
        SessionOptions.check("session", fields)


def test_labels_may_be_empty_and_have_a_prefix() -> None:
    labels = {"example.com/team_1": "", "a" * 63: "b" * 63}
    assert SessionOptions.check("session", {"labels": labels}).labels == labels


def test_resources_may_be_written_as_text() -> None:
    options = SessionOptions.check("session", {"resources": "cpu=2,mem=1g"})
    assert options.resources == Resources(cpu=2, memory=2**30, gpu=0)
