"""Bad input: what is given, what it raises, and within which time. Nothing hangs, and every text names the thing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest

import flame
from flame.broker.embedded import find_nats_server
from flame.calls import pickling
from flame.calls.messages import Call
from flame.protocol import defaults, subjects
from flame.protocol.messages import TaskMessage
from flame.protocol.values import ValueRef
from flame.testing import MemoryCluster
from tests.integration.elsewhere import USES, in_another_loop
from tests.support.cluster import Cluster, eventually

MANAGER_OPTIONS = ("--ready-timeout-s", "3")
TOO_MUCH = defaults.VALUE_LIMIT_BYTES + 1
"""Bytes; zeros take no memory until somebody looks at them."""


@dataclass(frozen=True)
class Case:
    """Something wrong, and what comes of it."""

    name: str
    act: Callable[[flame.Connection, Cluster], Awaitable[Any]]
    error: type[Exception]
    says: str
    within_s: float = 2.0


async def invoke_on_service(connection: flame.Connection, name: str, spec: dict[str, Any]) -> None:
    """Register a service that can't work, and ask it for something."""
    await connection.register_application(name, {"session_retry_limit": 2, **spec})
    session = await connection.create_session(name)
    await session.invoke(b"hello")


def by_hand(service: object, application: str) -> Callable[[flame.Connection, Cluster], Awaitable[Any]]:
    """Start a service by hand, as an executor of the cluster."""

    async def act(_: flame.Connection, cluster: Cluster) -> None:
        with mock.patch.dict(os.environ, FLAME_ENDPOINT=cluster.broker.endpoint):
            await flame.run(service, application=application)

    return act


async def close_then_invoke(connection: flame.Connection, cluster: Cluster) -> None:
    session = await connection.create_session("flmping")
    await session.close()
    await session.invoke(b"x")


async def invoke_after_another_closed(connection: flame.Connection, cluster: Cluster) -> None:
    session = await connection.create_session("flmping")
    async with cluster.connect() as other:
        await (await other.open_session(session.id)).close()
    await connection.open_session(session.id)


async def too_large_output(connection: flame.Connection, cluster: Cluster) -> None:
    await connection.register_application("large", cluster.service("lab"))
    async with await connection.create_session("large") as session:
        await session.invoke(json.dumps(["large", TOO_MUCH]))


async def wrong_output(connection: flame.Connection, cluster: Cluster) -> None:
    await connection.register_application("wrong", cluster.service("lab"))
    async with await connection.create_session("wrong") as session:
        await session.invoke(b'["wrong"]')


async def unregister_in_use(connection: flame.Connection, cluster: Cluster) -> None:
    await connection.register_application("used", cluster.service("lab"))
    await connection.create_session("used")
    await connection.unregister_application("used")


async def register_twice(connection: flame.Connection, cluster: Cluster) -> None:
    await connection.register_application("twice", cluster.service("lab"))
    await connection.register_application("twice", cluster.service("lab"))


async def invoke_unusually(
    connection: flame.Connection, *, key: Any = None, options: dict[str, Any] | None = None
) -> None:
    """Invoke a task in an unusual way."""
    async with await connection.create_session("flmping") as session:
        await session.invoke(b"x", key=key, options=flame.TaskOptions(**options or {}))


