"""The names that `flame` offers: these and no others, and each says what it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import flame
import flame.scripts
import flame.testing

NAMES = [
    "ApplicationDisabled",
    "ApplicationExists",
    "ApplicationInUse",
    "ApplicationNotFound",
    "ApplicationSpec",
    "BrokerUnavailable",
    "Chunk",
    "ChunkStream",
    "ChunksGone",
    "CloseMode",
    "ClusterEvent",
    "CommonData",
    "ConfigurationError",
    "Connection",
    "Entrypoint",
    "ExecutorNotFound",
    "FlameError",
    "FlameService",
    "FunctionCall",
    "FunctionSession",
    "Instance",
    "InstanceLost",
    "InvalidArgument",
    "InvalidInput",
    "InvalidName",
    "KeyReused",
    "LogLine",
    "MethodNotFound",
    "NodeNotFound",
    "NotFound",
    "PayloadTooLarge",
    "Progress",
    "ProgressBar",
    "QueueFull",
    "Refused",
    "RemoteFunction",
    "SchedulerUnavailable",
    "SchemaMismatch",
    "Secret",
    "Session",
    "SessionContext",
    "SessionEvent",
    "SessionExists",
    "SessionFailed",
    "SessionInfo",
    "SessionNotFound",
    "SessionNotOpen",
    "SessionSpec",
    "SessionState",
    "SpecMismatch",
    "StaleVersion",
    "State",
    "StateEntry",
    "Task",
    "TaskCancelled",
    "TaskContext",
    "TaskEnded",
    "TaskError",
    "TaskExpired",
    "TaskFailed",
    "TaskFault",
    "TaskHandle",
    "TaskInformer",
    "TaskNotFound",
    "TaskOptions",
    "TaskOutput",
    "TaskState",
    "TaskTimeout",
    "TimedOut",
    "TypedChunk",
    "TypedHandle",
    "TypedService",
    "TypedSession",
    "TypedStream",
    "TypedTask",
    "Unavailable",
    "Unpicklable",
    "ValueGone",
    "WrongThread",
    "__version__",
    "as_json",
    "close_session",
    "connect",
    "create_session",
    "current_task",
    "entrypoint",
    "functions",
    "open_session",
    "register_application",
    "run",
    "schemas_of",
]


def test_the_names_are_these() -> None:
    assert flame.__all__ == NAMES


def things() -> Iterator[tuple[str, Any]]:
    for module in (flame, flame.testing):
        for name in module.__all__:
            if name != "__version__":
                yield f"{module.__name__}.{name}", getattr(module, name)
    for name, value in vars(flame.scripts).items():
        if not name.startswith("_") and getattr(value, "__module__", "") == "flame.scripts":
            yield f"flame.scripts.{name}", value


def undocumented(name: str, thing: Any) -> list[str]:
    """What of a thing's public parts, or the thing, doesn't say what it is; a method may have that from its base."""
    found = [] if inspect.getdoc(thing) else [name]
    if inspect.isclass(thing):
        for part, value in vars(thing).items():
            is_code = inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod)
            if not part.startswith("_") and is_code and not inspect.getdoc(getattr(thing, part)):
                found.append(f"{name}.{part}")
    return found


@pytest.mark.parametrize(("name", "thing"), list(things()), ids=lambda given: given if isinstance(given, str) else "")
def test_each_says_what_it_is(name: str, thing: Any) -> None:
    assert undocumented(name, thing) == []


def test_what_says_nothing_is_found() -> None:
    class Mute:
        def part(self) -> None: ...

    assert undocumented("Mute", Mute) == ["Mute", "Mute.part"]
