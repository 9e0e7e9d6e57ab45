"""Flame runs elastic workloads, AI agents first, on NATS JetStream.

A client opens a session of an application and invokes tasks::

    session = await flame.create_session("openai-agent", b"You are a weather forecaster.")
    task = await session.invoke(b"Who are you?")
    print(task.output)

A service is a class with three methods::

    class MyAgent(flame.FlameService):
        async def on_session_enter(self, context: flame.SessionContext): ...
        async def on_task_invoke(self, context: flame.TaskContext) -> flame.TaskOutput: ...
        async def on_session_leave(self): ...

    asyncio.run(flame.run(MyAgent()))

Names that are not in ``__all__`` are not part of the interface. Each is loaded when it is first used: a service has no
need of what a client needs, nor the reverse.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from flame.lazy import load_on_use
from flame.version import __version__

if TYPE_CHECKING:
    from flame.calls.call import FunctionCall
    from flame.calls.current import current_task
    from flame.calls.function import RemoteFunction
    from flame.calls.instance import Instance
    from flame.calls.session import FunctionSession, functions
    from flame.client.api import (
        close_session,
        create_session,
        open_session,
        register_application,
    )
    from flame.client.chunks import Chunk, ChunkStream
    from flame.client.connection import Connection, connect
    from flame.client.logs import LogLine
    from flame.client.progress_bar import ProgressBar
    from flame.client.session import Session
    from flame.client.spec import SessionSpec
    from flame.client.task import Task, TaskHandle, TaskInformer
    from flame.client.typed import TypedChunk, TypedHandle, TypedSession, TypedStream, TypedTask
    from flame.client.watching import SessionEvent
    from flame.credentials import Secret
    from flame.errors import (
        ApplicationDisabled,
        ApplicationExists,
        ApplicationInUse,
        ApplicationNotFound,
        BrokerUnavailable,
        ChunksGone,
        ConfigurationError,
        ExecutorNotFound,
        FlameError,
        InstanceLost,
        InvalidArgument,
        InvalidInput,
        InvalidName,
        KeyReused,
        MethodNotFound,
        NodeNotFound,
        NotFound,
        PayloadTooLarge,
        QueueFull,
        Refused,
        SchedulerUnavailable,
        SchemaMismatch,
        SessionExists,
        SessionFailed,
        SessionNotFound,
        SessionNotOpen,
        SpecMismatch,
        StaleVersion,
        TaskCancelled,
        TaskEnded,
        TaskError,
        TaskExpired,
        TaskFailed,
        TaskNotFound,
        TaskTimeout,
        TimedOut,
        Unavailable,
        Unpicklable,
        ValueGone,
        WrongThread,
    )
    from flame.protocol.api import SessionInfo
    from flame.protocol.events import ClusterEvent
    from flame.protocol.messages import TaskFault, TaskOptions
    from flame.protocol.progress import Progress
    from flame.protocol.records import ApplicationSpec
    from flame.protocol.states import CloseMode, SessionState, TaskState
    from flame.service.contexts import FlameService, SessionContext, TaskContext, TaskOutput
    from flame.service.run import run
    from flame.service.signature import CommonData
    from flame.service.state import State, StateEntry
    from flame.service.typed import Entrypoint, TypedService, entrypoint, schemas_of
    from flame.typed.codec import as_json

__all__ = [
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

_NAMES = {
    "flame.calls.call": ("FunctionCall",),
    "flame.calls.current": ("current_task",),
    "flame.calls.function": ("RemoteFunction",),
    "flame.calls.instance": ("Instance",),
    "flame.calls.session": ("FunctionSession", "functions"),
    "flame.client.api": (
        "close_session",
        "create_session",
        "open_session",
        "register_application",
    ),
    "flame.client.chunks": (
        "Chunk",
        "ChunkStream",
    ),
    "flame.client.connection": (
        "Connection",
        "connect",
    ),
    "flame.client.logs": ("LogLine",),
    "flame.client.progress_bar": ("ProgressBar",),
    "flame.client.session": ("Session",),
    "flame.client.spec": ("SessionSpec",),
    "flame.client.task": (
        "Task",
        "TaskHandle",
        "TaskInformer",
    ),
    "flame.client.typed": (
        "TypedChunk",
        "TypedHandle",
        "TypedSession",
        "TypedStream",
        "TypedTask",
    ),
    "flame.client.watching": ("SessionEvent",),
    "flame.credentials": ("Secret",),
    "flame.errors": (
        "ApplicationDisabled",
        "ApplicationExists",
        "ApplicationInUse",
        "ApplicationNotFound",
        "BrokerUnavailable",
        "ChunksGone",
        "ConfigurationError",
        "ExecutorNotFound",
        "FlameError",
        "InstanceLost",
        "InvalidArgument",
        "InvalidInput",
        "InvalidName",
        "KeyReused",
        "MethodNotFound",
        "NodeNotFound",
        "NotFound",
        "PayloadTooLarge",
        "QueueFull",
        "Refused",
        "SchedulerUnavailable",
        "SchemaMismatch",
        "SessionExists",
        "SessionFailed",
        "SessionNotFound",
        "SessionNotOpen",
        "SpecMismatch",
        "StaleVersion",
        "TaskCancelled",
        "TaskEnded",
        "TaskError",
        "TaskExpired",
        "TaskFailed",
        "TaskNotFound",
        "TaskTimeout",
        "TimedOut",
        "Unavailable",
        "Unpicklable",
        "ValueGone",
        "WrongThread",
    ),
    "flame.protocol.api": ("SessionInfo",),
    "flame.protocol.events": ("ClusterEvent",),
    "flame.protocol.messages": (
        "TaskFault",
        "TaskOptions",
    ),
    "flame.protocol.progress": ("Progress",),
    "flame.protocol.records": ("ApplicationSpec",),
    "flame.protocol.states": (
        "CloseMode",
        "SessionState",
        "TaskState",
    ),
    "flame.service.contexts": (
        "FlameService",
        "SessionContext",
        "TaskContext",
        "TaskOutput",
    ),
    "flame.service.run": ("run",),
    "flame.service.state": ("State", "StateEntry"),
    "flame.service.signature": ("CommonData",),
    "flame.service.typed": (
        "Entrypoint",
        "TypedService",
        "entrypoint",
        "schemas_of",
    ),
    "flame.typed.codec": ("as_json",),
}
"""Where each name comes from: what is imported above for those who read or check types."""

_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__getattr__, __dir__ = load_on_use(__name__, _MODULE_OF)

if sys.flags.dev_mode:
    # In development mode asyncio complains of whatever keeps a loop for 100 ms, as loading the client in one would.
    for _module in (*_NAMES, "flame.broker.jetstream"):
        import_module(_module)
