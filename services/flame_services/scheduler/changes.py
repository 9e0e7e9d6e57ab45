"""Which event a change of the cluster's records is, if it is one. What the events mean: `flame.protocol.events`."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from flame.protocol.codes import ReasonCode
from flame.protocol.events import ClusterEvent, Noun
from flame.protocol.records import ApplicationRecord, ExecutorRecord, SessionRecord
from flame.protocol.states import ExecutorState, NodeState
from flame_services.scheduler.view import View


class Judgement(NamedTuple):
    """What a scheduler believes of a node."""

    state: NodeState
    stopping: bool

    @classmethod
    def of(cls, view: View, name: str) -> Judgement | None:
        """Return what a view holds of a node; ``None`` if nothing."""
        node = view.nodes.get(name)
        return None if node is None else cls(node.state, node.record.stopping)


def application_event(before: ApplicationRecord | None, after: ApplicationRecord | None) -> ClusterEvent | None:
    """Return the event of an application's change; ``None`` if it is none."""
    known = after or before
    if known is None:
        return None
    if after is None:
        event, at = "removed", time.time()
    elif before is None:
        event, at = after.state.value, after.created
    elif before.state is not after.state:
        event, at = after.state.value, time.time()
    elif before.spec != after.spec:
        event, at = "updated", after.updated
    else:
        return None
    return ClusterEvent(
        noun=Noun.APPLICATION,
        id=known.name,
        event=event,
        state="" if after is None else after.state.value,
        before="" if before is None else before.state.value,
        at=at,
        application=known.name,
    )


def session_event(before: SessionRecord | None, after: SessionRecord | None) -> ClusterEvent | None:
    """Return the event of a change of a session's state; ``None`` if it is none."""
    if after is None:
        return None if before is None else of_session(before, "removed", before=before.state.value, state="")
    if before is None:
        return of_session(after, after.state.value, at=after.created, before="")
    if before.state is not after.state or before.close_mode is not after.close_mode:
        event = after.state.value
    elif after.settled and not before.settled:
        event = "settled"
    elif after.common_data_version != before.common_data_version:
        event = "updated"
    else:
        return None
    return of_session(
        after,
        event,
        before=before.state.value,
        at=after.ended if after.ended != before.ended else 0.0,
        reason=after.reason,
        code=after.code,
    )


def executor_event(
    before: ExecutorRecord | None, after: ExecutorRecord | None, *, node_lost: bool
) -> ClusterEvent | None:
    """Return the event of a change of an executor's state; ``None`` if it is none.

    One whose record goes although it was not released has been given up.
    """
    known = after or before
    if known is None or (before is not None and before.state is (after.state if after else ExecutorState.RELEASED)):
        return None
    if after is not None:
        state, at, reason, code = after.state, after.updated, after.reason, after.code
    else:
        state, at = ExecutorState.RELEASED, time.time()
        reason, code = "its binding was removed", ReasonCode.UNBOUND.value
        if node_lost:
            reason, code = f"it was given up with its node {known.node}", ReasonCode.NODE_LOST.value
    return ClusterEvent(
        noun=Noun.EXECUTOR,
        id=known.id,
        event=state.value,
        state=state.value,
        before="" if before is None else before.state.value,
        at=at,
        application=known.application,
        session=known.session,
        node=known.node,
        executor=known.id,
        reason=reason,
        code=code,
    )


_NODE_REASONS: Final = {
    NodeState.UNKNOWN: ("its heartbeats are missing: nothing new is placed there", ""),
    NodeState.NOT_READY: ("it was given up with its executors: no heartbeat for too long", ReasonCode.NODE_LOST.value),
}


def node_event(name: str, before: Judgement | None, after: Judgement | None) -> ClusterEvent | None:
    """Return the event of a change in what is believed of a node; ``None`` if it is none."""
    if before == after:
        return None
    reason = code = ""
    if after is None:
        event = "removed"
    elif before is None or before.state is not after.state:
        event = after.state.value
        reason, code = _NODE_REASONS.get(after.state, ("", ""))
    elif after.stopping:
        event, reason = "stopping", "its manager stops: nothing new is placed there"
    else:
        event = after.state.value
    return ClusterEvent(
        noun=Noun.NODE,
        id=name,
        event=event,
        state="" if after is None else after.state.value,
        before="" if before is None else before.state.value,
        at=time.time(),
        node=name,
        reason=reason,
        code=code,
    )


def of_session(
    record: SessionRecord,
    event: str,
    *,
    before: str | None = None,
    state: str | None = None,
    at: float = 0.0,
    reason: str = "",
    code: str = "",
) -> ClusterEvent:
    """Return an event of a session; what it is in now and what it was in before are what its record says, if not given.

    Without ``at`` it is now.
    """
    return ClusterEvent(
        noun=Noun.SESSION,
        id=record.id,
        event=event,
        state=record.state.value if state is None else state,
        before=record.state.value if before is None else before,
        at=at or time.time(),
        application=record.application,
        session=record.id,
        reason=reason,
        code=code,
    )
