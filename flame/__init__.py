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

Names that are not in ``__all__`` are not part of the interface.
"""

from __future__ import annotations

from flame.client.api import (
    close_session,
    create_session,
    open_session,
    register_application,
)
from flame.client.connection import Connection, connect
from flame.client.session import Session
from flame.client.spec import SessionSpec
from flame.client.task import Task, TaskHandle, TaskInformer
from flame.errors import (
    ApplicationDisabled,
    ApplicationExists,
    ApplicationInUse,
    ApplicationNotFound,
    BrokerUnavailable,
    ConfigurationError,
    FlameError,
    InvalidArgument,
    InvalidName,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    Refused,
    SchedulerUnavailable,
    SessionExists,
    SessionFailed,
    SessionNotFound,
    SessionNotOpen,
    SpecMismatch,
    TaskCancelled,
    TaskError,
    TaskExpired,
    TaskFailed,
    TaskNotFound,
    TimedOut,
    Unavailable,
)
from flame.protocol.messages import TaskFault
from flame.protocol.records import ApplicationSpec
from flame.protocol.states import SessionState, TaskState
from flame.service.contexts import FlameService, SessionContext, TaskContext, TaskOutput
from flame.service.run import run
from flame.version import __version__

__all__ = [
    "ApplicationDisabled",
    "ApplicationExists",
    "ApplicationInUse",
    "ApplicationNotFound",
    "ApplicationSpec",
    "BrokerUnavailable",
    "ConfigurationError",
    "Connection",
    "FlameError",
    "FlameService",
    "InvalidArgument",
    "InvalidName",
    "NotFound",
    "PayloadTooLarge",
    "QueueFull",
    "Refused",
    "SchedulerUnavailable",
    "Session",
    "SessionContext",
    "SessionExists",
    "SessionFailed",
    "SessionNotFound",
    "SessionNotOpen",
    "SessionSpec",
    "SessionState",
    "SpecMismatch",
    "Task",
    "TaskCancelled",
    "TaskContext",
    "TaskError",
    "TaskExpired",
    "TaskFailed",
    "TaskFault",
    "TaskHandle",
    "TaskInformer",
    "TaskNotFound",
    "TaskOutput",
    "TaskState",
    "TimedOut",
    "Unavailable",
    "__version__",
    "close_session",
    "connect",
    "create_session",
    "open_session",
    "register_application",
    "run",
]
