"""Where the cluster is, and what it takes to be let in.

A client takes, in this order: the endpoint it is given; ``FLAME_ENDPOINT``; the current context of the file that
``FLAME_CONFIG`` names, or of ``~/.flame/flame.yaml`` if that exists (`flame.context_file`); the local default. With an
endpoint from elsewhere the file is not read at all, so its credentials are shown to no other server.
``FLAME_CREDENTIALS`` and ``FLAME_TLS_…`` win over what a context says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final, NamedTuple, Self
from urllib.parse import urlsplit

from flame.errors import ConfigurationError

ENDPOINT_VARIABLE: Final = "FLAME_ENDPOINT"
DEFAULT_ENDPOINT: Final = "nats://127.0.0.1:4222"


CONFIG_VARIABLE: Final = "FLAME_CONFIG"
CONFIG_FILE: Final = ".flame/flame.yaml"
"""In the user's home."""
_SCHEMES: Final = ("nats", "tls", "ws", "wss")


def check_endpoint(endpoint: str) -> list[str]:
    """Split ``nats://host:port[,…]`` into servers; raise `ConfigurationError` if it is none."""
    servers = [part.strip() for part in endpoint.split(",") if part.strip()]
    for server in servers or [endpoint]:
        try:
            parts = urlsplit(server)
            legal = parts.scheme in _SCHEMES and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            legal = False
        if not legal:
            raise ConfigurationError(f"endpoint {server!r}: expected nats://HOST:PORT[,nats://HOST:PORT…]")
    return servers


CREDENTIALS_VARIABLE: Final = "FLAME_CREDENTIALS"
TLS_CA_VARIABLE: Final = "FLAME_TLS_CA"
TLS_CERTIFICATE_VARIABLE: Final = "FLAME_TLS_CERT"
TLS_KEY_VARIABLE: Final = "FLAME_TLS_KEY"
SECURITY_VARIABLES: Final = (CREDENTIALS_VARIABLE, TLS_CA_VARIABLE, TLS_CERTIFICATE_VARIABLE, TLS_KEY_VARIABLE)
"""Whoever starts a program that connects by itself passes these on."""


def absolute(file: str, folder: Path | None = None) -> Path:
    """Return where a file is that somebody named: ``~`` is their home, and it starts at ``folder``, or here.

    Files are read again at every reconnect, and by programs that start elsewhere: a relative path would be another.
    """
    return (folder or Path()).absolute() / Path(file).expanduser()


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """The files with which a program proves who it is to the broker, and by which it knows the broker.

    A user and password, or a token, need none: they stand in the endpoint, as ``nats://USER:PASSWORD@HOST:PORT``.
    """

    credentials: Path | None = None
    """A NATS credentials file (``.creds``): a user's JWT and seed. Default: none."""

    tls_ca: Path | None = None
    """The certificates that the broker's must be signed by, as PEM. Default: those that the system trusts."""

    tls_certificate: Path | None = None
    """This program's own certificate, as PEM, where the broker verifies its clients. Needs ``tls_key``."""

    tls_key: Path | None = None
    """The private key of ``tls_certificate``, as PEM and without a passphrase."""

    def __post_init__(self) -> None:
        """Refuse a certificate without its key, and the reverse."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigurationError(
                f"{TLS_CERTIFICATE_VARIABLE} and {TLS_KEY_VARIABLE} go together: expected both or none,"
                f" got only {self.tls_certificate or self.tls_key}"
            )

    @property
    def needs_tls(self) -> bool:
        """Whether a connection without TLS is to be refused."""
        return self.tls_ca is not None or self.tls_certificate is not None

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Self:
        """Read ``FLAME_CREDENTIALS``, ``FLAME_TLS_CA``, ``FLAME_TLS_CERT`` and ``FLAME_TLS_KEY``; all are optional."""

        def file(name: str) -> Path | None:
            value = variables.get(name)
            return absolute(value) if value else None

        return cls(
            credentials=file(CREDENTIALS_VARIABLE),
            tls_ca=file(TLS_CA_VARIABLE),
            tls_certificate=file(TLS_CERTIFICATE_VARIABLE),
            tls_key=file(TLS_KEY_VARIABLE),
        )

    def to_environment(self) -> dict[str, str]:
        """Return the variables from which another program reads the same."""
        files = (self.credentials, self.tls_ca, self.tls_certificate, self.tls_key)
        return {name: str(file) for name, file in zip(SECURITY_VARIABLES, files, strict=True) if file is not None}


class Target(NamedTuple):
    """A cluster, and with what to go there."""

    endpoint: str
    security: Security


def resolve_target(endpoint: str | None = None, variables: Mapping[str, str] = os.environ) -> Target:
    """Return where a client connects to and with what; raise `ConfigurationError` for a file that is no good."""
    own = Security.from_environment(variables)
    endpoint = endpoint or variables.get(ENDPOINT_VARIABLE)
    if endpoint:
        return Target(endpoint, own)
    path = _config_file(variables)
    if path is None:
        return Target(DEFAULT_ENDPOINT, own)
    from flame.context_file import read_context  # noqa: PLC0415  # it knows this module, and few need it

    context = read_context(path)
    given = {field.name: value for field in fields(own) if (value := getattr(own, field.name)) is not None}
    return Target(context.endpoint, replace(context.security, **given))


def _config_file(variables: Mapping[str, str]) -> Path | None:
    """Return the file of contexts: one that is named must be there, the default one need not."""
    named = variables.get(CONFIG_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ConfigurationError(f"{CONFIG_VARIABLE} {path}: expected a file of contexts, there is none")
        return path
    home = variables.get("HOME")
    path = Path(home) / CONFIG_FILE if home else Path(CONFIG_FILE)
    return path if home and path.is_file() else None
