"""What passes over the wire: it comes back as it was, newer additions are ignored, and rubbish is refused."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable
from typing import Any, Protocol, Self

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import FlameError, InvalidArgument, MalformedMessage, SessionNotFound, UnsupportedVersion
from flame.protocol import messages as hot_path
from flame.protocol import supervision
from flame.protocol.api import CreateSession, Info, LookUpTasks, TaskLooks, answer_error, answer_ok, read_answer
from flame.protocol.chunks import ChunkMessage
from flame.protocol.codec import VERSION, pack, unpack
from flame.protocol.codes import ErrorCode
from flame.protocol.events import ClusterEvent
from flame.protocol.messages import Attempts, ResultRecord, RunningEvent, TaskFault, TaskMessage, TaskOptions
from flame.protocol.progress import Progress
from flame.protocol.records import ApplicationSpec, SessionOptions
from flame.protocol.states import TaskState
from flame.protocol.supervision import LEAVE, SERVE, WAIT, Control, ExecutorReport, LogChunk, Orders
from tests.unit.strategies import amounts, anything, made_of_fields, newer_keys, plain_text


class Message(Protocol):
    """A message of any kind."""

    def encode(self) -> bytes: ...

    @classmethod
    def decode(cls, data: bytes) -> Self: ...


MESSAGES: dict[type[Any], st.SearchStrategy[Any]] = {
    TaskMessage: made_of_fields(TaskMessage),
    ResultRecord: made_of_fields(ResultRecord, state=st.sampled_from([state for state in TaskState if state.terminal])),
    RunningEvent: made_of_fields(RunningEvent),
    ExecutorReport: made_of_fields(ExecutorReport),
    Orders: made_of_fields(Orders, want=st.sampled_from([SERVE, LEAVE, WAIT])),
    Attempts: made_of_fields(Attempts),
    LogChunk: made_of_fields(LogChunk),
    ChunkMessage: made_of_fields(ChunkMessage),
    Progress: made_of_fields(Progress),
    Control: made_of_fields(Control),
    ClusterEvent: made_of_fields(ClusterEvent),
}
"""Every kind of message, as it may be made."""
DECODERS: dict[str, Callable[[bytes], object]] = {kind.__name__: kind.decode for kind in MESSAGES}
messages = st.sampled_from(list(MESSAGES)).flatmap(lambda kind: MESSAGES[kind])


def test_every_kind_of_message_is_tested_here() -> None:
    kinds = {
        value
        for module in (hot_path, supervision)
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    }
    assert {kind for kind in kinds if hasattr(kind, "decode")} | {ClusterEvent, ChunkMessage, Progress} == set(MESSAGES)


# ---- the codec


@given(st.dictionaries(plain_text, anything, max_size=5).filter(lambda fields: "nan" not in repr(fields)))
def test_a_map_comes_back_as_it_was(fields: dict[str, Any]) -> None:
    whole = {**fields, "v": VERSION}
    assert unpack(pack(whole)) == whole


@given(st.binary(max_size=200))
def test_rubbish_is_malformed_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        unpack(data)


@pytest.mark.parametrize("value", [None, 1, "text", b"bytes", [], [{"v": 1}], True])
def test_what_is_no_map_is_malformed(value: object) -> None:
    with pytest.raises(MalformedMessage, match="expected a MessagePack map"):
        unpack(msgpack.packb(value))


@pytest.mark.parametrize("version", [VERSION + 1, VERSION + 1000, 2**64 - 1])
def test_a_newer_version_is_refused_as_such(version: int) -> None:
    with pytest.raises(UnsupportedVersion, match="newer"):
        unpack(msgpack.packb({"v": version}))


@pytest.mark.parametrize("version", [None, 0, -1, "1", "2", b"1", [], {}, 1.5, 2.5, False])
def test_what_is_no_version_is_malformed(version: object) -> None:
    with pytest.raises(MalformedMessage) as refusal:
        unpack(msgpack.packb({"v": version}))
    assert not isinstance(refusal.value, UnsupportedVersion)


def test_a_map_without_a_version_is_malformed() -> None:
    with pytest.raises(MalformedMessage, match="v=1"):
        unpack(msgpack.packb({}))


# ---- messages


@given(messages)
def test_a_message_comes_back_as_it_was(message: Message) -> None:
    assert type(message).decode(message.encode()) == message


@given(messages, newer_keys)
def test_keys_of_a_newer_version_are_ignored(message: Message, newer: dict[str, Any]) -> None:
    fields = unpack(message.encode())
    assert type(message).decode(pack({**fields, **newer})) == message


@given(made_of_fields(Orders).filter(lambda orders: orders.assignment is not None), newer_keys)
def test_keys_of_a_newer_version_are_ignored_inside_too(orders: Orders, newer: dict[str, Any]) -> None:
    fields = unpack(orders.encode())
    fields["assignment"].update(newer)
    assert Orders.decode(pack(fields)).assignment == orders.assignment


@given(messages)
def test_a_message_of_a_newer_version_is_refused_as_such(message: Message) -> None:
    fields = unpack(message.encode())
    with pytest.raises(UnsupportedVersion):
        type(message).decode(pack({**fields, "v": VERSION + 1}))


@pytest.mark.parametrize("decoder", DECODERS)
@given(st.binary(max_size=200))
def test_rubbish_is_never_taken_for_a_message(decoder: str, data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        DECODERS[decoder](data)


@given(messages, st.data())
def test_a_damaged_message_is_malformed_or_another_message(message: Message, data: st.DataObject) -> None:
    whole = bytearray(message.encode())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(MalformedMessage):
        type(message).decode(damaged)


@given(messages, st.data())
def test_a_message_with_a_field_of_any_other_type_never_raises_anything_else(
    message: Message, data: st.DataObject
) -> None:
    fields = unpack(message.encode())
    name = data.draw(st.sampled_from(sorted(fields)))
    fields[name] = data.draw(anything)
    with contextlib.suppress(MalformedMessage):
        type(message).decode(pack(fields))


@pytest.mark.parametrize("decoder", DECODERS)
@given(messages)
def test_one_kind_of_message_is_never_taken_for_another(decoder: str, message: Message) -> None:
    decode = DECODERS[decoder]
    if decode != type(message).decode:
        with pytest.raises(MalformedMessage, match="expected a"):
            decode(message.encode())


@pytest.mark.parametrize("state", [TaskState.PENDING, TaskState.RUNNING, "done", "", None, 1, [], {}])
def test_a_record_is_terminal(state: object) -> None:
    with pytest.raises(MalformedMessage, match="terminal state"):
        ResultRecord.decode(pack({"v": VERSION, "kind": "result", "state": state}))


def test_an_order_that_is_not_known_yet_is_to_serve() -> None:
    assert Orders.decode(pack({"v": VERSION, "kind": "orders", "want": "dance"})).want == SERVE


def test_a_fault_needs_nothing() -> None:
    assert TaskFault.from_fields({}) == TaskFault("", "")
    assert TaskFault.from_fields(None) is None
    with pytest.raises(MalformedMessage):
        TaskFault.from_fields("it broke")


def test_what_a_task_does_not_need_is_not_sent() -> None:
    assert set(unpack(TaskMessage(b"x").encode())) == {"v", "kind", "input"}


# ---- answers of the control API


def test_an_answer_brings_what_was_asked_for() -> None:
    info = Info(version="1", scheduler="s", nodes=3)
    assert Info.model_validate(read_answer(answer_ok(info))) == info
    assert read_answer(answer_ok(None)) == {}


def test_an_answer_raises_what_the_request_was_refused_with() -> None:
    with pytest.raises(SessionNotFound, match="no such session"):
        read_answer(answer_error(SessionNotFound("no such session")))


def test_a_refusal_of_a_newer_version_is_a_flame_error() -> None:
    with pytest.raises(FlameError, match="too cold") as refusal:
        read_answer(pack({"v": VERSION, "error": {"code": "frozen", "message": "too cold"}}))
    assert type(refusal.value) is FlameError


@pytest.mark.parametrize("fields", [{}, {"ok": 1}, {"error": "text"}, {"ok": None}, {"error": None}])
def test_what_is_no_answer_is_malformed(fields: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage, match="expected ok or error"):
        read_answer(pack({"v": VERSION, **fields}))


@given(st.builds(SessionOptions, resources=amounts), st.binary(max_size=50))
def test_a_request_comes_back_as_it_was(options: SessionOptions, common_data: bytes) -> None:
    request = CreateSession(application="a", common_data=common_data, options=options)
    fields = unpack(request.encode())
    del fields["v"]
    assert CreateSession.check("create_session", fields) == request


@given(st.lists(plain_text, max_size=5), st.dictionaries(plain_text, st.binary(max_size=20), max_size=5))
def test_looks_come_back_as_they_were(tasks: list[str], results: dict[str, bytes]) -> None:
    looks = TaskLooks(waiting=tuple(tasks), results=results)
    assert TaskLooks.model_validate(read_answer(answer_ok(looks))) == looks
    request = LookUpTasks(application="a", session="s", tasks=tuple(tasks))
    assert unpack(request.encode())["tasks"] == tasks or not tasks


def test_every_code_is_a_plain_word() -> None:
    assert all(code.value == code.name.lower() for code in ErrorCode)


# ---- options of a task


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout_s", 0),
        ("timeout_s", -1),
        ("timeout_s", 24 * 3600 + 1),
        ("timeout_s", float("nan")),
        ("timeout_s", float("inf")),
        ("timeout_s", "1"),
        ("timeout_s", True),
        ("expires_s", -0.5),
        ("delay_s", -0.5),
        ("delay_s", [1]),
        ("max_attempts", 0),
        ("max_attempts", 1001),
        ("max_attempts", 1.5),
    ],
)
def test_options_of_a_task_that_can_not_be_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(
        InvalidArgument, match=rf"options: {name}: expected a (whole )?number from .*, got {re.escape(repr(value))}"
    ):
        TaskOptions(**{name: value})
    with pytest.raises(MalformedMessage, match=name):
        TaskMessage.decode(pack({"v": VERSION, "kind": "task", "input": b"", "options": {name: value}}))


@pytest.mark.parametrize("name", ["timeout_s", "expires_s", "delay_s", "max_attempts"])
def test_options_of_a_task_have_the_limits_of_those_of_an_application(name: str) -> None:
    limits = ApplicationSpec.model_fields[name].metadata
    least, most = (
        next(value for limit in limits if (value := getattr(limit, which, None)) is not None) for which in ("ge", "le")
    )
    for value in (least, most):
        assert getattr(TaskOptions(**{name: value}), name) == value
    for value in (least - 0.001, most + 1):
        with pytest.raises(InvalidArgument, match=name):
            TaskOptions(**{name: value})
