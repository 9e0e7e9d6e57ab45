"""What an embedded broker can be told, and the server's configuration file made of it. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flame.errors import ConfigurationError

_MIB = 1024**2
_TIB = 1024**4

_SYNC_INTERVAL = re.compile(r"always|(\d+(ms|s|m|h))+")

_LARGEST_PAYLOAD_BYTES = 64 * _MIB  # the server refuses more than it lets a connection have pending

_CONSUMERS_PER_STREAM = 100_000
"""Servers since 2.15 stop at 1,000 by default; every bound session has a consumer on its stream."""

_LOG_BYTES = 16 * _MIB
_LOG_FILES = 3


@dataclass(frozen=True, kw_only=True)
class EmbeddedBrokerConfig:
    """How to run an embedded broker. Everything has a default but the data folder."""

    data_dir: Path
    """Holds all the broker keeps: messages (in ``jetstream``), log, configuration, lock. Made if absent."""

    port: int = 0
    """Port for clients. 0: a free one, chosen by the server at the first start and kept by later ones."""

    host: str = "127.0.0.1"
    """Address to listen on. The broker asks for no credentials: leave it on the loopback interface."""

    max_payload_bytes: int = 8 * _MIB
    """Largest message, headers included. At most 64 MiB."""

    max_file_store_bytes: int | None = 1 * _TIB
    """What all streams together may reserve on disk. ``None``: three quarters of what is free at the start.

    A stream reserves its size limit when it is created, whatever it holds, and the server refuses one for
    which no room is left. So there is plenty here: else a disk that is half full would hold one application.
    """

    sync_interval: str | None = None
    """How often stored messages are forced to disk: ``"always"``, or a duration such as ``"10s"``.

    ``None`` keeps the server's default of two minutes. A message that was acknowledged survives the death of
    the server in any case; it survives a loss of power once it was forced to disk.
    """

    ready_timeout_s: float = 10.0
    """How long a start may take, waiting for a killed owner's server to end included."""

    stop_timeout_s: float = 5.0
    """How long the server may take to end when asked to; then it is killed."""

    def __post_init__(self) -> None:
        """Refuse what the server would refuse, with a message that names the setting."""
        _expect(0 <= self.port <= 65535, "port", "0 to 65535", self.port)
        _expect(bool(self.host), "host", "an address of this machine", self.host)
        _expect(
            0 < self.max_payload_bytes <= _LARGEST_PAYLOAD_BYTES,
            "max_payload_bytes",
            f"1 to {_LARGEST_PAYLOAD_BYTES}",
            self.max_payload_bytes,
        )
        _expect(
            self.max_file_store_bytes is None or self.max_file_store_bytes > 0,
            "max_file_store_bytes",
            "None or more than 0",
            self.max_file_store_bytes,
        )
        _expect(
            self.sync_interval is None or _SYNC_INTERVAL.fullmatch(self.sync_interval) is not None,
            "sync_interval",
            'None, "always" or a duration such as "500ms", "10s", "2m"',
            self.sync_interval,
        )
        _expect(self.ready_timeout_s > 0, "ready_timeout_s", "more than 0", self.ready_timeout_s)
        _expect(self.stop_timeout_s >= 0, "stop_timeout_s", "0 or more", self.stop_timeout_s)


def server_configuration(
    config: EmbeddedBrokerConfig, *, port: int, data_dir: Path, ports_dir: Path, log_file: Path
) -> str:
    """Return the text of the server's configuration file. The paths must be absolute.

    Monitoring over HTTP stays off, as the server has it by default.
    """
    jetstream = {
        # The server adds a folder "jetstream" to this path.
        "store_dir": _quoted(data_dir),
        "max_file_store": config.max_file_store_bytes,
        "sync_interval": None if config.sync_interval is None else _quoted(config.sync_interval),
        "limits": f"{{ default_max_consumers: {_CONSUMERS_PER_STREAM} }}",
    }
    settings = {
        "server_name": _quoted("flame-embedded"),
        "host": _quoted(config.host),
        "port": port or -1,  # -1 is the server's word for a free one
        "ports_file_dir": _quoted(ports_dir),
        "max_payload": config.max_payload_bytes,
        "log_file": _quoted(log_file),
        "log_size_limit": _LOG_BYTES,
        "log_max_num": _LOG_FILES,
        "jetstream": "{\n" + _lines(jetstream, indent="  ") + "}",
    }
    return "# Written at every start of the embedded broker: changes are lost.\n" + _lines(settings)


def _lines(settings: Mapping[str, object], *, indent: str = "") -> str:
    return "".join(f"{indent}{name}: {value}\n" for name, value in settings.items() if value is not None)


def _quoted(value: str | Path) -> str:
    """Return a string of the server's configuration language; all but plain ASCII is written as bytes."""
    raw = str(value).encode("utf-8", "surrogateescape")
    plain = (chr(byte) if 0x20 <= byte < 0x7F and byte not in b'"\\' else f"\\x{byte:02x}" for byte in raw)
    return f'"{"".join(plain)}"'


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ConfigurationError(f"embedded broker: {name} must be {expected}, got {got!r}")
