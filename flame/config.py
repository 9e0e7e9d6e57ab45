"""Where the cluster is, and what it takes to be let in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from flame.errors import ConfigurationError

ENDPOINT_VARIABLE: Final = "FLAME_ENDPOINT"
DEFAULT_ENDPOINT: Final = "nats://127.0.0.1:4222"


def resolve_endpoint(endpoint: str | None = None) -> str:
    """Return the given endpoint, otherwise that of the environment, otherwise the local default."""
    return endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT


CREDENTIALS_VARIABLE: Final = "FLAME_CREDENTIALS"
TLS_CA_VARIABLE: Final = "FLAME_TLS_CA"
TLS_CERTIFICATE_VARIABLE: Final = "FLAME_TLS_CERT"
TLS_KEY_VARIABLE: Final = "FLAME_TLS_KEY"
SECURITY_VARIABLES: Final = (CREDENTIALS_VARIABLE, TLS_CA_VARIABLE, TLS_CERTIFICATE_VARIABLE, TLS_KEY_VARIABLE)
"""Whoever starts a program that connects by itself passes these on."""


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
            return Path(value).expanduser() if value else None

        return cls(
            credentials=file(CREDENTIALS_VARIABLE),
            tls_ca=file(TLS_CA_VARIABLE),
            tls_certificate=file(TLS_CERTIFICATE_VARIABLE),
            tls_key=file(TLS_KEY_VARIABLE),
        )
