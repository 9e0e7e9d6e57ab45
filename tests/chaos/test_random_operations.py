"""Random operations, faults among them: at the end every task has one record and every count is right.

`make chaos` does ten thousand; a seed that is printed can be played again with ``FLAME_CHAOS_SEED``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.protocol import subjects
from flame.protocol.messages import ResultRecord
from flame.protocol.states import CloseMode, TaskState
from tests.support.cluster import PATIENCE_S, Cluster, eventually, kill, processes_of

OPERATIONS = int(os.environ.get("FLAME_CHAOS_OPERATIONS", "1000"))
AT_ONCE = 16
"""Operations under way at most."""
OPEN = 24
"""Sessions that are open at most."""
REST_S = 120.0
"""For everything to come to rest."""
WEIGHTS = {
    "submit": 820,
    "cancel": 110,
    "create": 35,
    "close": 30,
    "kill an executor": 20,
    "kill the scheduler": 1,
    "kill a manager": 1,
}
CALLS: list[list[Any]] = [["echo", 1], ["echo", 2], ["sleep", 0.005], ["sleep", 0.05], ["block", 0.01], ["fail", "so"]]


@dataclass(slots=True)
class Played:
    """A session and what was asked of it."""

    session: flame.Session
    handles: list[flame.TaskHandle] = field(default_factory=list)
    closing: bool = False


class Play:
    """Carries operations out on a cluster. What is chosen follows from the seed; what meets what does not."""

    def __init__(self, cluster: Cluster, connection: flame.Connection, seed: int) -> None:
        self.cluster = cluster
        self.connection = connection
        self.random = random.Random(seed)
        self.sessions: list[Played] = []
        self.done: Counter[str] = Counter()
        self._restarting = asyncio.Lock()

    async def run(self, operations: int) -> None:
        left = iter(self.random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=operations))

        async def worker() -> None:
            for what in left:
                with contextlib.suppress(flame.Unavailable):  # the scheduler was killed just now
                    await getattr(self, f"_{what.replace(' ', '_')}")()
                self.done[what] += 1

        async with asyncio.TaskGroup() as workers:
            for _ in range(AT_ONCE):
                workers.create_task(worker())

    def _open(self) -> list[Played]:
        return [played for played in self.sessions if not played.closing]

    async def _create(self) -> None:
        if len(self._open()) < OPEN:
            most = self.random.randint(1, 3)
            self.sessions.append(Played(await self.connection.create_session("lab", max_instances=most)))

    async def _submit(self) -> None:
        if not self._open():
            await self._create()
        played = self.random.choice(self._open())
        inputs = [json.dumps(call).encode() for call in self.random.choices(CALLS, k=self.random.randint(1, 4))]
        with contextlib.suppress(flame.SessionNotOpen):  # closed meanwhile
            played.handles += await played.session.create_tasks(inputs)

    async def _cancel(self) -> None:
        alive = [played for played in self._open() if played.handles]
        if alive:
            played = self.random.choice(alive)
            recent = played.handles[-20:]
            chosen = self.random.sample(recent, min(len(recent), self.random.randint(1, 5)))
            await played.session.cancel_tasks([handle.id for handle in chosen])

    async def _close(self) -> None:
        if len(self._open()) > 3:
            played = self.random.choice(self._open())
            played.closing = True
            await self.connection.close_session(played.session.id, mode=self.random.choice(list(CloseMode)))

    async def _kill_an_executor(self) -> None:
        pids = [executor.pid for executor in await self.connection.list_executors() if executor.pid]
        if pids:
            kill(self.random.choice(pids))

    async def _kill_the_scheduler(self) -> None:
        async with self._restarting:
            scheduler = self.cluster.scheduler
            assert scheduler is not None
            scheduler.kill()
            scheduler.wait()
            self.cluster.start_scheduler()

    async def _kill_a_manager(self) -> None:
        async with self._restarting:
            name = self.random.choice(self.cluster.node_names)
            self.cluster.managers[name].kill()
            self.cluster.managers[name].wait()
            self.cluster.start_manager(name)


@pytest.fixture
async def play(tmp_path: Path) -> AsyncIterator[Play]:
    seed = int(os.environ.get("FLAME_CHAOS_SEED", secrets.randbits(32)))
    print(f"FLAME_CHAOS_SEED={seed}")  # noqa: T201  # pytest shows it with a failure
    cluster = Cluster(tmp_path, nodes=2, manager_options=("--cpu", "8", "--memory", "64g"))
    try:
        await cluster.start()
        async with cluster.connect() as connection:
            await connection.register_application("lab", cluster.service("lab", delay_release_s=2))
            yield Play(cluster, connection, seed)
    finally:
        await cluster.stop()
    assert processes_of(cluster.broker.endpoint) == []


async def recorded(play: Play, played: Played) -> dict[str, flame.TaskState]:
    """Every record that is stored of a session's tasks, by task."""
    session = played.session
    found: dict[str, flame.TaskState] = {}
    stream, pattern = subjects.result_stream(session.application), subjects.session_results("lab", session.id)
    async for message in play.connection.broker.read(stream, pattern):
        task = subjects.parse_result(message.subject).task
        assert task not in found, f"two records of task {task}"
        found[task] = ResultRecord.decode(message.data).state
    return found


def show(play: Play, played: Played) -> None:
    """Print what the programs said of a session; pytest shows it with the failure."""
    for path in sorted(play.cluster.folder.glob("*.log")):
        lines = [line for line in path.read_text(errors="replace").splitlines() if played.session.id in line]
        print(f"--- {path.name}", *lines, sep="\n")  # noqa: T201


async def counts_are(play: Play, played: Played, expected: tuple[int, ...]) -> None:
    """Wait until a session has these counts, and has ended if it was closed."""
    seen = "nothing"

    async def counted() -> bool:
        nonlocal seen
        info = await play.connection.get_session(played.session.id)
        counts = (info.pending, info.running, info.succeeded, info.failed, info.cancelled)
        seen = f"{info.session.state.value}, {counts}"
        return counts == expected and (info.session.settled or not played.closing)

    try:
        await eventually(counted, "the counts are right", PATIENCE_S)
    except AssertionError:
        show(play, played)
        raise AssertionError(f"session {played.session.id} is {seen}, its records say {expected}") from None


async def test_every_task_has_one_record_and_every_count_is_right(play: Play) -> None:
    await play.run(OPERATIONS)
    assert sum(play.done.values()) == OPERATIONS

    # At rest, half of them still open.
    for played in play.sessions:
        async with asyncio.timeout(REST_S):
            for handle in played.handles:
                await handle.finished()
    for number, played in enumerate(play.sessions):
        if played.closing or number % 2:
            await play.connection.close_session(played.session.id)
            played.closing = True

    for played in play.sessions:
        records = await recorded(play, played)
        missing = [handle.task for handle in played.handles if handle.id not in records]
        if missing:
            show(play, played)
        assert missing == []
        assert len(records) == len(played.handles)
        assert {handle.id: handle.task.state for handle in played.handles} == records
        tally = Counter(records.values())
        await counts_are(
            play, played, (0, 0, tally[TaskState.SUCCEED], tally[TaskState.FAILED], tally[TaskState.CANCELLED])
        )
    stored = await play.connection.broker.stream_state(subjects.task_stream("lab"))
    assert stored.messages == 0
