"""What an operator is given in broker_config works: every file, every option, and a cluster that loses servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest

import flame
from flame.broker.embedded import EmbeddedBrokerConfig, find_nats_server
from flame.broker.embedded.config import server_configuration
from flame.broker.jetstream import connect
from flame.config import SECURITY_VARIABLES, Security
from flame.errors import BrokerUnavailable, ConfigurationError
from flame.protocol import subjects
from flame.protocol.defaults import MAX_PAYLOAD_BYTES
from flame.protocol.states import NodeState, TaskState
from tests.support.certificates import OPENSSL, Authority
from tests.support.cluster import Cluster, eventually, processes_of
from tests.support.servers import (
    BROKER_CONFIG,
    Edits,
    ServedCluster,
    Server,
    Servers,
    cluster_of_three,
    free_port,
    single,
)

TLS_FILES = "/etc/flame/tls"
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="there is no openssl command to make certificates with")


@contextlib.asynccontextmanager
async def served(folder: Path, servers: Servers, *, replicas: int = 1) -> AsyncIterator[ServedCluster]:
    """Run a cluster of one node on servers; afterwards nothing of it is alive."""
    cluster = ServedCluster(folder, servers, replicas=replicas)
    try:
        yield await cluster.start()
    except BaseException:
        print(cluster.logs())  # noqa: T201  # pytest shows it with the failure
        raise
    finally:
        await cluster.stop()
    assert processes_of(servers.endpoint) == []


async def run_tasks(cluster: Cluster, **spec: Any) -> None:
    """Run a session of a service with a process of its own."""
    async with cluster.connect() as connection:
        await connection.register_application("lab", cluster.service("lab", **spec))
        async with await connection.create_session("lab") as session:
            tasks = await asyncio.gather(*(session.invoke(json.dumps(["echo", n]), timeout_s=20) for n in range(20)))
            assert [task.output for task in tasks] == [str(n).encode() for n in range(20)]


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


@pytest.fixture
async def limits(tmp_path: Path) -> AsyncIterator[Any]:
    """What a server says of its limits, given its configuration."""
    running: list[subprocess.Popen[bytes]] = []

    async def ask(file: Path) -> dict[str, Any]:
        port = free_port()
        command = [find_nats_server(), "-c", file, "-p", "-1", "-m", str(port), "-l", tmp_path / "limits.log"]
        running.append(subprocess.Popen(command))

        def read() -> dict[str, Any]:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/varz", timeout=2) as answer:
                known: dict[str, Any] = json.load(answer)
            return known

        async def answered() -> dict[str, Any] | None:
            with contextlib.suppress(OSError):
                return await asyncio.to_thread(read)
            return None

        known: dict[str, Any] = await eventually(answered, "the server answers")
        stream = known["jetstream"]
        return {
            "max_payload": known["max_payload"],
            **{name: stream["config"][name] for name in ("max_storage", "sync_interval")},
            **stream["limits"],
        }

    yield ask
    for process in running:
        process.kill()
        process.wait()


async def test_the_embedded_broker_has_the_same_limits(limits: Any, tmp_path: Path) -> None:
    text = server_configuration(
        EmbeddedBrokerConfig(data_dir=tmp_path),
        port=0,
        data_dir=tmp_path / "data",
        ports_dir=tmp_path,
        log_file=tmp_path / "embedded.log",
    )
    embedded = tmp_path / "embedded.conf"
    embedded.write_text(text)
    shipped = await limits(single(tmp_path / "1").config / "single.conf")
    assert shipped == await limits(embedded)
    assert shipped["max_payload"] == MAX_PAYLOAD_BYTES
    assert shipped["sync_interval"] == 120 * 10**9


async def test_one_server_runs_sessions(tmp_path: Path) -> None:
    async with served(tmp_path, Servers([single(tmp_path)])) as cluster:
        await run_tasks(cluster)


# ---- the options


def _on(*lines: str) -> Edits:
    """Switch lines on as the files say."""
    return {line: line.removeprefix("# ") for line in lines}


OPTIONS: dict[str, Edits] = {
    "sync": _on("# sync_interval: always"),
    "encryption": _on("# key: $FLAME_STORE_KEY", "# cipher: chachapoly"),
    "authorization": _on("# authorization: { user: $FLAME_BROKER_USER, password: $FLAME_BROKER_PASSWORD }"),
    "tls": _on("# include ./tls.conf", "# verify: true", "# timeout: 5"),
}


async def test_every_message_can_be_synced(tmp_path: Path, limits: Any) -> None:
    server = single(tmp_path, OPTIONS["sync"])
    async with served(tmp_path, Servers([server])) as cluster:
        await run_tasks(cluster)
    server_log = server.log.read_text()
    assert "Sync Interval" not in server_log or "always" in server_log
    assert "sync_interval: always\n" in (server.config / "common.conf").read_text()


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

    plain, locked, other = server("none", {}), server("right", OPTIONS["encryption"]), server("wrong", OPTIONS["encryption"])
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
        broker = await eventually(lambda: _connected(anonymous.replace("//", "//flame:not-a-secret-1@")), "it answers")
        assert broker.endpoint == anonymous
        await broker.close()
        for endpoint in (anonymous, anonymous.replace("//", "//flame:wrong@")):
            with pytest.raises(BrokerUnavailable, match=r"refuses this client's credentials.*USER:PASSWORD@") as caught:
                await connect(endpoint)
            assert "wrong" not in str(caught.value)
    finally:
        server.stop()


async def _connected(endpoint: str) -> Any:
    with contextlib.suppress(BrokerUnavailable):
        return await connect(endpoint, timeout_s=1)
    return None


# ---- TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("tls") / "ours", "ours")
    made.issue("server", "IP:127.0.0.1,DNS:localhost")
    made.issue("client")
    return made


@pytest.fixture
def no_security(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECURITY_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@needs_openssl
@pytest.mark.usefixtures("no_security")
class TestTls:
    @staticmethod
    def server(folder: Path, authority: Authority, *, verify: bool = False) -> Server:
        edits = {TLS_FILES: str(authority.folder), **OPTIONS["tls"]}
        return single(folder, edits if verify else {k: v for k, v in edits.items() if k != "# verify: true"})

    @pytest.fixture
    async def running(self, tmp_path: Path, authority: Authority) -> AsyncIterator[str]:
        """A server with TLS that anybody may connect to."""
        server = self.server(tmp_path, authority)
        server.run()
        endpoint = f"tls://127.0.0.1:{server.port}"
        await eventually(lambda: self.answers(endpoint, Security(tls_ca=authority.certificate)), "it answers")
        yield endpoint
        server.stop()

    @staticmethod
    async def answers(endpoint: str, security: Security) -> bool:
        with contextlib.suppress(BrokerUnavailable):
            broker = await connect(endpoint, security=security, timeout_s=2)
            await broker.close()
            return True
        return False

    async def test_sessions_run_over_it_with_certificates_on_both_sides(
        self, tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = {
            "FLAME_TLS_CA": str(authority.certificate),
            "FLAME_TLS_CERT": str(authority.folder / "client.pem"),
            "FLAME_TLS_KEY": str(authority.folder / "client.key"),
        }
        for name, value in client.items():
            monkeypatch.setenv(name, value)
        server = self.server(tmp_path, authority, verify=True)
        server.check = lambda: self.answers(f"tls://127.0.0.1:{server.port}", Security.from_environment())
        async with served(tmp_path, Servers([server], scheme="tls")) as cluster:
            await run_tasks(cluster)
            monkeypatch.delenv("FLAME_TLS_CERT")
            monkeypatch.delenv("FLAME_TLS_KEY")
            with pytest.raises(BrokerUnavailable, match="certificate"):
                await connect(cluster.broker.endpoint)

    async def test_a_client_without_settings_uses_it_if_the_system_knows_the_authority(
        self, running: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = running.replace("tls:", "nats:")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        assert await self.answers(plain, Security())
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(BrokerUnavailable, match=r"can't prove who it is \(.*\): FLAME_TLS_CA names"):
            await connect(plain)

    async def test_a_server_of_another_authority_is_refused(self, running: str, tmp_path: Path) -> None:
        other = Authority(tmp_path / "other", "other")
        with pytest.raises(BrokerUnavailable, match=r"can't prove who it is .* FLAME_TLS_CA .*other/ca\.pem"):
            await connect(running, security=Security(tls_ca=other.certificate))

    async def test_a_server_under_another_name_is_refused(self, running: str, authority: Authority) -> None:
        with pytest.raises(BrokerUnavailable, match="can't prove who it is"):
            await connect(running.replace("127.0.0.1", "127.0.0.2"), security=Security(tls_ca=authority.certificate))

    @pytest.mark.parametrize("scheme", ["tls", "nats"])
    async def test_a_server_without_it_is_told_nothing(
        self, scheme: str, tmp_path: Path, authority: Authority
    ) -> None:
        heard = bytearray()
        info = json.dumps({"server_id": "x", "version": "2.15.1", "headers": True, "max_payload": 1024})

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(f"INFO {info}\r\n".encode())
            heard.extend(await reader.read())
            writer.close()

        listener = await asyncio.start_server(talk, "127.0.0.1")
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            security = Security(tls_ca=authority.certificate if scheme == "nats" else None)
            with pytest.raises(BrokerUnavailable, match=f"{port} is refused: it offers no TLS"):
                await connect(f"{scheme}://user:password@127.0.0.1:{port}", security=security)
        assert heard == b""

    @pytest.mark.parametrize(
        ("content", "expected"),
        [(None, "No such file or directory"), ("rubbish", "expected certificates as PEM")],
    )
    async def test_a_file_that_is_no_good_is_named(self, content: str | None, expected: str, tmp_path: Path) -> None:
        file = tmp_path / "ca.pem"
        if content is not None:
            file.write_text(content)
        with pytest.raises(ConfigurationError, match=f"^FLAME_TLS_CA {file}: {expected}"):
            await connect("tls://127.0.0.1:1", security=Security(tls_ca=file))

    async def test_a_certificate_without_its_own_key_is_refused(self, authority: Authority, tmp_path: Path) -> None:
        certificate, key = authority.folder / "client.pem", authority.folder / "client.key"
        with pytest.raises(ConfigurationError, match="FLAME_TLS_CERT and FLAME_TLS_KEY go together"):
            Security(tls_certificate=certificate)
        for wrong in (authority.folder / "server.key", certificate, self.locked(key, tmp_path)):
            with pytest.raises(ConfigurationError, match=f"FLAME_TLS_CERT {certificate} with FLAME_TLS_KEY {wrong}: "):
                await connect("tls://127.0.0.1:1", security=Security(tls_certificate=certificate, tls_key=wrong))
        with pytest.raises(ConfigurationError, match=f"^FLAME_TLS_KEY {tmp_path}: Is a directory"):
            await connect("tls://127.0.0.1:1", security=Security(tls_certificate=certificate, tls_key=tmp_path))

    @staticmethod
    def locked(key: Path, folder: Path) -> Path:
        locked = folder / "locked.key"
        command = ["openssl", "ec", "-aes128", "-passout", "pass:1234", "-in", key, "-out", locked]
        subprocess.run(command, check=True, capture_output=True)
        return locked

    async def test_servers_of_a_cluster_use_it_between_them(self, tmp_path: Path, authority: Authority) -> None:
        edits = {TLS_FILES: str(authority.folder), "# include ./tls.conf": "include ./tls.conf"}
        servers = cluster_of_three(tmp_path, edits)
        security = Security(tls_ca=authority.certificate)
        endpoint = ",".join(f"tls://127.0.0.1:{server.port}" for server in servers)
        try:
            for server in servers:
                server.run()
            await eventually(lambda: self.answers(endpoint, security), "the cluster answers")
            broker = await connect(endpoint, security=security)
            assert broker.connected
            await broker.close()
        finally:
            for server in servers:
                server.kill()


# ---- credentials


async def test_credentials_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "user.creds"
    with pytest.raises(ConfigurationError, match=f"^FLAME_CREDENTIALS {file}: No such file"):
        await connect("nats://127.0.0.1:1", security=Security(credentials=file))
    file.write_text("-----BEGIN NATS USER JWT-----\n")
    with pytest.raises(ConfigurationError, match=f"^FLAME_CREDENTIALS {file}: expected a NATS credentials file"):
        await connect("nats://127.0.0.1:1", security=Security(credentials=file))
