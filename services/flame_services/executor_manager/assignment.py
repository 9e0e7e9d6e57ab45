"""What an executor is told about its session: read from the control plane when it is started."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.protocol import defaults, subjects
from flame.protocol.messages import Assignment
from flame.protocol.records import (
    ApplicationRecord,
    BindingRecord,
    SessionRecord,
    decode_record,
)
from flame.protocol.states import SessionState
from flame_services.executor_manager.launch import LaunchRefused

A = TypeVar("A")
B = TypeVar("B")

SUPERSEDED = "superseded: its session has ended or was bound anew"


class Superseded(FlameError):
    """A binding's session has ended, or was bound anew since: its executor has nothing to do."""


@dataclass(frozen=True, slots=True)
class Briefing:
    """All that is needed to start an executor."""

    application: ApplicationRecord
    revision: int
    """Of the application's record."""
    assignment: Assignment


async def read_briefing(broker: Broker, binding: BindingRecord) -> Briefing:
    """Read what a binding refers to, by its leader.

    Raises `Superseded`, `LaunchRefused` if something is not there, and `Unavailable` where reading failed.
    """
    reading = broker.bucket(subjects.APPLICATIONS).get(binding.application)
    session, entry = await _both(current_session(broker, binding), reading)
    application = decode_record(ApplicationRecord, entry.value) if entry and entry.value else None
    if entry is None or application is None:
        raise LaunchRefused(f"application {binding.application!r} is not registered any more")
    common_data = b""
    if session.common_data_key:
        kept = await broker.bucket(subjects.COMMON_DATA).get(session.common_data_key)
        if kept is None or kept.value is None:
            raise LaunchRefused(f"the common data of session {session.id!r} is gone")
        common_data = kept.value
    spec = application.spec
    return Briefing(
        application,
        entry.revision,
        Assignment(
            application=binding.application,
            session=binding.session,
            epoch=binding.epoch,
            stream=subjects.task_stream(binding.application),
            consumer=binding.consumer,
            fence=binding.fence,
            common_data=common_data,
            concurrency=spec.concurrency,
            max_executors=min(session.options.max_instances or spec.max_instances, spec.max_instances),
            ack_wait_s=binding.ack_wait_s,
            leave_timeout_s=defaults.LEAVE_TIMEOUT_S,
        ),
    )


async def _both(first: Coroutine[Any, Any, A], second: Coroutine[Any, Any, B]) -> tuple[A, B]:
    """Wait for two at once; what the first raises counts before what the second does."""
    later = asyncio.ensure_future(second)
    try:
        return await first, await later
    finally:
        if not later.cancel() and not later.cancelled():
            later.exception()  # the first one's was raised instead


async def current_session(broker: Broker, binding: BindingRecord) -> SessionRecord:
    """Return the session of a binding, by its leader; raise `Superseded` if the binding is not in force."""
    entry = await broker.bucket(subjects.SESSIONS).get(binding.session)
    session = decode_record(SessionRecord, entry.value) if entry and entry.value else None
    if session is None or session.epoch != binding.epoch or session.state not in _SERVED:
        raise Superseded(SUPERSEDED)
    return session


_SERVED = (SessionState.OPEN, SessionState.CLOSING)
