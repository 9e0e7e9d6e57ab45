"""What can go wrong when a broker of our own is started. After each of them no process is left."""

from __future__ import annotations

from flame.errors import BrokerUnavailable, ConfigurationError


class BrokerNotInstalled(ConfigurationError):
    """There is no ``nats-server`` to run: install one, or say where it is."""


class PortInUse(ConfigurationError):
    """Another program listens on the port: choose another, or 0 for a free one."""


class DataDirInUse(ConfigurationError):
    """Another broker, or the last one's server on its way out, holds the data folder."""


class BrokerStartFailed(BrokerUnavailable):
    """The server ended, or did not become ready in time. The text ends with the last lines of its log."""
