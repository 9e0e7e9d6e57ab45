"""What a type checker makes of `flame.sync`: each line is checked by mypy, none is run.

A line that must be refused says which error it expects; mypy complains of such a line that it accepts.
"""

from __future__ import annotations

import concurrent.futures
from typing import assert_type

import flame
import flame.sync
from flame.protocol.api import Info, NodeInfo
from flame.protocol.records import ApplicationRecord, ExecutorRecord


def connections() -> None:
    connection = flame.sync.connect("nats://127.0.0.1:4222", timeout_s=1)
    assert_type(connection, flame.sync.Connection)
    assert_type(connection.info(), Info)
    assert_type(connection.list_sessions(state="open"), list[flame.SessionInfo])
    assert_type(connection.get_session("s"), flame.SessionInfo)
    assert_type(connection.list_applications(), list[ApplicationRecord])
    assert_type(connection.list_executors(node="n"), list[ExecutorRecord])
    assert_type(connection.list_nodes(), list[NodeInfo])
    assert_type(connection.list_tasks("s"), list[flame.Task])
    assert_type(connection.cancel_tasks("s", ["t"]), dict[str, flame.TaskState])
    for line in connection.read_logs(session="s", follow=True):
        assert_type(line, flame.LogLine)
    with connection.events(tasks=True) as events:
        assert_type(events, flame.sync.BlockingIterator[flame.ClusterEvent])
        assert_type(next(events), flame.ClusterEvent)
    with connection as entered:
        assert_type(entered, flame.sync.Connection)
    connection.create_session()  # type: ignore[call-arg]
    connection.list_sessions("lab")  # type: ignore[call-arg]
    connection.cancel_tasks("s", [1])  # type: ignore[list-item]


def sessions() -> None:
    with flame.sync.create_session("agent", b"data", labels={"team": "blue"}) as session:
        assert_type(session, flame.sync.Session)
    assert_type(flame.sync.open_session("s", flame.SessionSpec(application="agent")), flame.sync.Session)
    assert_type(session.id, str)
    assert_type(session.state, flame.SessionState)
    for event in session.watch():
        assert_type(event, flame.SessionEvent)

    def on_progress(info: flame.SessionInfo) -> None: ...

    session.close("drain", timeout_s=5, on_progress=on_progress)
    session.close(flame.CloseMode.FORCE)
    session.close(on_progress=lambda: None)  # type: ignore[arg-type,misc]
    flame.sync.create_session("agent", "text")  # type: ignore[arg-type]
    flame.sync.create_session("agent", min_instances="1")  # type: ignore[arg-type]


def tasks(session: flame.sync.Session) -> None:
    assert_type(session.invoke("hello", timeout_s=5), flame.Task)
    assert_type(session.invoke(b"hello").output, bytes)
    handle = session.create_task(b"hello", options=flame.TaskOptions(timeout_s=5))
    assert_type(handle, flame.sync.TaskHandle)
    assert_type(handle.result(timeout=1), flame.Task)
    assert_type(handle.exception(), BaseException | None)
    assert_type(handle.finished(), flame.Task)
    assert_type(handle.cancel("enough"), bool)
    handles = session.create_tasks(f"{number}" for number in range(3))
    assert_type(handles, list[flame.sync.TaskHandle])
    for ended in concurrent.futures.as_completed(handles):
        assert_type(ended.result(), flame.Task)
    done, _ = concurrent.futures.wait(handles)
    assert_type(done, set[concurrent.futures.Future[flame.Task]])
    outputs = [task.output for task in session.map(["a", b"b"], ordered=False)]
    assert_type(outputs, list[bytes])
    assert_type(session.get_task("t"), flame.Task)
    assert_type(session.list_tasks(limit=5), list[flame.Task])
    session.invoke(1)  # type: ignore[arg-type]
    session.invoke(b"x", options={"timeout_s": 5})  # type: ignore[arg-type]
    session.map([1])  # type: ignore[list-item]
