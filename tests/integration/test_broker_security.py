"""TLS and credentials: who is let in, whom a client trusts, and what it says when it doesn't."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import time
from collections import ChainMap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nkeys
import pytest

from flame.broker.jetstream import connect
from flame.broker.security import security_options
from flame.config import SECURITY_VARIABLES, Security
from flame.errors import BrokerUnavailable, ConfigurationError
from tests.support.certificates import OPENSSL, Authority, openssl
from tests.support.cluster import eventually
from tests.support.servers import (
    OPTIONS,
    Server,
    Servers,
    answers,
    cluster_of_three,
    run_tasks,
    served,
    single,
    try_connect,
)

TLS_FILES = "/etc/flame/tls"
needs_openssl = pytest.mark.skipif(OPENSSL is None, reason="there is no openssl command to make certificates with")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority(tmp_path_factory.mktemp("tls") / "ours", "ours")
    made.issue("server", "IP:127.0.0.1")
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
    def server(folder: Path, authority: Authority, *options: str) -> Server:
        edits = [OPTIONS[option] for option in options]
        return single(folder, dict(ChainMap({TLS_FILES: str(authority.folder)}, *map(dict, edits))))

    @pytest.fixture
    async def running(self, tmp_path: Path, authority: Authority) -> AsyncIterator[str]:
        """A server with TLS that anybody may connect to."""
        server = self.server(tmp_path, authority, "tls")
        server.run()
        endpoint = f"tls://127.0.0.1:{server.port}"
        await eventually(lambda: answers(endpoint, Security(tls_ca=authority.certificate)), "it answers")
        yield endpoint
        server.stop()

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
        server = self.server(tmp_path, authority, "tls", "verified clients")
        server.check = lambda: answers(f"tls://127.0.0.1:{server.port}", Security.from_environment())
        async with served(tmp_path, Servers([server], scheme="tls")) as cluster:
            await run_tasks(cluster)  # executors have the same files from their manager
            monkeypatch.delenv("FLAME_TLS_CERT")
            monkeypatch.delenv("FLAME_TLS_KEY")
            with pytest.raises(BrokerUnavailable, match=r"verifies its clients: expected .* FLAME_TLS_CERT"):
                await connect(cluster.broker.endpoint)

    async def test_a_client_without_settings_uses_it_if_the_system_knows_the_authority(
        self,
        running: str,
        authority: Authority,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        plain = running.replace("tls:", "nats:")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        assert await answers(plain, Security())
        assert [record for record in caplog.records if record.name == "asyncio"] == []
        monkeypatch.delenv("SSL_CERT_FILE")
        with pytest.raises(BrokerUnavailable, match=r"can't prove who it is: .* FLAME_TLS_CA is not set"):
            await connect(plain)

    async def test_a_server_of_another_authority_is_refused(self, running: str, tmp_path: Path) -> None:
        other = Authority(tmp_path / "other", "other")
        with pytest.raises(BrokerUnavailable, match=r"can't prove who it is: .* FLAME_TLS_CA .*other/ca\.pem"):
            await connect(running, security=Security(tls_ca=other.certificate))

    async def test_a_server_under_another_name_is_refused(self, running: str, authority: Authority) -> None:
        with pytest.raises(BrokerUnavailable, match="can't prove who it is"):
            await connect(running.replace("127.0.0.1", "localhost"), security=Security(tls_ca=authority.certificate))

    @pytest.mark.parametrize("scheme", ["tls", "nats"])
    async def test_a_server_without_it_is_told_nothing(self, scheme: str, tmp_path: Path, authority: Authority) -> None:
        heard = bytearray()
        info = json.dumps({"server_id": "x", "version": "2.15.1", "headers": True, "max_payload": 1024})

        talks: list[asyncio.Task[None] | None] = []

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            talks.append(asyncio.current_task())
            writer.write(f"INFO {info}\r\n".encode())
            heard.extend(await reader.read())
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

        listener = await asyncio.start_server(talk, "127.0.0.1")
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            security = Security(tls_ca=authority.certificate if scheme == "nats" else None)
            with pytest.raises(BrokerUnavailable, match=f"{port} is refused: it offers no TLS"):
                await connect(f"{scheme}://user:password@127.0.0.1:{port}", security=security)
            async with asyncio.timeout(10):
                for ended in filter(None, talks):
                    await ended
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
        openssl("ec", "-aes128", "-passout", "pass:1234", "-in", key, "-out", locked)
        return locked

    async def test_servers_of_a_cluster_use_it_between_them(self, tmp_path: Path, authority: Authority) -> None:
        edits = {TLS_FILES: str(authority.folder), "# include ./tls.conf": "include ./tls.conf"}
        servers = cluster_of_three(tmp_path, edits)
        security = Security(tls_ca=authority.certificate)
        endpoint = ",".join(f"tls://127.0.0.1:{server.port}" for server in servers)
        try:
            for server in servers:
                server.run()
            await eventually(lambda: answers(endpoint, security), "the cluster answers")
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


class TestCredentials:
    """A server that knows users by what an operator has signed, as larger installations of NATS do."""

    def test_the_package_they_need_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "user.creds"
        file.write_text("-----BEGIN NATS USER JWT-----\n-----BEGIN USER NKEY SEED-----\n")
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            ConfigurationError, match=f"^FLAME_CREDENTIALS {file}: needs the package nkeys: pip install"
        ):
            security_options([], Security(credentials=file))

    async def test_a_file_of_them_lets_a_client_in(self, tmp_path: Path) -> None:
        operator, system, account, user = (_Identity(prefix) for prefix in (b"O", b"A", b"A", b"U"))
        limits = {"subs": -1, "conn": -1, "leaf": -1, "imports": -1, "exports": -1, "data": -1, "payload": -1}
        storage = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
        claims: dict[str, Any] = {"type": "account", "limits": {**limits, **storage, "wildcards": True}}
        accounts = {
            account.public: operator.sign(account, claims),
            system.public: operator.sign(system, {**claims, "limits": limits}),
        }
        lines = (
            f'operator: "{operator.sign(operator, {"type": "operator"})}"',
            f"system_account: {system.public}",
            "resolver: MEMORY",
            f"resolver_preload: {json.dumps(accounts)}",
        )
        server = single(tmp_path, {"# authorization": "\n".join((*lines, "# authorization"))})
        server.run()
        endpoint = f"nats://127.0.0.1:{server.port}"
        file = tmp_path / "user.creds"
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{account.sign(user, {'type': 'user', 'subs': -1, 'payload': -1})}\n"
            f"------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
        try:
            broker = await eventually(lambda: try_connect(endpoint, Security(credentials=file)), "it answers")
            await broker.close()
            with pytest.raises(BrokerUnavailable, match=r"refuses this client's credentials.*FLAME_CREDENTIALS"):
                await connect(endpoint)
        finally:
            server.stop()


class _Identity:
    """A key pair that can sign what NATS takes for a JSON web token."""

    def __init__(self, prefix: bytes) -> None:
        kinds = {b"O": nkeys.PREFIX_BYTE_OPERATOR, b"A": nkeys.PREFIX_BYTE_ACCOUNT, b"U": nkeys.PREFIX_BYTE_USER}
        seed = nkeys.encode_seed(secrets.token_bytes(32), kinds[prefix])
        self.seed = seed.decode()
        self._pair = nkeys.from_seed(bytearray(seed))
        self.public = self._pair.public_key.decode()

    def sign(self, other: _Identity, claims: dict[str, Any]) -> str:
        body = {"jti": secrets.token_hex(8), "iat": int(time.time()), "iss": self.public, "sub": other.public}
        parts = ({"typ": "JWT", "alg": "ed25519-nkey"}, {**body, "name": "test", "nats": {"version": 2, **claims}})
        signed = ".".join(self._encoded(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{self._encoded(self._pair.sign(signed.encode()))}"

    @staticmethod
    def _encoded(raw: bytes) -> str:
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
