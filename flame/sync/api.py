"""The module's own functions: the same as on a `Connection`, on the process's default one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flame.client import api
from flame.client.spec import SessionSpec
from flame.credentials import GivenSecrets
from flame.protocol import defaults
from flame.protocol.records import ApplicationSpec
from flame.protocol.states import CloseMode
from flame.sync.background import background
from flame.sync.session import Session


def create_session(  # noqa: PLR0913  # each is something to say of a session
    application: str,
    common_data: bytes = b"",
    *,
    session_id: str | None = None,
    min_instances: int | None = None,
    max_instances: int | None = None,
    priority: int = defaults.PRIORITY,
    resources: str | None = None,
    labels: Mapping[str, str] | None = None,
    weight: float | None = None,
    idle_timeout_s: float | None = None,
    credentials: GivenSecrets | None = None,
    delegations: GivenSecrets | None = None,
) -> Session:
    """Open a new session on the default connection; see `flame.create_session`."""
    here = background()
    session = here.run(
        api.create_session(
            application,
            common_data,
            session_id=session_id,
            min_instances=min_instances,
            max_instances=max_instances,
            priority=priority,
            resources=resources,
            labels=labels,
            weight=weight,
            idle_timeout_s=idle_timeout_s,
            credentials=credentials,
            delegations=delegations,
        )
    )
    return Session(here, session)


def open_session(session_id: str, spec: SessionSpec | None = None) -> Session:
    """Return an open session on the default connection; see `flame.open_session`."""
    here = background()
    return Session(here, here.run(api.open_session(session_id, spec)))


def close_session(session_id: str, *, mode: CloseMode | str = CloseMode.CLOSE) -> None:
    """Ask for a session's end on the default connection; see `flame.close_session`."""
    background().run(api.close_session(session_id, mode=mode))


def register_application(name: str, spec: ApplicationSpec | dict[str, Any]) -> None:
    """Register an application on the default connection; see `flame.register_application`."""
    background().run(api.register_application(name, spec))
