"""Which runs on this node must have stopped by now: those over their time, and those that were cancelled.

An executor stops them itself if it can. What is still there `flame.protocol.defaults.TASK_STOP_S` later is user code
that blocks, or that goes on regardless; then the process has to end.

Most tasks are over before anybody could cancel them. So a session's control messages are followed only once one of its
tasks runs for a while, and what was said before is made up for by a look for the task's record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from flame.broker.seam import Broker, LiveMessage, Subscription
from flame.errors import MalformedMessage
from flame.ledger import RUNNING, Slot
from flame.protocol import defaults, subjects
from flame.protocol.messages import TaskFault
from flame.protocol.records import BindingRecord
from flame.protocol.supervision import Control
from flame_services.executor_manager.verdicts import has_record, timed_out

FOLLOW_S: Final = 1.0
"""A task that runs for longer than this has its session followed."""

_CANCELLED_MOST: Final = 65_536
"""Cancelled tasks of one session that are remembered, the newest: most never ran here."""

OnStop = Callable[[Slot, TaskFault | None], None]
"""Gets a run that must end with its process, and what its record is to say; ``None``: it has one."""


@dataclass(slots=True)
class _Session:
    """A session whose control messages are followed."""

    subscription: Subscription
    looked: dict[str, set[str]] = field(default_factory=dict)
    """By executor: the running tasks whose records were looked for since it is followed."""
    cancelled: dict[str, float] = field(default_factory=dict)
    """Tasks that are said to be cancelled, and since when that is known."""


class Stops:
    """Watches the runs of a node's executors."""

    def __init__(self, broker: Broker) -> None:
        """Bind to a broker."""
        self._broker = broker
        self._sessions: dict[str, _Session] = {}

    async def look(self, binding: BindingRecord, slots: Sequence[Slot], now: float, on_stop: OnStop) -> None:
        """Look at what an executor runs, and call ``on_stop`` for what must end, at each look while it goes on."""
        session = self._sessions.get(binding.session)
        if session is not None and (looked := session.looked.get(binding.executor)):
            looked.intersection_update([slot.task for slot in slots])
        for slot in slots:
            if slot.state != RUNNING or not slot.task.startswith(f"{binding.application}.{binding.session}."):
                continue
            if slot.deadline and now > slot.deadline + defaults.TASK_STOP_S:
                on_stop(slot, timed_out(slot.deadline - slot.started_at))
            elif now - slot.started_at > FOLLOW_S and await self._is_cancelled(binding, slot, now):
                on_stop(slot, None)

    async def _is_cancelled(self, binding: BindingRecord, slot: Slot, now: float) -> bool:
        """Whether a run was cancelled and had its time to stop."""
        session = self._sessions.get(binding.session)
        if session is None:
            session = await self._follow(binding)
        looked = session.looked.setdefault(binding.executor, set())
        if slot.task not in looked:
            looked.add(slot.task)
            if await has_record(self._broker, slot.task):
                session.cancelled.setdefault(slot.task, now)
        since = session.cancelled.get(slot.task)
        if since is None or now <= max(since, slot.started_at) + defaults.TASK_STOP_S:
            return False
        if await has_record(self._broker, slot.task):
            return True
        del session.cancelled[slot.task]  # whoever said so was wrong: it is not to be stopped
        return False

    async def _follow(self, binding: BindingRecord) -> _Session:
        prefix = f"{binding.application}.{binding.session}."
        heard: dict[str, float] = {}
        subject = subjects.control(binding.application, binding.session)
        subscription = await self._broker.subscribe(subject, partial(_on_control, prefix, heard))
        session = self._sessions[binding.session] = _Session(subscription, cancelled=heard)
        return session

    def follows(self, session: str) -> bool:
        """Whether a session's control messages are followed."""
        return session in self._sessions

    def forget_looks(self) -> None:
        """Look for every task's record again: what was said while the broker was away was not heard."""
        for session in self._sessions.values():
            session.looked.clear()

    async def forget(self, session: str) -> None:
        """Let go of a session that no executor here serves any more."""
        known = self._sessions.pop(session, None)
        if known is not None:
            await known.subscription.stop()


def _on_control(prefix: str, cancelled: dict[str, float], message: LiveMessage) -> None:
    try:
        tasks = Control.decode(message.data).cancel
    except MalformedMessage:
        return
    now = time.monotonic()
    for task in tasks:
        cancelled.setdefault(f"{prefix}{task}", now)
    while len(cancelled) > _CANCELLED_MOST:
        del cancelled[next(iter(cancelled))]
