"""What an operator is given in broker_config works: every file, every option. TLS has a module of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import nats
import pytest

import flame
from flame.broker.embedded import EmbeddedBrokerConfig, find_nats_server
from flame.broker.embedded.config import server_configuration
from flame.broker.jetstream import connect
from flame.errors import BrokerUnavailable
from flame.protocol.defaults import MAX_PAYLOAD_BYTES
from tests.support.cluster import eventually
from tests.support.servers import (
    BROKER_CONFIG,
    OPTIONS,
    Edits,
    Server,
    Servers,
    free_port,
    run_tasks,
    served,
    single,
    try_connect,
)

# ---- the files


@pytest.mark.parametrize("file", ["single.conf", "cluster.conf"])
def test_the_server_accepts_the_file_as_it_is(file: str) -> None:
    environment = {"FLAME_SERVER_NAME": "flame-1", "FLAME_ROUTES": "[nats://host1:6222, nats://host2:6222]"}
    checked = subprocess.run(
        [find_nats_server(), "-t", "-c", BROKER_CONFIG / file],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_every_line_that_is_off_is_on_in_a_test() -> None:
    lines = [line.strip() for file in BROKER_CONFIG.glob("*.conf") for line in file.read_text().splitlines()]
    words = ("include", "sync_interval:", "key:", "cipher:", "authorization:", "verify:", "timeout:")
    off = {line for line in lines if line.startswith(tuple(f"# {word}" for word in words))}
    assert off == {off for edits in OPTIONS.values() for off in edits}


async def limits_of(file: Path) -> dict[str, Any]:
    """Ask a server what it makes of its configuration."""
    port = free_port()
    arguments = ("-c", file, "-p", "-1", "-m", str(port), "-l", file.with_suffix(".log"))
    server = await asyncio.create_subprocess_exec(find_nats_server(), *arguments)

    def read() -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/varz", timeout=2) as answer:
            told: dict[str, Any] = json.load(answer)
        return told

    async def answered() -> dict[str, Any] | None:
        try:
            told = await asyncio.to_thread(read)
        except OSError:
            return None
        return told if "config" in told["jetstream"] else None  # it tells before it has everything

    try:
        told = await eventually(answered, "the server answers")
    finally:
        server.kill()
        await server.wait()
    stream = told["jetstream"]
    settings = {name: stream["config"].get(name) for name in ("max_storage", "sync_interval", "sync_always")}
    return {"max_payload": told["max_payload"], **settings, **stream["limits"]}


async def test_the_embedded_broker_has_the_same_limits(tmp_path: Path) -> None:
    text = server_configuration(
        EmbeddedBrokerConfig(data_dir=tmp_path),
        port=0,
        data_dir=tmp_path / "data",
        ports_dir=tmp_path,
        log_file=tmp_path / "embedded.log",
    )
    embedded = tmp_path / "embedded.conf"
    embedded.write_text(text)
    shipped = await limits_of(single(tmp_path / "1").config / "single.conf")
    assert shipped == await limits_of(embedded)
    assert shipped["max_payload"] == MAX_PAYLOAD_BYTES
    assert shipped["sync_interval"] == 120 * 10**9


async def test_one_server_runs_sessions(tmp_path: Path) -> None:
    async with served(tmp_path, Servers([single(tmp_path)])) as cluster:
        await run_tasks(cluster)


# ---- the options


async def test_every_message_can_be_synced(tmp_path: Path) -> None:
    server = single(tmp_path, OPTIONS["sync"])
    assert (await limits_of(server.config / "single.conf"))["sync_always"] is True
    async with served(tmp_path, Servers([server])) as cluster:
        await run_tasks(cluster)


async def test_what_is_stored_can_be_encrypted(tmp_path: Path) -> None:
    secret = b"nobody may read this from the disk"

    def server(key: str, edits: Edits) -> Server:
        return single(tmp_path / key, {"/var/lib/flame": str(tmp_path / "store"), **edits}, {"FLAME_STORE_KEY": key})

    def found() -> bool:
        files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
        return any(secret in path.read_bytes() for path in files)

    async def stored(server: Server) -> bytes | None:
        broker = await connect(f"nats://127.0.0.1:{server.port}")
        with contextlib.suppress(flame.FlameError):
            message = await broker.last("S", "s")
            await broker.close()
            return None if message is None else message.data
        await broker.close()
        return None

    plain, locked, other = (
        server("none", {}),
        server("right", OPTIONS["encryption"]),
        server("wrong", OPTIONS["encryption"]),
    )
    plain.run()
    await plain.ready()
    client = await nats.connect(f"nats://127.0.0.1:{plain.port}")
    await client.jetstream().add_stream(name="S", subjects=["s"])
    await client.jetstream().publish("s", secret)
    await client.close()
    plain.stop()
    assert found()

    for each, readable in ((locked, True), (other, False), (locked, True)):
        each.run()
        await each.ready()
        try:
            assert (await stored(each) == secret) is readable
        finally:
            each.stop()
        assert not found()


async def test_a_user_and_password_can_be_asked_for(tmp_path: Path) -> None:
    login = {"FLAME_BROKER_USER": "flame", "FLAME_BROKER_PASSWORD": "not-a-secret-1"}
    server = single(tmp_path, OPTIONS["authorization"], login)
    server.run()
    anonymous = f"nats://127.0.0.1:{server.port}"
    try:
        broker = await eventually(lambda: try_connect(anonymous.replace("//", "//flame:not-a-secret-1@")), "it answers")
        assert broker.endpoint == anonymous
        await broker.close()
        for endpoint in (anonymous, anonymous.replace("//", "//flame:wrong@")):
            with pytest.raises(BrokerUnavailable, match=r"refuses this client's credentials.*USER:PASSWORD@") as caught:
                await connect(endpoint)
            assert "wrong" not in str(caught.value)
    finally:
        server.stop()
