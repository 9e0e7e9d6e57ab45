"""How much of everything a run does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The defaults are the run that counts."""

    rounds: int = 3
    """Of Flame and floor in turn, where they are compared; the median is reported."""
    limit_s: float = 1800.0
    """A benchmark that has not ended by then has hung."""

    tasks: int = 30_000
    executors: tuple[int, ...] = (1, 2, 8)
    in_turn: int = 2000
    """Tasks invoked one at a time."""
    warm_up: int = 500
    at_once: int = 20_000
    """Tasks of which `IN_FLIGHT` are under way."""
    payload_tasks: int = 2000

    creations: int = 200
    heavy_creations: int = 20
    """Of fresh processes that import much."""
    short_sessions: int = 1000
    idle_sessions: int = 10_000
    idle_watch_s: float = 10.0
    kills: int = 20
    blocking_tasks: int = 400
    replicated_tasks: int = 10_000
    synced_tasks: int = 5000
    memory_sessions: int = 50
    peer_tasks: int = 5000


FULL: Final = Scale()

QUICK: Final = Scale(
    rounds=1,
    limit_s=120.0,
    tasks=3000,
    executors=(2,),
    in_turn=300,
    warm_up=100,
    at_once=2000,
    payload_tasks=100,
    creations=10,
    heavy_creations=3,
    short_sessions=40,
    idle_sessions=200,
    idle_watch_s=2.0,
    kills=4,
    blocking_tasks=40,
    replicated_tasks=500,
    synced_tasks=300,
    memory_sessions=4,
    peer_tasks=500,
)

IN_FLIGHT: Final = 64
"""Tasks under way at once, where there are several."""
PAYLOAD: Final = bytes(64)
"""The input of a task, where its size is not what is measured."""
