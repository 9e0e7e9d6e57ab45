"""The tree of errors, as drawn and as it is."""

from __future__ import annotations

import inspect
import re

import pytest

import flame
from flame import errors
from flame.broker import errors as broker_errors
from flame.client.task import Task
from flame.errors import FlameError, TaskError, from_code
from flame.protocol.codes import ErrorCode
from flame.protocol.states import TaskState

TASK_CODES = {
    ErrorCode.TASK_FAILED,
    ErrorCode.TASK_CANCELLED,
    ErrorCode.TASK_EXPIRED,
    ErrorCode.TASK_TIMEOUT,
    ErrorCode.TASK_POISONED,
    ErrorCode.OUT_OF_MEMORY,
}
"""These name what became of a task; their exceptions carry the task and are made from its record."""

ALSO_NAMED_BY_A_CODE: dict[ErrorCode, set[type[FlameError]]] = {
    ErrorCode.INVALID_ARGUMENT: {
        errors.ConfigurationError,
        errors.InvalidInput,
        errors.MalformedMessage,
        errors.MethodNotFound,
        errors.SchemaMismatch,
        errors.TaskEnded,
        errors.Unpicklable,
        errors.WrongThread,
    },
    ErrorCode.TASK_NOT_FOUND: {errors.ChunksGone},
    ErrorCode.TASK_FAILED: {errors.InstanceLost},
    ErrorCode.UNAVAILABLE: {errors.BrokerUnavailable, errors.SchedulerUnavailable, errors.TimedOut},
    ErrorCode.INTERNAL: {FlameError, errors.NotFound, errors.Refused, TaskError, errors.IllegalTransition},
}
"""Exceptions that a code does not become at the other side: a nearer one does."""

LINE = re.compile(r"^ {4}(?P<indent>(?:│ {3}| {4})*)(?:[├└]── )?(?P<name>[A-Z]\w+)(?: \((?P<also>\w+)\))?(?: |$)")


def _drawn() -> dict[str, tuple[str, str]]:
    """Read the tree in the docstring: each name's parent and what it is besides."""
    assert errors.__doc__ is not None
    found: dict[str, tuple[str, str]] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        depth = len(match["indent"]) // 4 + (1 if "── " in line else 0)
        path[depth:] = [match["name"]]
        found[match["name"]] = (path[depth - 1] if depth else "", match["also"] or "")
    return found


def _real() -> dict[str, type[FlameError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, FlameError) and value.__module__ == errors.__name__
    }


def test_the_tree_that_is_drawn_is_the_tree_that_is() -> None:
    def parent(kind: type[FlameError]) -> str:
        return next((base.__name__ for base in kind.__bases__ if issubclass(base, FlameError)), "")

    def also(kind: type[FlameError]) -> str:
        return next((b.__name__ for b in kind.__bases__ if not issubclass(b, FlameError) and b is not Exception), "")

    assert _drawn() == {name: (parent(kind), also(kind)) for name, kind in _real().items()}


@pytest.mark.parametrize("code", sorted(set(ErrorCode) - TASK_CODES))
def test_a_code_becomes_the_exception_that_has_it(code: ErrorCode) -> None:
    error = from_code(code.value, "what happened")
    assert type(error).code is code
    assert type(error) is not FlameError
    assert str(error) == "what happened"


@pytest.mark.parametrize("code", [*sorted(TASK_CODES), "a code of a newer version", ""])
def test_any_other_code_becomes_a_plain_flame_error(code: str) -> None:
    assert type(from_code(code, "what happened")) is FlameError


def test_every_exception_has_a_code_of_its_own_or_is_listed_as_sharing_one() -> None:
    for kind in _real().values():
        others = {other for other in _real().values() if other.code is kind.code and other is not kind}
        named = kind in ALSO_NAMED_BY_A_CODE.get(kind.code, set())
        assert named or others <= ALSO_NAMED_BY_A_CODE.get(kind.code, set()), kind


@pytest.mark.parametrize("kind", [k for k in _real().values() if not issubclass(k, TaskError)])
def test_an_exception_that_went_over_the_wire_is_caught_as_before(kind: type[FlameError]) -> None:
    arrived = from_code(kind.code.value, "text")
    if kind not in ALSO_NAMED_BY_A_CODE.get(kind.code, set()):
        assert type(arrived) is kind


@pytest.mark.parametrize("kind", _real().values())
def test_an_exception_says_when_it_arises(kind: type[FlameError]) -> None:
    assert kind.__doc__
    assert inspect.cleandoc(kind.__doc__).endswith((".", "why.", "details."))


def test_a_tasks_error_carries_the_task() -> None:
    task = Task("t", "s", "a", TaskState.FAILED)
    for kind in (errors.TaskFailed, errors.TaskTimeout, errors.TaskCancelled, errors.TaskExpired):
        assert kind("text", task).task is task


def test_every_exception_that_a_user_meets_is_a_name_of_the_package() -> None:
    inner = {"MalformedMessage", "UnsupportedVersion", "IllegalTransition", "InternalError"}
    assert {name for name in _real() if name not in flame.__all__} == inner


@pytest.mark.parametrize("name", ["Duplicate", "StreamFull", "ConsumerMissing", "RevisionConflict", "NotAcknowledged"])
def test_the_brokers_errors_are_flame_errors_too(name: str) -> None:
    assert issubclass(getattr(broker_errors, name), FlameError)


def test_only_what_may_have_happened_counts_as_unavailable() -> None:
    assert issubclass(broker_errors.NotAcknowledged, errors.BrokerUnavailable)
    for name, kind in vars(broker_errors).items():
        if inspect.isclass(kind) and issubclass(kind, broker_errors.BrokerError):
            assert not issubclass(kind, errors.Unavailable), name
