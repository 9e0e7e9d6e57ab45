"""The task that runs a function, for the function itself."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from flame.errors import ConfigurationError

if TYPE_CHECKING:
    from flame.service.contexts import TaskContext

running: ContextVar[TaskContext] = ContextVar("flame.current_task")
"""Set by the service that runs functions."""


def current_task() -> TaskContext:
    """Return the task that the calling function runs in, in the cluster: to emit, to tell how far it is, for its state.

    For functions of `flame.functions` and methods of their objects; its `TaskContext.input` is Flame's own. Raises
    `ConfigurationError` anywhere else.
    """
    context = running.get(None)
    if context is None:
        raise ConfigurationError("current_task: no function of flame.functions() runs here")
    return context
