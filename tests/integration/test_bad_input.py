"""Bad input: what is given, what it raises, and within which time. Nothing hangs, and every text names the thing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

import flame
from flame.broker.embedded import find_nats_server
from tests.support.cluster import Cluster

MANAGER_OPTIONS = ("--ready-timeout-s", "1")


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
        await session.invoke(b'["large", 300000]')


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


async def invoke_number(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.invoke(42)  # type: ignore[arg-type]  # that is the point


async def list_no_tasks(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.list_tasks(limit=0)


async def invoke_large(connection: flame.Connection, cluster: Cluster) -> None:
    async with await connection.create_session("flmping") as session:
        await session.invoke(b"x" * 300_000)


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


def spec(command: str, *arguments: str) -> dict[str, Any]:
    return {"command": command, "arguments": list(arguments)}


LOG = {"shim": "Log"}

CASES = [
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
    Case("logs of nobody", lambda c, _: anext(c.read_logs()), flame.InvalidArgument, "a session, an executor or both"),
    Case("common data as text", lambda c, _: c.create_session("flmping", "text"), flame.InvalidArgument, "got str"),  # type: ignore[arg-type]
    Case(
        "common data too large",
        lambda c, _: c.create_session("flmping", b"x" * 300_000),
        flame.PayloadTooLarge,
        "300000",
    ),
    Case("input of a wrong type", invoke_number, flame.InvalidArgument, "got int", 10),
    Case("input too large", invoke_large, flame.PayloadTooLarge, "300000 bytes", 10),
    Case("output too large", too_large_output, flame.TaskFailed, "300000 bytes", 20),
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
        "(?s)status 3.*out of cheese",
        10,
    ),
    Case(
        "command that is never ready",
        lambda c, _: invoke_on_service(c, "never", spec("sleep", "1000")),
        flame.TaskFailed,
        "ready",
        20,
    ),
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
    Case("a class for an instance", lambda _c, _: flame.run(flame.FlameService), flame.ConfigurationError, "instance"),
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
