"""`flame.sync` beside the asynchronous API: the same names, arguments and meanings, so that they can't drift apart."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import flame
import flame.sync
from flame.calls import call
from flame.calls import session as function_session
from flame.client import api, connection, session, task, typed
from flame.sync import background, callbacks, iterators, mapping

NOT_FOR_USERS = {
    "Connection": {
        "broker",
        "task_ids",
        "keep_alive",
        "call",
        "request_close",
        "get_session_record",
        "forget",
        "check_usable",
    },
    "TypedSession": {"read_chunk"},
    "TypedHandle": {"handle"},  # an attribute of both
    "Session": {"listen", "reconcile_now", "abandon", "submit", "leave_large_outputs"},
    "FunctionSession": {"caller", "check", "input_of", "make"},
    "FunctionCall": {
        "dependencies",
        "ended",
        "fail",
        "fail_because_of",
        "failed_with",
        "is_large",
        "loop",
        "message",
        "met",
        "options",
        "output",
        "read",
        "small_output",
        "submitted",
        "unmet",
        "value",
        "whole",
    },
    "RemoteFunction": {"prepare"},
    "TaskHandle": {
        "created",
        "digest",
        "future",
        "payload",
        "stored",
        "when_stored",
        "mark_stored",
        "finish",
        "learn",
        "lose",
        "note_progress",
    },
}
"""What the parts of the asynchronous API offer one another; see the comments in its classes."""

OF_A_FUTURE = {"result", "exception", "add_done_callback", "cancelled", "running", "lose_by_fork", "lose"}
"""What a synchronous handle has because it is a `concurrent.futures.Future`, and for its background."""

OF_AN_ITERATOR = {"next", "close"}
"""What a synchronous iterator has: a time limit, and its end, where the other is left by ``async with``."""

EXTRA = {"TypedStream": OF_AN_ITERATOR, **dict.fromkeys(("TaskHandle", "TypedHandle", "FunctionCall"), OF_A_FUTURE)}

DIFFERENT: dict[str, tuple[str, str]] = {
    "Session.map.inputs": (
        "Iterable[bytes | str] | AsyncIterable[bytes | str]",
        "Iterable[bytes | str]",
    ),  # they are taken on the calling thread
    "TypedSession.map.inputs": ("Iterable[I] | AsyncIterable[I]", "Iterable[I]"),
    "TypedSession.map()": ("AsyncGenerator[TypedTask[O], None]", "Generator[TypedTask[O], None, None]"),
    "FunctionSession.map.inputs": ("Iterable[Any] | AsyncIterable[Any]", "Iterable[Any]"),
    "FunctionSession.map()": ("AsyncGenerator[R | TaskError, None]", "Generator[R | TaskError, None, None]"),
    "FunctionCall.cancel()": ("TaskState", "bool"),
    "TypedHandle.cancel()": ("TaskState", "bool"),
    "TypedHandle.finished(...)": ("()", "(timeout)"),
    "TaskHandle.cancel()": ("TaskState", "bool"),  # as that of any future; the state is that of handle.task
    "TaskHandle.finished(...)": ("()", "(timeout)"),  # there is no asyncio.timeout to put around it
}
"""Where they differ, and why."""

CLASSES: list[tuple[type, type]] = [
    (connection.Connection, flame.sync.Connection),
    (session.Session, flame.sync.Session),
    (task.TaskHandle, flame.sync.TaskHandle),
    (typed.TypedSession, flame.sync.TypedSession),
    (typed.TypedHandle, flame.sync.TypedHandle),
    (typed.TypedStream, flame.sync.TypedStream),
    (function_session.FunctionSession, flame.sync.FunctionSession),
    (call.FunctionCall, flame.sync.FunctionCall),
]
ENTERING = {"__aenter__": "__enter__", "__aexit__": "__exit__"}
WAITED_FOR = re.compile(r"^(AsyncIterator|AsyncGenerator|ClusterEvents)(?:\[([\w ]+)(?:, None)?\])?$")


def public(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def waited(annotation: str) -> str:
    """Return what a synchronous method returns where an asynchronous one returns ``annotation``."""
    match = WAITED_FOR.match(annotation)
    if match is None:
        return annotation
    return f"BlockingIterator[{match[2] or 'ClusterEvent'}]"


def differences(name: str, theirs: Callable[..., Any], ours: Callable[..., Any]) -> list[str]:
    """Return in what two signatures differ, apart from what `DIFFERENT` says."""
    expected, found = inspect.signature(theirs), inspect.signature(ours)
    names = tuple("(" + ", ".join(n for n in s.parameters if n != "self") + ")" for s in (expected, found))
    if names[0] != names[1]:
        return [] if DIFFERENT.get(f"{name}(...)") == names else [f"{name}: {names}"]
    wrong = []
    for parameter in expected.parameters.values():
        other = found.parameters[parameter.name]
        annotations = (parameter.annotation, other.annotation)
        same = annotations[0] == annotations[1] or DIFFERENT.get(f"{name}.{parameter.name}") == annotations
        if not same or parameter.kind != other.kind or parameter.default != other.default:
            wrong.append(f"{name}: {parameter} and {other}")
    returned = (waited(expected.return_annotation), found.return_annotation)
    if returned[0] != returned[1] and DIFFERENT.get(f"{name}()") != returned:
        wrong.append(f"{name} returns {returned}")
    return wrong


@pytest.mark.parametrize(("theirs", "ours"), CLASSES, ids=lambda kind: kind.__name__)
def test_each_method_has_its_counterpart_with_the_same_signature(theirs: type, ours: type) -> None:
    kind = theirs.__name__
    wanted = public(vars(theirs)) - NOT_FOR_USERS.get(kind, set())
    extra = EXTRA.get(kind, set())
    inherited = {name for name in wanted if name not in vars(ours) and hasattr(ours, name)}
    assert wanted - inherited == public(vars(ours)) - extra
    for name in (*wanted, *(ENTERING if hasattr(theirs, "__aenter__") else ())):
        method, own = vars(theirs)[name], getattr(ours, ENTERING.get(name, name))
        if isinstance(method, property):
            assert isinstance(own, property)
            assert inspect.signature(method.fget) == inspect.signature(own.fget)  # type: ignore[arg-type]
        elif inspect.isfunction(method) and name not in inherited:
            assert not inspect.iscoroutinefunction(own)
            assert differences(f"{kind}.{name}", method, own) == []


def test_each_function_of_the_package_has_its_counterpart() -> None:
    functions = {name: value for name, value in vars(api).items() if inspect.iscoroutinefunction(value)}
    theirs = {
        **{name: value for name, value in functions.items() if value.__module__ == api.__name__},
        "connect": flame.connect,
    }
    assert set(theirs) == {name for name in flame.__all__ if inspect.iscoroutinefunction(getattr(flame, name))} - {
        "run"  # a service's
    }
    ours = {name: getattr(flame.sync, name) for name in flame.sync.__all__}
    assert {name for name, value in ours.items() if inspect.isfunction(value)} == {*theirs, "close", "functions"}
    assert differences("functions", flame.functions, flame.sync.functions) == []
    for name, function in theirs.items():
        assert differences(name, function, ours[name]) == []


def test_the_names_are_these_and_each_says_what_it_is() -> None:
    assert flame.sync.__all__ == [
        "BlockingIterator",
        "ChunkStream",
        "Connection",
        "FunctionCall",
        "FunctionSession",
        "Instance",
        "RemoteFunction",
        "Session",
        "TaskHandle",
        "TypedHandle",
        "TypedSession",
        "TypedStream",
        "close",
        "close_session",
        "connect",
        "create_session",
        "functions",
        "open_session",
        "register_application",
    ]
    for name in flame.sync.__all__:
        value = getattr(flame.sync, name)
        assert inspect.getdoc(value), name
        if inspect.isclass(value):
            for method in public(vars(value)):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"
    for module in (background, callbacks, iterators, mapping):
        assert module.__doc__


def test_a_comparison_of_signatures_finds_what_differs() -> None:
    async def theirs(a: int, *, b: str = "") -> int:
        raise NotImplementedError

    def default(a: int, *, b: str = "x") -> int:
        raise NotImplementedError

    def kind(a: int, b: str = "") -> int:
        raise NotImplementedError

    def fewer(a: int) -> int:
        raise NotImplementedError

    def returns(a: int, *, b: str = "") -> str:
        raise NotImplementedError

    for ours in (default, kind, fewer, returns):
        assert len(differences("f", theirs, ours)) == 1
    assert differences("f", theirs, theirs) == []


def test_whoever_does_not_use_it_does_not_load_it() -> None:
    script = (
        "import sys, threading\n"
        "import flame\n"
        "flame.connect, flame.Session, flame.run\n"
        "assert not [name for name in sys.modules if name.startswith('flame.sync')]\n"
        "import flame.sync\n"
        "assert threading.active_count() == 1, 'the background starts with the first call'\n"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


def test_the_docstrings_point_at_methods_that_are() -> None:
    for _, ours in CLASSES:
        for name in re.findall(r"see `flame\.(\w+)\.(\w+)`", inspect.getsource(ours)):
            assert hasattr(getattr(flame, name[0]), name[1]), name
    assert ast.parse(inspect.getsource(flame.sync)).body
