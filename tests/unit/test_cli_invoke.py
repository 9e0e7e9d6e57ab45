"""`flmctl invoke`: what it tells whoever waits, and that its session ends however it goes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from flame import SchedulerUnavailable, SessionState, Task, TaskFailed, TaskFault, TaskState, TimedOut
from flame_cli import invoke
from flame_cli.errors import CommandFailed
from flame_cli.invoke import Invocation

DONE = Task("t1", "agent-1", "agent", TaskState.SUCCEED, b"42")
FAILED = Task("t1", "agent-1", "agent", TaskState.FAILED, error=TaskFault("task_failed", "no luck", traceback="Trace"))


class Cluster:
    """A connection and its one session, whose only task ends as it was told."""

    id = "agent-1"
    application = "agent"
    state = SessionState.OPEN

    def __init__(self, outcome: Task | Exception, *, nodes: int = 1) -> None:
        self.outcome = outcome
        self.nodes = nodes
        self.asked = asyncio.Event()
        self.closed: list[str] = []
        self.close_fails = False

    async def create_session(self, application: str, common_data: bytes) -> Any:
        return self

    async def open_session(self, session_id: str) -> Any:
        return self

    async def close_session(self, session_id: str) -> None:
        self.closed.append(session_id)
        if self.close_fails:
            raise SchedulerUnavailable("nobody answers")

    async def info(self) -> Any:
        self.asked.set()
        return SimpleNamespace(nodes=self.nodes)

    async def invoke(self, data: bytes, informer: object, *, timeout_s: float | None) -> Task:
        if self.nodes == 0:
            await self.asked.wait()
            await asyncio.sleep(0)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


async def run(cluster: Any, **fields: Any) -> bytes:
    return await invoke._invoke(cluster, Invocation(application="agent", input=b"x", **fields))


async def test_a_session_of_its_own_ends_with_the_task() -> None:
    cluster = Cluster(DONE)
    assert await run(cluster) == b"42"
    assert cluster.closed == ["agent-1"]


async def test_an_open_session_stays_open() -> None:
    cluster = Cluster(DONE)
    assert await run(cluster, session="agent-1") == b"42"
    assert cluster.closed == []


@pytest.mark.parametrize(
    ("outcome", "text"),
    [(TaskFailed("task t1 failed: no luck", FAILED), "no luck"), (TimedOut("late"), "has not ended after 2 s")],
)
async def test_a_session_of_its_own_ends_with_a_failure_too(outcome: Exception, text: str) -> None:
    cluster = Cluster(outcome)
    with pytest.raises(CommandFailed, match=text):
        await run(cluster, limit_s=2.0)
    assert cluster.closed == ["agent-1"]


@pytest.mark.parametrize(("verbose", "detail"), [(False, ""), (True, "Trace")])
async def test_the_traceback_is_for_those_who_want_to_know(verbose: bool, detail: str) -> None:
    with pytest.raises(CommandFailed) as caught:
        await run(Cluster(TaskFailed("task t1 failed: no luck", FAILED)), verbose=verbose)
    assert caught.value.detail == detail


async def test_an_answer_counts_even_if_its_session_can_not_be_closed(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(DONE)
    cluster.close_fails = True
    assert await run(cluster) == b"42"
    assert capsys.readouterr().err == "(session agent-1 is not closed: nobody answers)\n"


async def test_who_waits_for_a_cluster_without_nodes_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invoke, "PATIENCE_S", 0)
    assert await run(Cluster(DONE, nodes=0)) == b"42"
    assert capsys.readouterr().err == "(the cluster has no node that is ready: the task waits for one)\n"
