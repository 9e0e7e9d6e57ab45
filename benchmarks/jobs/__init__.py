"""The benchmarks, in the order in which they run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from benchmarks.figures import Figure, Peer
from benchmarks.jobs import (
    blocking,
    creation,
    idle,
    kills,
    latency,
    memory,
    payloads,
    peers,
    replicas,
    short_sessions,
    synced,
    throughput,
)
from benchmarks.stage import Stage

Line = Figure | Peer


@dataclass(frozen=True, slots=True)
class Job:
    """A benchmark: what it measures, and how."""

    summary: str
    run: Callable[[Stage], Awaitable[list[Figure]] | Awaitable[list[Peer]]]


JOBS: Final = {
    "throughput": Job("tasks that do nothing, one session, 1, 2 and 8 executors", throughput.run),
    "latency": Job("invoke, one at a time and 64 in flight", latency.run),
    "payloads": Job("inputs and outputs of 64 B to 1 MB", payloads.run),
    "creation": Job("from the order of a session to its first result, forked and fresh", creation.run),
    "short-sessions": Job("sessions that are created, used once and closed", short_sessions.run),
    "kills": Job("from an executor's death to its task on another", kills.run),
    "blocking": Job("50 ms blocking tasks over 4 executors against the ideal", blocking.run),
    "replicas": Job("three servers, everything stored three times", replicas.run),
    "synced": Job("sync_interval: always", synced.run),
    "memory": Job("private memory of sessions whose service imports much", memory.run),
    "idle": Job("open sessions with nothing to do", idle.run),
    "peers": Job("other systems, where they are installed", peers.run),
}
