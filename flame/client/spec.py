"""What a new session is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flame.credentials import GivenSecrets, check_secrets
from flame.errors import InvalidArgument
from flame.protocol import defaults
from flame.protocol.api import CreateSession
from flame.protocol.records import SessionOptions
from flame.protocol.subjects import check_application, check_token
from flame.protocol.values import check_size


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSpec:
    """A session to be created."""

    application: str
    common_data: bytes = b""
    """Handed to every executor of the session as ``context.common_data``. At most 1 GiB; ``resources`` must leave room
    for it in memory.
    """
    min_instances: int | None = None
    """Executors from the session's creation to its end; ``None``: the application's."""
    max_instances: int | None = None
    """The most executors at once; ``None``: the application's."""
    priority: int = defaults.PRIORITY
    """Higher is served first; 0 is the lowest."""
    resources: str | None = None
    """What each executor needs, such as ``cpu=0.5,mem=512m,gpu=1``; ``None``: the cluster's default."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What to find it by in `Connection.list_sessions`. At most 32, each key and value of at most 63 characters."""
    weight: float | None = None
    """Its part of a full cluster, in relation to that of others of its priority; ``None``: the application's."""
    idle_timeout_s: float | None = None
    """It is closed when it has had no task for this long; 0: never. ``None``: the application's, a day by default."""
    credentials: GivenSecrets = field(default_factory=dict, repr=False)
    """Secrets by name, for its executors only: in ``context.credentials`` they hide their values, see `Secret`. At most
    64, and 32 KiB. They are kept until the session has ended.
    """
    delegations: GivenSecrets = field(default_factory=dict, repr=False)
    """The same of what says on whose behalf the session acts: in ``context.delegations``."""

    def request(self, session_id: str | None) -> CreateSession:
        """Return the control API's request; raise `InvalidArgument` for what can't be asked for."""
        check_application(self.application)
        if session_id is not None:
            check_token("session", session_id)
        options: dict[str, Any] = {
            "min_instances": self.min_instances,
            "max_instances": self.max_instances,
            "priority": self.priority,
            "labels": self.labels,
            "weight": self.weight,
            "idle_timeout_s": self.idle_timeout_s,
        }
        if self.resources is not None:
            options["resources"] = self.resources
        return CreateSession(
            application=self.application,
            common_data=check_common_data(self.common_data),
            id=session_id,
            options=SessionOptions.check("session", options),
            credentials=check_secrets("credentials", self.credentials),
            delegations=check_secrets("delegations", self.delegations),
        )


def check_common_data(data: object) -> bytes:
    """Return common data if it can be that; raise `InvalidArgument`, or `PayloadTooLarge`."""
    if not isinstance(data, bytes):
        raise InvalidArgument(f"common_data: expected bytes, got {type(data).__name__}")
    check_size("common_data", len(data))
    return data
