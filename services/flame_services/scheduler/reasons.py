"""Why a session has fewer executors than it wants, in words that don't change while the reason doesn't."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from flame.protocol.resources import Resources, format_bytes
from flame_services.scheduler.parts import Session

NO_NODE: Final = "no node is ready"
NO_COMMON_NODE: Final = "no node is ready but what is attached for other sessions"
ROOM_IS_MADE: Final = "room is being made for it: executors of others leave when their tasks are done"


def retries(session: Session, limit: int) -> str:
    """Say that a failed attempt is to be repeated, but not yet."""
    failures = session.record.bind_failures
    if failures:
        return f"an executor failed to enter {failures} of {limit} times; it is tried again after a pause"
    return "its last executor ended out of order; another one is started after a pause"


def application_is_full(name: str, limit: int) -> str:
    """Say that an application has all the executors that it may have."""
    return f"application {name} has its {limit} executors"


def cluster_is_full(limit: int) -> str:
    """Say that the cluster has all the executors that it may have."""
    return f"the cluster has its {limit} executors"


def together(count: int, room: int) -> str:
    """Say that there is room, but not for as many as have to begin at once."""
    return f"needs {count} executors at once (min_instances); there is room for {room}"


def no_room(request: Resources, capacities: Iterable[Resources], others_first: bool) -> str:
    """Say what of a request no node has, or has free."""
    known = list(capacities)
    lacking = [
        name for name in Resources._fields if getattr(request, name) > max(getattr(have, name) for have in known) + 1e-9
    ]
    if lacking:
        needs = ", ".join(_amount(name, getattr(request, name)) for name in lacking)
        most = {name: max(getattr(have, name) for have in known) for name in lacking}
        if not any(most.values()):
            return f"needs {needs}; no node has {'one' if lacking == ['gpu'] else 'any'}"
        have = ", ".join(_amount(name, most[name]) for name in lacking)
        return f"needs {needs}; the most any node has is {have}"
    needs = _all_of(request)
    if not any(request.fits_in(have) for have in known):
        return f"needs {needs}; no node has all of it"
    if others_first:
        return f"needs {needs}; what is free is kept for sessions that come first"
    return f"needs {needs}; no node has that much free now"


def _all_of(request: Resources) -> str:
    return ", ".join(_amount(name, value) for name, value in request._asdict().items() if value) or "nothing"


def _amount(name: str, value: float) -> str:
    if name == "memory":
        return f"mem={format_bytes(int(value))}"
    return f"{name}={value:g}"
