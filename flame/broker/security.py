"""How a connection proves who it is and makes sure of the broker: TLS contexts, credentials, and refusing less."""

from __future__ import annotations

import importlib.util
import ssl
from typing import TYPE_CHECKING, Any, Final

from nats import errors as nats_errors
from nats.aio.client import Client

from flame.config import (
    CREDENTIALS_VARIABLE,
    TLS_CA_VARIABLE,
    TLS_CERTIFICATE_VARIABLE,
    TLS_KEY_VARIABLE,
    Security,
)
from flame.errors import BrokerUnavailable, ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

_CREDENTIALS_PARTS: Final = (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED")


class NoTls(nats_errors.Error):
    """The server doesn't offer TLS, and nothing was told to it."""

    def __str__(self) -> str:
        """Say so."""
        return "it offers no TLS, and this connection was told to use it"


class CertificateWanted(nats_errors.Error):
    """The server verifies its clients, and this one has nothing to show."""


class StrictClient(Client):
    """A client that keeps to what it was told of TLS."""

    def __init__(self, security: Security, *, needs_tls: bool) -> None:
        """With ``needs_tls`` it says nothing to a server without TLS, whoever took the offer out of its greeting."""
        super().__init__()
        self._security = security
        self._needs_tls = needs_tls

    def _connect_command(self) -> bytes:
        # Made when TLS is established and before anything is sent. nats-py goes on without TLS if it isn't offered.
        if self._needs_tls and not self._server_info.get("tls_required"):
            raise NoTls
        command: bytes = super()._connect_command()
        return command

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except (nats_errors.Error, OSError) as error:
            # nats-py would wait for this transport's end: for ever after a handshake that failed, and otherwise until
            # another error comes of it, which hides this one.
            if self._transport is not None:
                self._transport.close()  # type: ignore[no-untyped-call]  # nats-py
                self._transport = None
            if self._server_info.get("tls_verify") and self._security.tls_certificate is None:
                raise CertificateWanted from None
            if self._server_info.get("auth_required") and isinstance(error, ConnectionError):
                # It says so and closes, and what it said may be lost with the connection.
                raise nats_errors.AuthorizationError from None
            raise
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None and writer.get_extra_info("sslcontext") is not None:
            # nats-py doesn't tell its stream that it has become encrypted; asyncio would complain when it ends.
            writer.transport.get_protocol()._over_ssl = True  # noqa: SLF001


def make_client(servers: list[str], security: Security) -> Client:
    """Return an unconnected client that is as strict as its settings ask."""
    tls = security.needs_tls or any(server.startswith("tls:") for server in servers)
    websocket = any(server.startswith("ws") for server in servers)  # TLS, or its absence, is a matter of the URL there
    return StrictClient(security, needs_tls=tls and not websocket)


def security_options(servers: list[str], security: Security) -> dict[str, Any]:
    """Return nats-py's options for connecting; raise `ConfigurationError` naming the file that is no good."""
    options: dict[str, Any] = {}
    if security.needs_tls or any(server.startswith(("tls:", "wss:")) for server in servers):
        options["tls"] = _tls_context(security)
    if security.credentials is not None:
        _check_credentials(security.credentials)
        options["user_credentials"] = security.credentials
    return options


def not_connected(endpoint: str, security: Security, cause: Exception) -> BrokerUnavailable:
    """Say why there is no connection, and what to do."""
    if isinstance(cause, NoTls):
        return BrokerUnavailable(f"the server at {endpoint} is refused: {cause}")
    if isinstance(cause, CertificateWanted):
        return BrokerUnavailable(
            f"the server at {endpoint} verifies its clients: expected a certificate and its key, named by"
            f" {TLS_CERTIFICATE_VARIABLE} and {TLS_KEY_VARIABLE}"
        )
    if isinstance(cause, ssl.SSLCertVerificationError):
        own = security.tls_ca
        trusted = f"{TLS_CA_VARIABLE} {own}" if own else f"the system's, since {TLS_CA_VARIABLE} is not set"
        return BrokerUnavailable(
            f"the server at {endpoint} can't prove who it is: {cause.verify_message}. Expected a certificate for this"
            f" host, signed by an authority of {trusted}"
        )
    text = (str(cause) or type(cause).__name__).removeprefix("nats: ")
    if isinstance(cause, nats_errors.AuthorizationError) or "authorization violation" in text.lower():
        given = f" of {CREDENTIALS_VARIABLE} {security.credentials}" if security.credentials else ""
        return BrokerUnavailable(
            f"the server at {endpoint} refuses this client's credentials{given}: expected a user and password in the"
            f" endpoint, nats://USER:PASSWORD@HOST:PORT, or a file named by {CREDENTIALS_VARIABLE}"
        )
    return BrokerUnavailable(
        f"no NATS server answers at {endpoint} ({text}): is the cluster up? `flmctl up` starts one here"
    )


def _tls_context(security: Security) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if security.tls_ca is not None:
        try:
            context = ssl.create_default_context(cafile=security.tls_ca)
        except OSError as error:  # SSLError is one
            raise _no_good(TLS_CA_VARIABLE, security.tls_ca, "certificates as PEM", error) from None
    if security.tls_certificate is not None and security.tls_key is not None:
        for name, path in ((TLS_CERTIFICATE_VARIABLE, security.tls_certificate), (TLS_KEY_VARIABLE, security.tls_key)):
            _check_readable(name, path)
        try:
            # With a password given, OpenSSL doesn't ask for one on the terminal.
            context.load_cert_chain(security.tls_certificate, security.tls_key, password="")
        except OSError as error:
            both = f"{security.tls_certificate} with {TLS_KEY_VARIABLE} {security.tls_key}"
            raise _no_good(
                TLS_CERTIFICATE_VARIABLE, both, "a certificate and its key without a passphrase, as PEM", error
            ) from None
    return context


def _check_credentials(path: Path) -> None:
    content = _check_readable(CREDENTIALS_VARIABLE, path)
    if not all(part in content for part in _CREDENTIALS_PARTS):  # nats-py would look for them for ever
        raise ConfigurationError(
            f"{CREDENTIALS_VARIABLE} {path}: expected a NATS credentials file, with a user's JWT and seed"
        )
    if importlib.util.find_spec("nkeys") is None:
        raise ConfigurationError(
            f"{CREDENTIALS_VARIABLE} {path}: needs the package nkeys: pip install 'flame-engine[credentials]'"
        )


def _check_readable(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{name} {path}: {error.strerror}") from None


def _no_good(name: str, what: object, expected: str, error: OSError) -> ConfigurationError:
    reason = error.strerror if not isinstance(error, ssl.SSLError) else f"expected {expected} ({error.reason or error})"
    return ConfigurationError(f"{name} {what}: {reason}")
