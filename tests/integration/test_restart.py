"""A cluster of the embedded broker that is ended and started again: all that it kept is there, and goes on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from pathlib import Path

import pytest

from flame.protocol.states import TaskState
from tests.support.cluster import Cluster, eventually, kill, processes_of, started_executors


def end(process: subprocess.Popen[bytes], how: str) -> None:
    process.send_signal(signal.SIGTERM if how == "stopped" else signal.SIGKILL)
    process.wait(30)


@pytest.mark.parametrize("how", ["stopped", "killed"])
async def test_a_cluster_that_is_started_again_goes_on_where_it_was(how: str, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        await cluster.start()
        async with cluster.connect() as connection:
            await connection.register_application("tally", cluster.service("tally", max_instances=1))
            session = await connection.create_session("tally", str(tmp_path / "runs").encode())
            finished = await session.invoke("7", timeout_s=20)
            (executor,) = await started_executors(connection, session.id)
            await asyncio.to_thread(end, cluster.managers["node1"], how)
            if how == "killed":
                kill(executor.pid)  # it would go on without its manager
            waiting = [await session.create_task(str(number)) for number in range(10, 15)]
        if how == "killed":
            assert cluster.scheduler is not None
            end(cluster.scheduler, how)
            cluster.broker.kill()
        await cluster.stop()

        await cluster.start()
        async with cluster.connect() as connection:
            assert (await connection.get_application("tally")).spec.max_instances == 1
            session = await connection.open_session(session.id)
            assert (await session.get_task(finished.id)).output == b"49"

            async def all_ran() -> bool:
                tasks = [await session.get_task(handle.id) for handle in waiting]
                return all(task.state is TaskState.SUCCEED for task in tasks)

            await eventually(all_ran, "the tasks that waited have run", 40)
            assert (await session.invoke("3", timeout_s=20)).output == b"9"
            await session.close(timeout_s=20)
    finally:
        await cluster.stop()
    assert sorted((tmp_path / "runs").read_text().split(), key=int) == ["3", "7", "10", "11", "12", "13", "14"]
    assert processes_of(cluster.broker.endpoint) == []
