"""Sessions whose service can't enter them at first, on a cluster of two nodes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import flame
from flame.protocol.codes import ReasonCode
from flame.protocol.states import SessionState
from tests.support.records import at_rest

NODES = 2


def refusing(counter: Path, times: int) -> bytes:
    """Common data with which the service raises so many times on entering."""
    return json.dumps({"enter_fails": str(counter), "times": times}).encode()


def call(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def test_each_attempt_is_on_another_node_and_later_than_the_one_before(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    async with connection.events(application=lab) as events:
        session = await connection.create_session(lab, refusing(tmp_path / "tried", 4), max_instances=1)
        handle = await session.create_task(call("echo", 1))
        retries = []
        async for event in events:
            if (event.id, event.event) == (session.id, "retrying"):
                retries.append(event)
            if (event.session, event.event) == (session.id, "bound"):
                break
    assert (await handle).state is flame.TaskState.SUCCEED
    nodes = [event.node for event in retries]
    assert nodes in (["node1", "node2"] * 2, ["node2", "node1"] * 2)
    begun = [event.at for event in retries]
    pauses = [later - earlier for earlier, later in pairwise(begun)]
    assert all(pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True))
    assert {event.code for event in retries} == {ReasonCode.ENTER_FAILED}

    assert (await connection.get_session(session.id)).session.bind_failures == 4
    await session.close()
    record = (await connection.get_session(session.id)).session
    assert (record.state, record.bind_failures, record.reason) == (SessionState.CLOSED, 0, "")
    await at_rest(connection, session, 1)


async def test_one_that_can_never_be_entered_fails_and_a_second_client_learns_why(
    connection: flame.Connection, lab: str, tmp_path: Path
) -> None:
    session = await connection.create_session(lab, refusing(tmp_path / "tried", 1000))
    handle = await session.create_task(call("echo", 1))
    second = await connection.open_session(session.id)
    other = await second.create_task(call("echo", 2))
    for task in (handle, other):
        with pytest.raises(flame.TaskFailed, match="not today"):
            await task
    await at_rest(connection, session, 2)
    info = await connection.get_session(session.id)
    assert info.failed == 2
    assert info.session.bind_failures == 5