async def update_stale(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.update_common_data(b"one")
        await session.update_common_data(b"two", expected_version=0)


async def update_too_much(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.update_common_data(bytes(TOO_MUCH))


async def update_closed(connection: flame.Connection, cluster: Cluster) -> None:
    session = await connection.create_session("flmping")
    await session.close()
    await session.update_common_data(b"late")


async def reuse_key(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.invoke(b"one", key="k")
        await session.invoke(b"two", key="k")


def with_keys(keys: Any) -> Callable[[flame.Connection, Cluster], Awaitable[None]]:
    async def act(connection: flame.Connection, cluster: Cluster) -> None:
        async with await connection.create_session("flmping") as session:
            await session.create_tasks([b"one", b"two"], keys=keys)

    return act


async def map_by_a_number(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await anext(session.map([b"x"], key=lambda _: 42))  # type: ignore[arg-type,return-value]  # that is the point


def after_the_connection(
    use: Callable[[flame.Session], Awaitable[Any]],
) -> Callable[[flame.Connection, Cluster], Awaitable[None]]:
    """Use a session whose connection is closed."""

    async def act(connection: flame.Connection, cluster: Cluster) -> None:
        async with cluster.connect() as other:
            session = await other.create_session("flmping")
        try:
            await use(session)
        finally:
            await connection.close_session(session.id)

    return act


def of_state(verb: str, *arguments: Any) -> Callable[[flame.Connection, Cluster], Awaitable[None]]:
    """Have a service do something wrong with the state of its session."""

    async def act(connection: flame.Connection, cluster: Cluster) -> None:
        if "keeping" not in {application.name for application in await connection.list_applications()}:
            await connection.register_application("keeping", cluster.service("keeper"))
        async with await connection.create_session("keeping") as session:
            await session.invoke(json.dumps([verb, *arguments]))

    return act


class Emitter(flame.FlameService):
    """Keeps the context of its task for longer than it is good."""

    kept: flame.TaskContext

    async def on_task_invoke(self, context: flame.TaskContext) -> None:
        Emitter.kept = context


async def emit_after_the_end(connection: flame.Connection, cluster: Cluster) -> None:
    async with MemoryCluster() as memory:
        name = await memory.register(Emitter)
        async with await flame.connect() as client, await client.create_session(name) as session:
            await session.invoke(b"x")
            await Emitter.kept.emit("late")


async def invoke_number(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.invoke(42)  # type: ignore[arg-type]  # that is the point


async def emit_wrongly(connection: flame.Connection, cluster: Cluster, verb: str, *arguments: Any) -> None:
    if "emitting" not in {application.name for application in await connection.list_applications()}:
        await connection.register_application("emitting", cluster.service("streamer"))
    async with await connection.create_session("emitting") as session:
        await session.invoke(json.dumps([verb, *arguments]))


async def stream_of_generator(connection: flame.Connection, cluster: Cluster) -> None:
    spec = cluster.service("streamer", environments={"KIND": "generating"})
    await connection.register_application("generating", spec)
    async with await connection.create_session("generating") as session:
        async for _ in session.stream(json.dumps([3, "raise"])):
            pass


async def stream_what_is_not(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await anext(session.open_stream("nothing"))


async def stream_number(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await anext(session.stream(42))  # type: ignore[arg-type]  # that is the point


async def stream_of_closed(connection: flame.Connection, cluster: Cluster) -> None:
    session = await connection.create_session("flmping")
    await session.close()
    await anext(session.stream(b"x"))


async def invoke_by_types(connection: flame.Connection, input: Any, output: Any, value: Any) -> None:
    async with await connection.create_session("flmping") as session:
        await session.typed(input, output).invoke(value)


async def invoke_as_published(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.typed_as_published()


async def refused_input(connection: flame.Connection, cluster: Cluster) -> None:
    spec = cluster.service("typed", max_attempts=1000, environments={"SERVICE": "letters"})
    await connection.register_application("letters", spec)
    async with await connection.create_session("letters") as session:
        await session.invoke(b'{"txt": "a"}')


async def map_without_room(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        session.map([b"x"], in_flight=0)


async def map_a_number(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        async for _ in session.map([b"x", 42]):  # type: ignore[list-item]  # that is the point
            pass


async def as_json_of_what_is_none(connection: flame.Connection, cluster: Cluster) -> None:
    flame.as_json({"lock": threading.Lock()})


async def list_no_tasks(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.list_tasks(limit=0)


async def invoke_large(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.invoke(bytes(TOO_MUCH))


async def key_too_large(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.create_task(bytes(TOO_MUCH), key="k")


async def input_that_is_gone(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        message = TaskMessage(input_ref=ValueRef(id="nothing", size=300_000, parts=1)).encode()
        await connection.broker.store(subjects.task("flmping", session.id, "t"), message, 5)

        async def ended() -> flame.Task | None:
            task = await session.get_task("t")
            return task if task.state.terminal else None

        (await eventually(ended, "the task has ended")).check()


async def close_by_no_mode(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.close("now")


async def cancel_after_close(connection: flame.Connection, cluster: Cluster) -> None:
    session = await connection.create_session("flmping")
    handle = await session.create_task(b"x")
    await handle
    await session.close()
    assert await handle.cancel() is flame.TaskState.SUCCEED
    await session.cancel_tasks(["a.b"])


async def cancel_without_a_connection(connection: flame.Connection, cluster: Cluster) -> None:
    async with cluster.connect() as other:
        session = await other.create_session("flmping")
    try:
        await session.cancel_tasks(["t"])
    finally:
        await connection.close_session(session.id)


async def close_without_a_connection(connection: flame.Connection, cluster: Cluster) -> None:
    async with cluster.connect() as other:
        session = await other.create_session("flmping")
    try:
        await session.close("drain")
    finally:
        await connection.close_session(session.id)


def invoke_with(options: Callable[[], Any]) -> Callable[[flame.Connection, Cluster], Awaitable[None]]:
    async def act(connection: flame.Connection, cluster: Cluster) -> None:
        async with await connection.create_session("flmping") as session:
            await session.invoke(b"x", options=options())

    return act


async def map_with_options_of_a_wrong_type(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        async for _ in session.map([b"x"], options={"delay_s": 1}):  # type: ignore[arg-type]  # that is the point
            pass


async def events_without_a_connection(connection: flame.Connection, cluster: Cluster) -> None:
    async with cluster.connect() as other:
        events = other.events()
    await anext(events)


async def connect_to_something_else(connection: flame.Connection, cluster: Cluster) -> None:
    def not_nats(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                with client:
                    client.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=not_nats, args=(listening,))
        answering.start()
        try:
            await flame.connect(f"nats://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            answering.join()


async def connect_to_silence(connection: flame.Connection, cluster: Cluster) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        await flame.connect(f"nats://127.0.0.1:{silent.getsockname()[1]}", timeout_s=1)


class Box:
    """Has a lock."""

    size = 3

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def open(self) -> None: ...


def locked(lock: Any = None) -> Any:
    return threading.Lock()


def of_functions(
    act: Callable[[Any, flame.Connection], Awaitable[Any]],
) -> Callable[[flame.Connection, Cluster], Awaitable[None]]:
    """Do something wrong with functions."""

    async def opened(connection: flame.Connection, cluster: Cluster) -> None:
        async with connection.functions() as fs:
            await act(fs, connection)

    return opened


async def function_that_holds(fs: flame.FunctionSession, _: flame.Connection) -> None:
    lock = threading.Lock()
    fs.function(lambda: lock)()


async def function_of_a_task(fs: flame.FunctionSession, connection: flame.Connection) -> None:
    async with await connection.create_session("flmping") as session:
        fs.function(locked)(await session.create_task(b"x"))


async def function_of_another_kind_of_call(fs: flame.FunctionSession, connection: flame.Connection) -> None:
    call = fs.function(abs)(1)
    fs.function(lambda: call)()


async def map_of_another(fs: flame.FunctionSession, connection: flame.Connection) -> None:
    async with connection.functions() as other:
        await anext(fs.map(other.function(abs), [1]))


async def no_method(fs: flame.FunctionSession, _: flame.Connection) -> None:
    (await fs.create(Box)).close()


async def attribute_of_an_object(fs: flame.FunctionSession, _: flame.Connection) -> None:
    await (await fs.create(Box)).size()


async def call_after_close(connection: flame.Connection, cluster: Cluster) -> None:
    async with connection.functions() as fs:
        function = fs.function(abs)
    function(1)


async def call_from_another_loop(fs: flame.FunctionSession, _: flame.Connection) -> None:
    function = fs.function(abs)

    async def elsewhere() -> None:
        function(1)

    await asyncio.to_thread(asyncio.run, elsewhere())


async def call_outside_of_loops(fs: Any, _: flame.Connection) -> None:
    await asyncio.to_thread(fs.function(abs), 1)


async def call_by_another_python(fs: flame.FunctionSession, _: flame.Connection) -> None:
    await fs.session.invoke(Call("square", b"x", b"", python="2.7").encode())


async def no_call_at_all(fs: flame.FunctionSession, _: flame.Connection) -> None:
    await fs.session.invoke(b"square")


async def functions_without_cloudpickle(connection: flame.Connection, cluster: Cluster) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "cloudpickle", None)
        pickling.cloudpickle.cache_clear()
        try:
            await connection.functions().open()
        finally:
            pickling.cloudpickle.cache_clear()


async def functions_switched_off(connection: flame.Connection, cluster: Cluster) -> None:
    await connection.disable_application("flmfunc")
    try:
        await connection.functions().open()
    finally:
        await connection.enable_application("flmfunc")


async def functions_removed(connection: flame.Connection, cluster: Cluster) -> None:
    there = await connection.get_application("flmfunc")
    await connection.unregister_application("flmfunc", force=True)
    try:
        await connection.functions().open()
    finally:
        await connection.register_application("flmfunc", there.spec)


async def yields() -> Any:
    yield 1


FUNCTIONS: list[tuple[str, Callable[[Any, flame.Connection], Awaitable[Any]], type[Exception], str]] = [
    ("a function that can't be sent", function_that_holds, flame.Unpicklable, r"the variable 'lock' \(lock\) can't"),
    ("a class that can't be", lambda fs, _: fs.create(type("Held", (), {"it": threading.Lock()})), flame.Unpicklable,
     r"class Held can't be sent: its member 'it' \(lock\)"),
    ("an argument that can't be", lambda fs, _: fs.function(locked)(lock=[threading.Lock()]), flame.Unpicklable,
     r"call of locked: argument 'lock' \(list\) can't be pickled"),
    ("an argument of a constructor that can't be", lambda fs, _: fs.create(Box, threading.Lock()), flame.Unpicklable,
     r"call of Box: argument 1 \(lock\) can't be pickled"),
    ("a result that can't be", lambda fs, _: fs.function(locked)(), flame.TaskFailed, "locked returned lock, which"),
    ("a task of a session as an argument", function_of_a_task, flame.Unpicklable, r"argument 1 \(TaskHandle\)"),
    ("a call that is no argument", function_of_another_kind_of_call, flame.Unpicklable, "can only be an argument"),
    ("an object as an argument", lambda fs, _: _passed(fs), flame.Unpicklable, "can't be passed on"),
    ("no such method", no_method, flame.MethodNotFound, "class Box has no method 'close'"),
    ("no method at all", attribute_of_an_object, flame.MethodNotFound, "'size', and nothing else"),
    ("what is no function", lambda fs, _: fs.function(3), flame.InvalidArgument, "expected a function, got int"),
    ("a function that yields", lambda fs, _: fs.function(yields), flame.InvalidArgument, "yields yields, and a call"),
    ("a map of a plain function", lambda fs, _: anext(fs.map(abs, [1])), flame.InvalidArgument, "expected one that"),
    ("a map of another session's", map_of_another, flame.InvalidArgument, "abs is one of another session"),
    ("what is no class", lambda fs, _: fs.create(locked), flame.InvalidArgument, "expected a class, got function"),
    ("what is no object", lambda fs, _: fs.release(Box), flame.InvalidArgument, "expected an Instance, got type"),
    ("another event loop", call_from_another_loop, flame.WrongThread, "in another event loop than the one"),
    ("no event loop", call_outside_of_loops, flame.WrongThread, "outside of an event loop"),
    ("another Python", call_by_another_python, flame.TaskFailed, "sent by Python 2.7, and this executor runs Python 3"),
    ("an input that is no call", no_call_at_all, flame.TaskFailed, "the input is no call of a function"),
]  # fmt: skip


async def _passed(fs: flame.FunctionSession) -> None:
    fs.function(locked)(await fs.create(Box))


def spec(command: str, *arguments: str) -> dict[str, Any]:
    return {"command": command, "arguments": list(arguments)}


LOG = {"shim": "Log"}

CASES = [
    *(Case(f"functions: {name}", of_functions(act), error, says, 10) for name, act, error, says in FUNCTIONS),
    Case(
        "functions: a call after the end", call_after_close, flame.SessionNotOpen, "was closed: no function of it", 10
    ),
    Case(
        "functions: used before they are opened",
        lambda c, _: c.functions().function(abs)(1),
        flame.ConfigurationError,
        "not opened yet",
    ),
    Case(
        "functions: no cloudpickle",
        functions_without_cloudpickle,
        flame.ConfigurationError,
        r"pip install 'flame-engine\[functions\]'",
    ),
    Case("functions: disabled", functions_switched_off, flame.ApplicationDisabled, "flmctl enable -a flmfunc"),
    Case("functions: unregistered", functions_removed, flame.ApplicationNotFound, "register it with the command", 10),
    Case(
        "a current task where there is none",
        lambda c, _: flame.current_task(),  # type: ignore[arg-type,return-value]
        flame.ConfigurationError,
        "no function of flame.functions",
    ),
    Case(
        "by hand: unknown application",
        by_hand(flame.FlameService(), "nope"),
        flame.ApplicationNotFound,
        "flmctl register",
    ),
    Case("by hand: illegal name", by_hand(flame.FlameService(), "a.b"), flame.InvalidName, "'a.b'"),
    Case("by hand: no service", by_hand(object(), "flmping"), flame.ConfigurationError, "object has no on_task_invoke"),
    Case("by hand: a class", by_hand(flame.FlameService, "flmping"), flame.ConfigurationError, "pass an instance"),
    Case("unknown application", lambda c, _: c.create_session("nope"), flame.ApplicationNotFound, "'nope'"),
    Case("illegal application name", lambda c, _: c.create_session("a.b"), flame.InvalidName, "'a.b'"),
    Case("wildcard as a name", lambda c, _: c.create_session("*"), flame.InvalidName, r"'\*'"),
    Case("empty name", lambda c, _: c.create_session(""), flame.InvalidName, "''"),
    Case("long application name", lambda c, _: c.create_session("a" * 49), flame.InvalidName, "1 to 48"),
    Case("name with a line break", lambda c, _: c.create_session("flmping\n"), flame.InvalidName, "legal"),
    Case("illegal session id", lambda c, _: c.open_session("a b"), flame.InvalidName, "'a b'"),
    Case("unknown session", lambda c, _: c.open_session("nope"), flame.SessionNotFound, "nope"),
    Case("close an unknown session", lambda c, _: c.close_session("nope"), flame.SessionNotFound, "nope"),
    Case("closed session", close_then_invoke, flame.SessionNotOpen, "closed", 10),
    Case("session closed by another", invoke_after_another_closed, flame.SessionNotOpen, "closed", 10),
    Case("negative priority", lambda c, _: c.create_session("flmping", priority=-1), flame.InvalidArgument, "priority"),
    Case(
        "fewer at most than at least",
        lambda c, _: c.create_session("flmping", min_instances=3, max_instances=2),
        flame.InvalidArgument,
        "min_instances 3 is over max_instances 2",
    ),
    Case(
        "resources that are none",
        lambda c, _: c.create_session("flmping", resources="cpu=lots"),
        flame.InvalidArgument,
        "'lots' is no amount of cpu",
    ),
    Case(
        "an illegal label",
        lambda c, _: c.create_session("flmping", labels={"a b": "c"}),
        flame.InvalidArgument,
        "'a b' is no key of a label",
    ),
    Case(
        "labels that are none",
        lambda c, _: c.create_session("flmping", labels=["a"]),  # type: ignore[arg-type]
        flame.InvalidArgument,
        "labels",
    ),
    Case(
        "an unknown state", lambda c, _: c.list_sessions(state="ended"), flame.InvalidArgument, "list_sessions: state"
    ),
    Case("a filter that can't be", lambda c, _: c.list_sessions(application="a b"), flame.InvalidName, "'a b'"),
    Case("tasks of an unknown session", lambda c, _: c.list_tasks("nope"), flame.SessionNotFound, "nope"),
    Case("a page without tasks", list_no_tasks, flame.InvalidArgument, "limit 0: expected a number from 1", 10),
    Case("an unknown executor", lambda c, _: c.get_executor("nope"), flame.ExecutorNotFound, "nope"),
    Case("an unknown node", lambda c, _: c.get_node("nope"), flame.NodeNotFound, "nope"),
    Case("an illegal node", lambda c, _: c.list_executors(node="a.b"), flame.InvalidName, "'a.b'"),
    Case("update what isn't there", lambda c, _: c.update_application("nope", LOG), flame.ApplicationNotFound, "nope"),
    Case(
        "an update without a command",
        lambda c, _: c.update_application("flmtest", {}),
        flame.InvalidArgument,
        "command",
    ),
    Case(
        "a schema that is none",
        lambda c, _: c.register_application("x", {"command": "a", "input_schema": ["string"]}),
        flame.InvalidArgument,
        "input_schema",
    ),
    Case(
        "credentials that are none",
        lambda c, _: c.create_session("flmping", credentials=["a"]),  # type: ignore[arg-type]
        flame.InvalidArgument,
        "credentials: expected a mapping of names to secrets, got list",
    ),
    Case(
        "a credential that is no text",
        lambda c, _: c.create_session("flmping", credentials={"api": 5}),  # type: ignore[dict-item]
        flame.InvalidArgument,
        "credentials: 'api': expected str or a secret, got int",
    ),
    Case(
        "too many delegations",
        lambda c, _: c.create_session("flmping", delegations={str(n): "x" for n in range(65)}),
        flame.InvalidArgument,
        "delegations: expected at most 64, got 65",
    ),
    Case(
        "credentials of a task that are none",
        lambda c, _: invoke_unusually(c, options={"credentials": {"a": b"x"}}),
        flame.InvalidArgument,
        "options: credentials: 'a': expected str or a secret, got bytes",
    ),
    Case("a stale version", update_stale, flame.StaleVersion, "has version 1, not 0"),
    Case(
        "common data that is none",
        lambda c, _: c.update_common_data("nope", "text"),  # type: ignore[arg-type]
        flame.InvalidArgument,
        "common_data: expected bytes, got str",
    ),
    Case(
        "a version that is none",
        lambda c, _: c.update_common_data("nope", b"x", expected_version=-1),
        flame.InvalidArgument,
        "update_common_data: expected_version",
    ),
    Case("too much common data later", update_too_much, flame.PayloadTooLarge, "common_data of 1,073,741,825 bytes"),
    Case(
        "common data of nobody", lambda c, _: c.update_common_data("nope", b"x"), flame.SessionNotFound, "session nope"
    ),
    Case("common data of a closed session", update_closed, flame.SessionNotOpen, "is closed", 10),
    Case("fewer keys than inputs", with_keys(["a"]), flame.InvalidArgument, "keys: expected one for each of 2", 10),
    Case("a text for keys", with_keys("ab"), flame.InvalidArgument, "keys: expected one key for each .*got str", 10),
    Case("a number among the keys", with_keys(["a", 2]), flame.InvalidArgument, "key: expected str, got int", 10),
    Case("a key function of numbers", map_by_a_number, flame.InvalidArgument, "key: expected str, got int", 10),
    Case("a stale revision of state", of_state("put", "k", 1, 7), flame.TaskFailed, "StaleVersion: state 'k'", 20),
    Case("a value that state can't keep", of_state("put_strange"), flame.TaskFailed, "can't be kept", 20),
    Case("emit after the end", emit_after_the_end, flame.TaskEnded, "task .* has ended: nothing can be", 20),
    *(
        Case(f"{name} after the connection", after_the_connection(use), flame.BrokerUnavailable, "closed", 10)
        for name, use in {
            "invoke": lambda session: session.invoke(b"x"),
            "create tasks": lambda session: session.create_tasks([b"x"]),
            "map": lambda session: anext(session.map([b"x"])),
            "stream": lambda session: anext(session.stream(b"x")),
            "get a task": lambda session: session.get_task("t"),
            "update common data": lambda session: session.update_common_data(b"x"),
        }.items()
    ),
    Case("a key with another input", reuse_key, flame.KeyReused, "key 'k' names a task", 10),
    Case(
        "a key that is none",
        lambda c, _: invoke_unusually(c, key=5),
        flame.InvalidArgument,
        "key: expected str, got int",
    ),
    Case("an empty key", lambda c, _: invoke_unusually(c, key=""), flame.InvalidArgument, "key: expected 1 to 512"),
    Case(
        "a version that never was",
        lambda c, _: invoke_unusually(c, options={"common_data_version": 3}),
        flame.TaskFailed,
        "wants version 3 of the common data; the session has 0",
        10,
    ),
    Case("logs of nobody", lambda c, _: anext(c.read_logs()), flame.InvalidArgument, "a session, an executor or both"),
    Case("common data as text", lambda c, _: c.create_session("flmping", "text"), flame.InvalidArgument, "got str"),  # type: ignore[arg-type]
    Case(
        "common data too large",
        lambda c, _: c.create_session("flmping", bytes(TOO_MUCH)),
        flame.PayloadTooLarge,
        "1,073,741,825 bytes: the limit is 1,073,741,824",
    ),
    Case("a mode that is none", close_by_no_mode, flame.InvalidArgument, "'drain', 'close' or 'force', got 'now'", 10),
    Case(
        "a mode that is none for who has no session",
        lambda c, _: c.close_session("nope", mode=3),  # type: ignore[arg-type]
        flame.InvalidArgument,
        "close_session: mode: .*got '3'",
    ),
    Case("cancel in an unknown session", lambda c, _: c.cancel_tasks("nope", ["t"]), flame.SessionNotFound, "nope"),
    Case("cancel in an illegal one", lambda c, _: c.cancel_tasks("a b", ["t"]), flame.InvalidName, "'a b'"),
    Case("cancel an illegal task", cancel_after_close, flame.InvalidName, "task 'a.b' is not a legal name", 10),
    Case("cancel what is no list", lambda c, _: c.cancel_tasks("s", "t"), flame.InvalidArgument, "put it into a list"),
    Case("cancel for no reason", lambda c, _: c.cancel_tasks("s", ["t"], 7), flame.InvalidArgument, "reason"),  # type: ignore[arg-type]
    Case("cancel after the connection", cancel_without_a_connection, flame.BrokerUnavailable, "is closed", 10),
    Case("close after the connection", close_without_a_connection, flame.BrokerUnavailable, "is closed", 10),
    Case("events after the connection", events_without_a_connection, flame.BrokerUnavailable, "closed"),
    Case("events of an unknown session", lambda c, _: anext(c.events(session="nope")), flame.SessionNotFound, "nope"),
    Case(
        "events of an unknown application",
        lambda c, _: anext(c.events(application="nope")),
        flame.ApplicationNotFound,
        "nope",
    ),
    Case(
        "a run of no time", invoke_with(lambda: flame.TaskOptions(timeout_s=0)), flame.InvalidArgument, "timeout_s", 10
    ),
    Case(
        "a delay before now", invoke_with(lambda: flame.TaskOptions(delay_s=-1)), flame.InvalidArgument, "delay_s", 10
    ),
    Case(
        "half an attempt",
        invoke_with(lambda: flame.TaskOptions(max_attempts=0.5)),  # type: ignore[arg-type]
        flame.InvalidArgument,
        "max_attempts: expected a whole number from 1 to 1000, got 0.5",
        10,
    ),
    Case("options as a map", invoke_with(lambda: {"timeout_s": 1}), flame.InvalidArgument, "got dict", 10),
    Case("options as a map for many", map_with_options_of_a_wrong_type, flame.InvalidArgument, "got dict", 10),
    Case("no weight", lambda c, _: c.create_session("flmping", weight=0), flame.InvalidArgument, "weight"),
    Case(
        "infinite weight",
        lambda c, _: c.create_session("flmping", weight=float("inf")),
        flame.InvalidArgument,
        "weight",
    ),
    Case(
        "a negative limit",
        lambda c, _: c.create_session("flmping", idle_timeout_s=-1),
        flame.InvalidArgument,
        "idle_timeout_s",
    ),
    Case(
        "limits of an application that can't be",
        lambda c, _: c.register_application(
            "x", {**LOG, "timeout_s": -1, "max_attempts": 0, "retry_on": "E", "weight": "x"}
        ),
        flame.InvalidArgument,
        "weight: .*timeout_s: .*max_attempts: .*retry_on: ",
    ),
    Case(
        "a placement that is none",
        lambda c, _: c.register_application("x", {**LOG, "placement": "anywhere"}),
        flame.InvalidArgument,
        "'spread' or 'pack', got 'anywhere'",
    ),
    Case("input of a wrong type", invoke_number, flame.InvalidArgument, "got int", 10),
    Case("input too large", invoke_large, flame.PayloadTooLarge, "input of 1,073,741,825 bytes", 10),
    Case("input of a key too large", key_too_large, flame.PayloadTooLarge, "input of 1,073,741,825 bytes", 10),
    Case("input that is gone", input_that_is_gone, flame.TaskFailed, "part 0 of 1 is not kept any more", 20),
    Case("output too large", too_large_output, flame.TaskFailed, "1,073,741,825 bytes: the limit is", 20),
    Case("output of a wrong type", wrong_output, flame.TaskFailed, "returned int", 20),
    Case(
        "unregister what isn't there", lambda c, _: c.unregister_application("nope"), flame.ApplicationNotFound, "nope"
    ),
    Case("unregister what is in use", unregister_in_use, flame.ApplicationInUse, "used", 5),
    Case("register twice", register_twice, flame.ApplicationExists, "twice", 5),
    Case("no command", lambda c, _: c.register_application("x", {}), flame.InvalidArgument, "command: missing"),
    Case(
        "unknown field",
        lambda c, _: c.register_application("x", {"command": "a", "comand": "b"}),
        flame.InvalidArgument,
        "comand: unknown field",
    ),
    Case(
        "wrong type",
        lambda c, _: c.register_application("x", {"command": "a", "max_instances": "many"}),
        flame.InvalidArgument,
        "max_instances",
    ),
    Case(
        "command that doesn't exist",
        lambda c, _: invoke_on_service(c, "missing", spec("/no/such/program")),
        flame.TaskFailed,
        "/no/such/program",
        10,
    ),
    Case(
        "command that is not on the path",
        lambda c, _: invoke_on_service(c, "unfound", spec("no-such-program")),
        flame.TaskFailed,
        "no-such-program",
        10,
    ),
    Case(
        "command that dies at once",
        lambda c, _: invoke_on_service(c, "dies", spec("sh", "-c", "echo out of cheese >&2; exit 3")),
        flame.TaskFailed,
        r"status 3(?s:.*)out of cheese",
        10,
    ),
    Case(
        "command that is never ready",
        lambda c, _: invoke_on_service(c, "never", spec("sleep", "1000")),
        flame.TaskFailed,
        "ready",
        40,
    ),
    Case(
        "a chunk of another type",
        lambda c, k: emit_wrongly(c, k, "emit", "number"),
        flame.TaskFailed,
        "emit: expected bytes or str, got int",
        10,
    ),
    Case(
        "a chunk that is too large",
        lambda c, k: emit_wrongly(c, k, "emit", "large"),
        flame.TaskFailed,
        "emit: a chunk of 262144 bytes",
        10,
    ),
    Case(
        "a progress that can't be",
        lambda c, k: emit_wrongly(c, k, "wrong_progress", "much"),
        flame.TaskFailed,
        "progress: done: expected a number",
        10,
    ),
    Case("a generator that raises half-way", stream_of_generator, flame.TaskFailed, "ValueError: half-way", 10),
    Case("a stream of no task", stream_what_is_not, flame.TaskNotFound, "'nothing'", 10),
    Case("a stream of a number", stream_number, flame.InvalidArgument, "input: expected bytes or str, got int", 10),
    Case("a stream of a closed session", stream_of_closed, flame.SessionNotOpen, "is closed", 10),
    Case("malformed endpoint", lambda _c, _: flame.connect("127.0.0.1:4222"), flame.ConfigurationError, "nats://HOST"),
    Case("wrong scheme", lambda _c, _: flame.connect("http://127.0.0.1:1"), flame.ConfigurationError, "http://"),
    Case("no broker", lambda _c, _: flame.connect("nats://127.0.0.1:1"), flame.BrokerUnavailable, "127.0.0.1:1"),
    Case("not a NATS server", connect_to_something_else, flame.BrokerUnavailable, "127.0.0.1", 6),
    Case("a server that says nothing", connect_to_silence, flame.BrokerUnavailable, "127.0.0.1", 3),
    Case(
        "a service run by hand",
        lambda _c, _: flame.run(flame.FlameService()),
        flame.ConfigurationError,
        "flmctl register",
    ),
    Case(
        "an input of another type",
        lambda c, _: invoke_by_types(c, int, int, "x"),
        flame.InvalidInput,
        "input for application flmping: not int: .*got 'x'",
    ),
    Case(
        "an output of another type",
        lambda c, _: invoke_by_types(c, list[str], list[int], ["x"]),
        flame.SchemaMismatch,
        r"its output is not list\[int\]: 0: ",
    ),
    Case(
        "a type that can't be sent",
        lambda c, _: invoke_by_types(c, threading.Event, int, 1),
        flame.ConfigurationError,
        "Event can't be sent as JSON",
    ),
    Case("a value that can't be sent", as_json_of_what_is_none, flame.InvalidInput, "as_json: not dict: .*lock"),
    Case("no published schemas", invoke_as_published, flame.ConfigurationError, "flmping publishes no schemas"),
    Case(
        "an input that the service refuses",
        refused_input,
        flame.TaskFailed,
        "InvalidInput: its input is not Question, which letters takes: text: Field required",
        10,
    ),
    Case("a map without room", map_without_room, flame.InvalidArgument, "in_flight: expected at least 1, got 0"),
    Case("a map of what is no input", map_a_number, flame.InvalidArgument, "input: expected bytes or str, got int"),
    Case("a class for an instance", lambda _c, _: flame.run(flame.FlameService), flame.ConfigurationError, "instance"),
    *(
        Case(f"another loop: {name}", in_another_loop(prepare), flame.WrongThread, f"{says}.* another event loop", 20)
        for name, (prepare, says) in USES.items()
    ),
    Case("no service at all", lambda _c, _: flame.run(object()), flame.ConfigurationError, "on_task_invoke"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
async def test_bad_input_gets_a_clear_error_in_time(case: Case, cluster: Cluster, connection: flame.Connection) -> None:
    began = time.monotonic()
    with pytest.raises(case.error, match=case.says) as caught:
        async with asyncio.timeout(case.within_s):
            await case.act(connection, cluster)
    assert isinstance(caught.value, flame.FlameError)
    assert time.monotonic() - began < case.within_s


async def test_a_broker_without_jetstream_is_named_as_such() -> None:
    process, port = await start_plain_nats()
    try:
        with pytest.raises(flame.BrokerUnavailable, match="no JetStream"):
            await flame.connect(f"nats://127.0.0.1:{port}")
    finally:
        process.terminate()
        await process.wait()


async def start_plain_nats() -> tuple[asyncio.subprocess.Process, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        str(find_nats_server()), "-a", "127.0.0.1", "-p", str(port), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    async for line in process.stderr:
        if b"Server is ready" in line:
            break
    return process, port
