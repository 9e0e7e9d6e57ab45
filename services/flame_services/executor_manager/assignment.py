"""What an executor is told about its session: read from the control plane when it is started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.protocol import defaults, subjects
from flame.protocol.records import (
    ApplicationRecord,
    ApplicationSpec,
    BindingRecord,
    SessionRecord,
    decode_record,
)
from flame.protocol.states import SessionState
from flame.protocol.supervision import Assignment
from flame.protocol.values import ValueRef
from flame_services.executor_manager.handout import Handout, read_handout
from flame_services.executor_manager.launch import LaunchRefused

A = TypeVar("A")
B = TypeVar("B")

FRESH_S: Final = 2.0
"""What a binding says of its session holds for this long after it was written; later the session is asked."""
SUPERSEDED = "superseded: its session has ended or was bound anew"


class Superseded(FlameError):
    """A binding's session has ended, or was bound anew since: its executor has nothing to do."""


@dataclass(frozen=True, slots=True)
class Registered:
    """An application as it stands in the register."""

    record: ApplicationRecord
    revision: int


@dataclass(frozen=True, slots=True)
class Briefing:
    """All that is needed to start an executor."""

    application: Registered
    assignment: Assignment


async def read_briefing(broker: Broker, binding: BindingRecord, known: Registered | None = None) -> Briefing:
    """Read what a binding refers to, by its leader.

    ``known`` is the application as this node has heard of it. Where it is what the scheduler knew, which has said all
    else in the binding, nothing but common data has to be read; that the session has not gone on since is taken for
    granted then for a moment only.

    Raises `Superseded`, `LaunchRefused` if something is not there, and `Unavailable` where reading failed.
    """
    key, revision = binding.common_data_key, binding.application_revision
    if known is not None and key is not None and 0 < revision <= known.revision and _is_fresh(binding):
        handout = await read_handout(broker, binding)
        if handout is not None:
            return Briefing(known, _assignment(binding, known.record.spec, binding.max_executors, handout))
    reading = broker.bucket(subjects.APPLICATIONS).get(binding.application)
    session, entry = await _both(current_session(broker, binding), reading)
    application = decode_record(ApplicationRecord, entry.value) if entry and entry.value else None
    if entry is None or application is None:
        raise LaunchRefused(f"application {binding.application!r} is not registered any more")
    handout = await read_handout(broker, session)
    while handout is None:
        read, session = session, await current_session(broker, binding)
        if (read.common_data_key, read.credentials_key) == (session.common_data_key, session.credentials_key):
            raise LaunchRefused(f"the common data or the credentials of session {session.id!r} are gone")
        handout = await read_handout(broker, session)  # it was changed just then
    most = min(session.options.max_instances or application.spec.max_instances, application.spec.max_instances)
    return Briefing(
        Registered(application, entry.revision),
        _assignment(binding, application.spec, binding.max_executors or most, handout),
    )


def _is_fresh(binding: BindingRecord) -> bool:
    return abs(time.time() - binding.created) < FRESH_S


def _assignment(binding: BindingRecord, spec: ApplicationSpec, max_executors: int, handout: Handout) -> Assignment:
    data = handout.common_data
    return Assignment(
        application=binding.application,
        session=binding.session,
        epoch=binding.epoch,
        stream=subjects.task_stream(binding.application),
        consumer=binding.consumer,
        fence=binding.fence,
        common_data=b"" if isinstance(data, ValueRef) else data,
        common_data_ref=data if isinstance(data, ValueRef) else None,
        common_data_version=handout.common_data_version,
        credentials=handout.credentials,
        delegations=handout.delegations,
        concurrency=spec.concurrency,
        max_executors=max_executors,
        ack_wait_s=binding.ack_wait_s,
        leave_timeout_s=defaults.LEAVE_TIMEOUT_S,
        delay_release_s=spec.delay_release_s,
        timeout_s=spec.timeout_s,
        expires_s=spec.expires_s,
        delay_s=spec.delay_s,
        max_attempts=spec.max_attempts,
        retry_on=spec.retry_on,
        retry_backoff_s=spec.retry_backoff_s,
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
