"""What a plan consists of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flame_services.scheduler.standings import LaneKey, Standing


@dataclass(slots=True)
class Step:
    """What to do about one session."""

    session: str
    replace: bool = False
    """Its consumer's epoch is over: executors that may still live must not reach its tasks."""
    reap: list[str] = field(default_factory=list)
    """Bindings whose executors have ended."""
    leave: list[str] = field(default_factory=list)
    """Bindings whose executors are to leave."""
    force: bool = False
    """Those are to stop what they run."""
    bind: list[str] = field(default_factory=list)
    """Nodes on which to bind one more executor each."""
    settle: bool = False
    """It has ended and nobody serves it: give every task its record."""
    look: bool = False
    """It drains and nobody is busy for it: find out whether a task is still stored."""
    close_idle: bool = False
    """It had no task for longer than its idle limit: close it."""

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.replace or self.settle or self.look or self.close_idle or self.reap or self.leave or self.bind)


@dataclass(slots=True)
class Plan:
    """All that should be done now, and when to look again if nothing changes."""

    steps: list[Step]
    look_again_at: float = math.inf
    waits: dict[str, str] = field(default_factory=dict)
    """Why a session that was looked at, or that a place is found for, has fewer executors than it wants."""
    looked_at: list[str] = field(default_factory=list, compare=False)
    """The sessions that were looked at; of these `View.planned` takes over what follows."""
    standings: list[Standing] = field(default_factory=list, compare=False)
    timers: dict[str, float] = field(default_factory=dict, compare=False)
    """When to look at a session again though nothing changed."""
    lane_waits: dict[LaneKey, str] = field(default_factory=dict, compare=False)
    """The same as `waits`, of all sessions in a lane that have no reason of their own."""
    made_at: float = field(default=0.0, compare=False)
