"""What is read before an executor is started, and what need not be."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from flame.broker.seam import Broker, Entry
from flame.protocol import subjects
from flame.protocol.codec import pack
from flame.protocol.records import ApplicationRecord, ApplicationSpec, BindingRecord, SessionRecord
from flame.protocol.states import SessionState
from flame_services.executor_manager.assignment import Registered, Superseded, read_briefing
from flame_services.executor_manager.launch import LaunchRefused

APPLICATION = ApplicationRecord(name="app", spec=ApplicationSpec(command="x", concurrency=3), created=1.0)
SESSION = SessionRecord(id="s", application="app", created=1.0, epoch=2, common_data_key="s.1")


class Buckets:
    """A broker that answers from a table and notes what was read."""

    def __init__(self, **values: bytes) -> None:
        self.values = {
            (subjects.APPLICATIONS, "app"): APPLICATION.encode(),
            (subjects.SESSIONS, "s"): SESSION.encode(),
            (subjects.COMMON_DATA, "s.1"): b"common",
        }
        self.read: list[str] = []
        self._name = ""

    def bucket(self, name: str) -> Buckets:
        found = Buckets()
        found.values, found.read, found._name = self.values, self.read, name
        return found

    async def get(self, key: str) -> Entry | None:
        self.read.append(key)
        value = self.values.get((self._name, key))
        return None if value is None else Entry(key, value, 7)

    @property
    def as_broker(self) -> Broker:
        return cast(Broker, self)


def binding(**fields: Any) -> BindingRecord:
    usual = {
        "executor": "e",
        "node": "n",
        "application": "app",
        "session": "s",
        "epoch": 2,
        "consumer": "s-2",
        "fence": 5,
        "max_executors": 4,
        "application_revision": 7,
        "common_data_key": "s.1",
        "credentials_key": "",
        "created": time.time(),
    }
    return BindingRecord.model_validate(usual | fields)


async def test_of_what_is_known_only_common_data_is_read() -> None:
    buckets = Buckets()
    briefing = await read_briefing(buckets.as_broker, binding(), Registered(APPLICATION, 7))
    assert buckets.read == ["s.1"]
    assignment = briefing.assignment
    assert (assignment.common_data, assignment.concurrency, assignment.max_executors) == (b"common", 3, 4)
    assert (assignment.consumer, assignment.fence, assignment.epoch) == ("s-2", 5, 2)


async def test_nothing_is_read_for_a_session_without_any() -> None:
    buckets = Buckets()
    briefing = await read_briefing(buckets.as_broker, binding(common_data_key=""), Registered(APPLICATION, 9))
    assert buckets.read == []
    assert briefing.assignment.common_data == b""


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({}, None),
        ({}, Registered(APPLICATION, 6)),
        ({"application_revision": 0}, Registered(APPLICATION, 7)),
        ({"common_data_key": None}, Registered(APPLICATION, 7)),
        ({"credentials_key": None}, Registered(APPLICATION, 7)),
        ({"created": time.time() - 60}, Registered(APPLICATION, 7)),
        ({"created": time.time() + 60}, Registered(APPLICATION, 7)),
    ],
    ids=[
        "not heard of",
        "heard of earlier",
        "of unknown age",
        "an older scheduler",
        "one nearly as old",
        "an old binding",
        "a wrong clock",
    ],
)
async def test_whatever_is_in_doubt_is_read(fields: dict[str, Any], known: Registered | None) -> None:
    buckets = Buckets()
    briefing = await read_briefing(buckets.as_broker, binding(**fields), known)
    assert sorted(set(buckets.read)) == ["app", "s", "s.1"]
    assert briefing.application == Registered(APPLICATION, 7)
    assert briefing.assignment.common_data == b"common"


async def test_common_data_that_has_another_key_by_now_is_found() -> None:
    buckets = Buckets()
    briefing = await read_briefing(buckets.as_broker, binding(common_data_key="s.0"), Registered(APPLICATION, 7))
    assert briefing.assignment.common_data == b"common"


async def test_secrets_are_handed_out_and_not_shown() -> None:
    buckets = Buckets()
    buckets.values[subjects.CREDENTIALS, "app.9"] = pack({"v": 1, "credentials": {"a": "hush"}, "delegations": {}})
    known = Registered(APPLICATION, 7)
    briefing = await read_briefing(buckets.as_broker, binding(credentials_key="app.9"), known)
    assert briefing.assignment.credentials == {"a": "hush"}
    assert "hush" not in repr(briefing)
    assert buckets.read == ["s.1", "app.9"]


async def test_common_data_that_is_gone_is_refused() -> None:
    buckets = Buckets()
    del buckets.values[subjects.COMMON_DATA, "s.1"]
    with pytest.raises(LaunchRefused, match="the common data or the credentials of session 's' are gone"):
        await read_briefing(buckets.as_broker, binding(), Registered(APPLICATION, 7))


@pytest.mark.parametrize("fields", [{"epoch": 3}, {"state": SessionState.CLOSED}])
async def test_a_session_that_has_gone_on_counts_before_an_application_that_is_gone(fields: dict[str, Any]) -> None:
    buckets = Buckets()
    buckets.values[subjects.SESSIONS, "s"] = SESSION.changed(**fields).encode()
    del buckets.values[subjects.APPLICATIONS, "app"]
    with pytest.raises(Superseded):
        await read_briefing(buckets.as_broker, binding())


async def test_an_application_that_is_gone_is_refused() -> None:
    buckets = Buckets()
    del buckets.values[subjects.APPLICATIONS, "app"]
    with pytest.raises(LaunchRefused, match="application 'app' is not registered any more"):
        await read_briefing(buckets.as_broker, binding())
