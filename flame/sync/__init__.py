"""The client's API for programs without ``async``: the same names, with methods that return when it is done.

It works in scripts, in any number of threads, and where an event loop runs already, as in a notebook::

    import flame.sync

    with flame.sync.create_session("openai-agent", b"You are a weather forecaster.") as session:
        print(session.invoke(b"Who are you?").output)

        handles = session.create_tasks([b"one", b"two", b"three"])  # each is a concurrent.futures.Future
        for handle in concurrent.futures.as_completed(handles):
            print(handle.result().output)

What takes time happens in the asynchronous API, on one background thread of the process, which starts with the first
call and ends with the program. Whatever a program hands over to be called (an informer's methods, what
`TaskHandle.add_done_callback` takes) is called on another thread, one call after another, and may use the API itself. A
process that is forked makes its own: what was made before the fork can't be used after it.

Everything else, as the errors, is that of `flame`: ``flame.TaskFailed``, ``flame.SessionSpec``.
"""

from __future__ import annotations

from flame.sync.api import close_session, create_session, open_session, register_application
from flame.sync.background import close
from flame.sync.calls import FunctionCall, FunctionSession, Instance, RemoteFunction, functions
from flame.sync.chunks import ChunkStream
from flame.sync.connection import Connection, connect
from flame.sync.iterators import BlockingIterator
from flame.sync.session import Session
from flame.sync.task import TaskHandle
from flame.sync.typed import TypedSession
from flame.sync.typed_task import TypedHandle, TypedStream

__all__ = [
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
