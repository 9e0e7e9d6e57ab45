"""What ``flmexec`` takes and returns, as bytes."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame import scripts
from flame.errors import FlameError, InvalidArgument, MalformedMessage
from flame.protocol.codec import pack
from flame.scripts import Script, ScriptResult, decode, encode, encode_result, read_script, shorten
from tests.unit.strategies import anything, plain_text

outputs = st.binary(max_size=400).filter(lambda data: scripts.NOTE not in data)
results = st.builds(
    ScriptResult,
    status=st.integers(-64, 255),
    stdout=st.binary(max_size=200),
    stderr=st.binary(max_size=200),
    cut=st.integers(0, 2**40),
    timed_out=st.booleans(),
)


@given(plain_text, st.sampled_from(scripts.LANGUAGES), st.binary(max_size=100), st.none() | st.floats(0.1, 1e6))
def test_a_script_comes_back_as_it_was(code: str, language: str, input: bytes, timeout_s: float | None) -> None:
    read, as_json = read_script(encode(code, language=language, input=input, timeout_s=timeout_s))
    assert read == Script(code=code, language=language, input=input, timeout_s=timeout_s)
    assert not as_json


@given(plain_text, plain_text)
def test_a_script_can_be_written_by_hand(code: str, input: str) -> None:
    for written in (json.dumps({"code": code, "input": input}), json.dumps({"code": code, "input": input}, indent=2)):
        assert read_script(written.encode()) == (Script(code=code, input=input.encode()), True)


@given(results)
def test_a_result_comes_back_as_it_was(result: ScriptResult) -> None:
    assert decode(encode_result(result)) == result


@given(results)
def test_in_json_a_result_is_text(result: ScriptResult) -> None:
    read = json.loads(encode_result(result, as_json=True))
    assert read["stdout"] == result.stdout.decode("utf-8", "replace")
    assert decode(encode_result(result, as_json=True)).status == result.status


@given(outputs, outputs, st.booleans())
def test_an_encoded_result_keeps_its_limit_and_tells_what_is_missing(out: bytes, err: bytes, as_json: bool) -> None:
    result = ScriptResult(status=1, stdout=out, stderr=err)
    data = encode_result(result, as_json=as_json, limit=400)
    read = decode(data)
    assert len(data) <= 400
    if read.cut == 0 and not as_json:
        assert read == result
    if not as_json:
        notes = sum(text.count(scripts.NOTE) for text in (read.stdout, read.stderr))
        assert len(read.stdout) + len(read.stderr) - notes * len(scripts.NOTE) + read.cut == len(out) + len(err)


@given(outputs, st.integers(0, 300), st.integers(0, 300))
def test_what_was_shortened_can_be_shortened_again(data: bytes, first: int, second: int) -> None:
    once, cut = shorten(data, max(first, second))
    again, more = shorten(once, min(first, second))
    assert again == shorten(data, min(first, second))[0]
    assert cut + more == shorten(data, min(first, second))[1]


@given(st.binary(max_size=100))
def test_rubbish_is_refused_as_what_it_is(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        read_script(data)
    with pytest.raises(MalformedMessage):
        decode(data)


@given(st.dictionaries(st.sampled_from(["v", "code", "language", "input", "timeout_s", "other"]), anything))
def test_fields_of_any_type_are_read_or_refused(found: dict[str, object]) -> None:
    with suppress(FlameError):
        script, _ = read_script(pack(found))
        assert isinstance(script.code, str)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), "1", True])
def test_a_time_limit_is_a_number_above_nothing(timeout_s: object) -> None:
    with pytest.raises(InvalidArgument, match="timeout_s: expected a number of seconds above 0"):
        encode("", timeout_s=timeout_s)  # type: ignore[arg-type]  # that is the point
