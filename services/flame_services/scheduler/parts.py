"""What a view consists of: each thing's record, and what is known beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from flame.protocol.records import BindingRecord, ExecutorRecord, NodeRecord, SessionRecord
from flame.protocol.resources import Resources
from flame.protocol.states import CloseMode, ExecutorState, NodeState, SessionState
from flame_services.scheduler.standings import Standing

NOTHING: Final = Resources()
COMING: Final = -1
"""Instead of a priority: of executors that leave or have ended, whose room is coming."""


@dataclass(slots=True)
class Session:
    """A session and what serves it."""

    record: SessionRecord
    revision: int
    bindings: dict[str, BindingRecord] = field(default_factory=dict)
    """By key."""
    demand: bool = False
    """A task waits and nobody serves the session."""
    holds_tasks: bool = False
    """Nobody serves it, and tasks are stored that may not be started yet; or it is not known whether any are."""
    busy: bool = False
    """A decision about it is being carried out."""
    retry_at: float = 0.0
    """After a failure: nothing is bound before."""
    crashes: int = 0
    """Executors lost in a row, for the back-off."""
    avoid: str = ""
    """The node where the last attempt failed."""
    without_consumer: int = -1
    """The epoch whose consumer is known to be deleted."""
    drained: bool = False
    """It was closed to be drained, and nothing of it was stored any more."""
    look_from: float = 0.0
    """When it drains: the next look whether a task is stored is not made before."""
    waits_for: str = ""
    """Why it has fewer executors than it wants; empty if it hasn't, or nothing is in its way."""
    promised: list[str] = field(default_factory=list)
    """While it is busy: the nodes where executors are being bound that are not known as bindings yet."""
    standing: Standing | None = None
    """As it was last looked at, if nothing changed since."""

    @property
    def id(self) -> str:
        """The session's id."""
        return self.record.id

    @property
    def drains(self) -> bool:
        """Whether it goes on being served until none of its tasks waits."""
        return self.record.state is SessionState.CLOSING and goes_on(self.record) and not self.drained

    @property
    def unsettled(self) -> bool:
        """Whether it has ended but some of its tasks may lack their records."""
        return self.record.state is not SessionState.OPEN and not self.record.settled


def goes_on(record: SessionRecord) -> bool:
    """Whether a session's tasks are still to be run: it is open, or closing but to be drained first."""
    return record.state is SessionState.OPEN or (
        record.state is SessionState.CLOSING and record.close_mode is CloseMode.DRAIN
    )


@dataclass(slots=True)
class Executor:
    """An executor and how it has fared."""

    record: ExecutorRecord
    idle_since: float | None = None
    """When it was first seen to have nothing to do."""
    serving_since: float | None = None
    """When it was first seen to take tasks."""
    pending_at: float = 0.0
    """When it was first seen to say that so much waits."""
    finished: int = 0
    finished_at: float = 0.0
    rate: float = 0.0
    """Tasks a second, lately."""

    def take(self, record: ExecutorRecord, now: float) -> None:
        """Take over a report."""
        if self.record.idle and not record.idle:
            self.finished_at = now  # what it had no task for says nothing of how fast it is
        if self.record.pending != record.pending:
            self.pending_at = now
        self.record = record
        if self.serving_since is None and record.state is ExecutorState.BOUND:
            self.serving_since = now
        if not record.idle or record.state is not ExecutorState.BOUND:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        finished, passed_s = record.succeeded + record.failed + record.cancelled, now - self.finished_at
        if finished > self.finished and passed_s > 0:
            self.rate = (finished - self.finished) / passed_s
        elif record.running and passed_s * self.rate > 1:
            self.rate = 1 / passed_s  # what it runs now takes longer than what it ran before
        if finished != self.finished:
            self.finished, self.finished_at = finished, now


@dataclass(slots=True)
class Node:
    """A node, and what is left of it."""

    record: NodeRecord
    seen_at: float
    """When its heartbeat was last seen to change."""
    state: NodeState = NodeState.READY
    used: Resources = NOTHING
    bindings: dict[str, Resources] = field(default_factory=dict)
    """What each of its bindings uses, by key."""
    piles: dict[int, tuple[int, Resources]] = field(default_factory=dict)
    """How many of its executors are of which priority, or `COMING`, and what they use together."""
    pile_of: dict[str, int] = field(default_factory=dict)
    """Which of these each of its bindings is in, by key."""

    def place(self, key: str, uses: Resources, pile: int) -> None:
        """Account for a binding."""
        self.bindings[key] = uses
        self.used = self.used.plus(uses)
        count, amount = self.piles.get(pile, (0, NOTHING))
        self.piles[pile] = count + 1, amount.plus(uses)
        self.pile_of[key] = pile

    def remove(self, key: str) -> None:
        """Account for a binding no more, if it was."""
        uses = self.bindings.pop(key, None)
        if uses is None:
            return
        # What was added is taken away again, whatever has become known meanwhile; nothing leaves nothing.
        self.used = self.used.minus(uses) if self.bindings else NOTHING
        pile = self.pile_of.pop(key)
        count, amount = self.piles.pop(pile)
        if count > 1:
            self.piles[pile] = count - 1, amount.minus(uses)

    @property
    def free(self) -> Resources:
        """What no binding uses."""
        return self.record.capacity.minus(self.used)

    @property
    def takes(self) -> bool:
        """Whether new executors may be placed there."""
        return self.state is NodeState.READY and not self.record.stopping
