"""Common data that changes, the state of a session, secrets and keys: in memory, and in virtual time."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from pydantic import SecretStr

import flame
from flame.broker.memory import MemoryServer
from flame.credentials import HIDDEN, check_secrets, hide, texts_to_hide
from flame.protocol import subjects
from flame.protocol.messages import TaskMessage, TaskOptions
from flame.service.handlers import fault_of
from tests.services.keeper import Keeper
from tests.support.memory_cluster import MemoryCluster
from tests.support.virtual_time import run_virtually

SECRETS = {"session": "s3cr3t-of-session", "task": "s3cr3t-of-task"}


def virtually(test: Callable[[MemoryCluster], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in virtual time with a cluster of its own."""

    def run() -> None:
        async def main() -> None:
            async with MemoryCluster(MemoryServer(), Keeper) as cluster:
                await test(cluster)

        run_virtually(main(), limit_s=3600)

    run.__name__ = run.__qualname__ = test.__name__
    return run


def ask(verb: str, *arguments: Any) -> bytes:
    return json.dumps([verb, *arguments]).encode()


async def answer(session: flame.Session, verb: str, *arguments: Any, options: TaskOptions | None = None) -> Any:
    return json.loads((await session.invoke(ask(verb, *arguments), options=options, timeout_s=120)).output)


# ---- common data


@virtually
async def test_a_task_runs_with_the_common_data_that_was_there_when_it_was_created(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application(), b"zero", max_instances=3)
    assert await answer(session, "common") == [0, "zero", [], pytest.approx(0, abs=10**9)]
    for version in range(1, 6):
        assert await session.update_common_data(str(version).encode()) == version
        seen = await asyncio.gather(*(answer(session, "common") for _ in range(6)))
        assert {tuple(each[:2]) for each in seen} == {(version, str(version))}
    assert session.common_data_version == 5


@virtually
async def test_an_idle_executor_hears_of_it_at_once(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application(), b"old")
    await answer(session, "common")
    await session.update_common_data(b"new")
    [service] = cluster.services("app")
    await asyncio.sleep(0.5)
    assert service.heard == ["new"]


@virtually
async def test_who_is_busy_hears_of_it_after_the_task(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application(), b"old", max_instances=1)
    running = await session.create_task(ask("sleep", 5))
    waiting = await session.create_task(ask("common"))
    await asyncio.sleep(1)
    await session.update_common_data(b"new")
    assert json.loads((await running).output)[:3] == [0, "old", []]
    assert json.loads((await waiting).output)[:3] == [1, "new", ["new"]]


@virtually
async def test_tasks_side_by_side_see_it_too(cluster: MemoryCluster) -> None:
    application = await cluster.application(concurrency=4)
    session = await cluster.client().create_session(application, b"old", max_instances=1)
    running = await session.create_task(ask("sleep", 60))
    await asyncio.sleep(1)
    await session.update_common_data(b"new")
    assert (await answer(session, "common"))[:3] == [1, "new", ["new"]]
    assert not running.done()
    await running


@virtually
async def test_compare_and_set_of_common_data(cluster: MemoryCluster) -> None:
    one, two = cluster.client("one"), cluster.client("two")
    mine = await one.create_session(await cluster.application(), b"old")
    theirs = await two.open_session(mine.id)
    assert await mine.update_common_data(b"mine", expected_version=0) == 1
    with pytest.raises(flame.StaleVersion, match=r"has version 1, not 0"):
        await theirs.update_common_data(b"theirs", expected_version=0)
    await asyncio.sleep(0.5)
    assert theirs.common_data_version == 1  # it has heard of it
    wins = await asyncio.gather(
        *(who.update_common_data(b"x", expected_version=1) for who in (mine, theirs)), return_exceptions=True
    )
    assert {type(outcome) for outcome in wins} == {int, flame.StaleVersion}
    later = await two.open_session(mine.id)
    assert later.common_data_version == 2
    assert (await answer(later, "common"))[0] == 2


@virtually
async def test_a_new_executor_gets_the_newest(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application(), b"old", max_instances=1)
    await answer(session, "common")
    await session.update_common_data(b"new")
    [executor] = cluster.executors
    cluster.kill_executor(executor)
    version, data, heard, _ = await answer(session, "common")
    assert (version, data) == (1, "new")
    assert heard in ([], ["new"])


@virtually
async def test_an_executor_that_refuses_an_update_is_replaced(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application(), b"old", max_instances=1)
    await answer(session, "common")
    before = set(cluster.executors)
    await session.update_common_data(b"refuse")
    assert (await answer(session, "common"))[:3] == [1, "refuse", []]
    assert before.isdisjoint(cluster.executors)


@virtually
async def test_a_version_that_never_was_is_refused(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application(), b"old")
    with pytest.raises(flame.TaskFailed, match=r"wants version 7 of the common data; the session has 0"):
        await answer(session, "common", options=TaskOptions(common_data_version=7))
    await session.update_common_data(b"new")
    assert (await answer(session, "common"))[0] == 1


@virtually
async def test_common_data_of_a_closed_session_stays(cluster: MemoryCluster) -> None:
    client = cluster.client()
    session = await client.create_session(await cluster.application(), b"old")
    await session.close()
    with pytest.raises(flame.SessionNotOpen):
        await session.update_common_data(b"new")
    with pytest.raises(flame.SessionNotFound):
        await client.update_common_data("nobody", b"new")


# ---- state


@virtually
async def test_state_survives_an_executor_and_ends_with_its_session(cluster: MemoryCluster) -> None:
    client = cluster.client()
    application = await cluster.application()
    session, other = [await client.create_session(application) for _ in range(2)]
    keys = ["plain", "user:42", "a.b", ".", "ü", "=", "x" * 128, "a b/c*>"]
    values: list[Any] = [None, True, 7, 1.5, "text", [1, [2]], {"a": {"b": None}}, ""]
    for key, value in zip(keys, values, strict=True):
        assert await answer(session, "put", key, value) > 0
    [executor] = cluster.executors
    cluster.kill_executor(executor)
    for key, value in zip(keys, values, strict=True):
        assert await answer(session, "get", key) == value
    assert await answer(session, "keys") == sorted(keys)
    assert await answer(session, "keys", "a") == ["a b/c*>", "a.b"]
    assert await answer(other, "keys") == []
    assert await answer(other, "get", "plain") == "nothing"
    await answer(session, "delete", "plain")
    await answer(session, "delete", "plain")
    assert await answer(session, "get", "plain") == "nothing"
    await answer(other, "put", "mine", 1)
    await session.close()
    left = await client.broker.bucket(subjects.STATE).entries(">")
    assert [entry.key for entry in left] == [f"{other.id}.mine"]


@virtually
async def test_counting_in_the_state_by_compare_and_set(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application(concurrency=8), max_instances=4)
    counts = await asyncio.gather(*(answer(session, "add", "n") for _ in range(40)))
    assert sorted(counts) == list(range(1, 41))


@virtually
async def test_what_the_state_refuses(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application())
    revision = await answer(session, "put", "k", 1, 0)
    for arguments, kind, says in (
        (("put", "k", 2, 0), "flame.errors.StaleVersion", rf"has revision {revision}, not no value"),
        (("put", "none", 2, 5), "flame.errors.StaleVersion", r"has no value, not revision 5"),
        (("put", "k", 2, -1), "flame.errors.InvalidArgument", r"expected: a revision or None, got -1"),
        (("put", "", 2), "flame.errors.InvalidName", r"expected a text of 1 to 128 characters"),
        (("put", "x" * 129, 2), "flame.errors.InvalidName", r"expected a text of 1 to 128 characters"),
        (("put_bytes", "k", 300_000), "flame.errors.PayloadTooLarge", r"the limit is 262144"),
        (("put_strange",), "flame.errors.InvalidArgument", r"the value of 'strange', set, can't be kept"),
    ):
        with pytest.raises(flame.TaskFailed, match=says) as caught:
            await answer(session, *arguments)
        assert caught.value.task.error is not None
        assert caught.value.task.error.type == kind
    assert await answer(session, "put_bytes", "large", 250_000) > revision
    assert await answer(session, "get", "k") == 1


def test_a_context_made_by_hand_has_no_state() -> None:
    for context in (flame.SessionContext("s", "a"), flame.TaskContext("s", "t", b"")):
        with pytest.raises(flame.ConfigurationError, match="not made by an executor"):
            _ = context.state


# ---- secrets


@virtually
async def test_secrets_reach_the_executor_and_show_nowhere(cluster: MemoryCluster) -> None:
    client = cluster.client()
    credentials = {"api": SECRETS["session"]}
    delegations = {"user": flame.Secret(SECRETS["session"] + "-2")}
    session = await client.create_session(await cluster.application(), credentials=credentials, delegations=delegations)
    options = TaskOptions(credentials={"t": SecretStr(SECRETS["task"])}, delegations={"u": SECRETS["task"] + "-2"})  # type: ignore[dict-item]
    assert await answer(session, "secrets", options=options) == [{"api": 17}, {"user": 19}, {"t": 14}, {"u": 16}]
    assert await answer(session, "secrets") == [{"api": 17}, {"user": 19}, {}, {}]
    assert "s3cr3t" not in await answer(session, "show", options=options)
    assert "s3cr3t" not in repr(options)
    with pytest.raises(flame.TaskFailed) as caught:
        await answer(session, "leak", options=options)
    error = caught.value.task.error
    assert error is not None
    assert error.message == f"{HIDDEN} and {HIDDEN} and {HIDDEN} and {HIDDEN}"
    assert b"s3cr3t" not in error.details
    assert "s3cr3t" not in f"{error} {error.traceback} {caught.value}"
    assert f"first ['{HIDDEN}'" in error.traceback
    bucket = client.broker.bucket(subjects.CREDENTIALS)
    assert len(await bucket.entries(">")) == 1
    await session.close()
    assert await bucket.entries(">") == []


@virtually
async def test_a_session_is_opened_again_with_its_secrets_only(cluster: MemoryCluster) -> None:
    client, application = cluster.client(), await cluster.application()
    spec = flame.SessionSpec(application=application, credentials={"a": "first"})
    assert "first" not in repr(spec)
    session = await client.open_session("again", spec)
    assert (await client.open_session("again", spec)).id == session.id
    for other in ({}, {"a": "two"}):
        with pytest.raises(flame.SpecMismatch, match="credentials or delegations are others") as caught:
            await client.open_session("again", flame.SessionSpec(application=application, credentials=other))
        assert "two" not in str(caught.value)
    assert "first" not in str(await client.get_session("again"))


@virtually
async def test_what_a_failing_enter_says_shows_no_secret(cluster: MemoryCluster) -> None:
    client = cluster.client()
    application = await cluster.application(session_retry_limit=1)
    session = await client.create_session(application, credentials={"enter": SECRETS["session"]})
    with pytest.raises((flame.TaskFailed, flame.SessionFailed)) as caught:
        await answer(session, "common")
    assert f"refused with {HIDDEN}" in str(caught.value)
    assert "s3cr3t" not in str(await client.get_session(session.id))


def test_a_secret_shows_itself_only_where_it_is_asked_to() -> None:
    secret = flame.Secret("swordfish")
    assert secret.reveal() == "swordfish"
    for shown in (str(secret), repr(secret), f"{secret}", f"{secret:>30}", f"{secret!r}", str({"a": secret})):
        assert "swordfish" not in shown
    assert secret == flame.Secret("swordfish")
    assert secret != flame.Secret("swordfisher")
    assert secret != "swordfish"
    assert len({secret, flame.Secret("swordfish")}) == 1
    assert copy.deepcopy(secret) is copy.copy(secret) is secret
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        json.dumps(secret)
    with pytest.raises(flame.InvalidArgument, match="expected str, got int"):
        flame.Secret(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("text", "expected a mapping of names to secrets, got str"),
        ({"": "hush"}, "expected names of 1 to 128 printable characters, got ''"),
        ({5: "hush"}, "got int"),
        ({"a\n": "hush"}, "printable"),
        ({"a": 5}, "'a': expected str or a secret, got int"),
        ({"a": b"hush"}, "'a': expected str or a secret, got bytes"),
        ({"a": "hush\ud800"}, "'a': is no text that UTF-8 could hold"),
        ({"a": "hush" * 10_000}, "40001 bytes together, the limit is 32768"),
        ({str(number): "hush" for number in range(65)}, "expected at most 64, got 65"),
    ],
)
def test_what_can_be_no_secrets_is_refused_without_showing_any(given: Any, says: str) -> None:
    with pytest.raises(flame.InvalidArgument, match=says) as caught:
        check_secrets("credentials", given)
    assert "hush" not in str(caught.value)


def test_secrets_are_found_in_texts_as_they_are_and_as_repr_shows_them() -> None:
    secrets = check_secrets("x", {"a": "new\nline", "b": "longer-one", "c": "longer", "d": "abc"})
    texts = texts_to_hide(secrets)
    assert "abc" not in texts  # too short to be told from other text
    assert hide(f"{'new' + chr(10) + 'line'!r} new\nline longer-one abc", texts) == f"'{HIDDEN}' {HIDDEN} {HIDDEN} abc"


def test_a_secret_is_hidden_before_a_text_is_cut() -> None:
    long = "s" + "3cr3t" * 10
    fault = fault_of(ValueError("x" * (8 * 1024 - 20) + long + "y" * 16 * 1024), (long,))
    assert "3cr3t" not in fault.message


def test_a_wrong_digest_or_wrong_secrets_on_the_wire_are_malformed_and_not_shown() -> None:
    good = TaskMessage(b"x", options=TaskOptions(credentials={"a": "hush"}), digest=b"d")
    assert TaskMessage.decode(good.encode()) == good
    with pytest.raises(flame.FlameError) as caught:
        TaskOptions.from_fields({"credentials": {"a": ["hush"]}})
    assert "hush" not in str(caught.value)


# ---- keys


@virtually
async def test_a_key_names_one_task_for_everybody(cluster: MemoryCluster) -> None:
    one, two = cluster.client("one"), cluster.client("two")
    session = await one.create_session(await cluster.application())
    same = await two.open_session(session.id)
    handles = await asyncio.gather(
        *(who.create_task(ask("add", "runs"), key="order-17") for who in (session, same) for _ in range(5))
    )
    assert len({handle.id for handle in handles}) == 1
    assert {(await handle).output for handle in handles} == {b"1"}
    late = await two.open_session(session.id)
    begun = asyncio.get_running_loop().time()
    assert (await late.invoke(ask("add", "runs"), key="order-17")).output == b"1"
    assert asyncio.get_running_loop().time() - begun < 1
    assert (await session.invoke(ask("add", "runs"), key="order-18")).output == b"2"
    other = await one.create_session(session.application)
    assert (await other.invoke(ask("add", "runs"), key="order-17")).output == b"1"


@virtually
async def test_a_key_with_another_input_is_refused(cluster: MemoryCluster) -> None:
    one, two = cluster.client("one"), cluster.client("two")
    session = await one.create_session(await cluster.application())
    same = await two.open_session(session.id)
    waiting = await session.create_task(ask("sleep", 30), key="k")
    for who in (session, same):
        with pytest.raises(flame.KeyReused, match=r"key 'k' names a task .* another input"):
            await who.create_task(ask("sleep", 31), key="k")
    await waiting
    for who in (session, same):
        with pytest.raises(flame.KeyReused):
            await who.invoke(ask("sleep", 31), key="k")
        assert (await who.invoke(ask("sleep", 30), key="k")).id == waiting.id
    await asyncio.sleep(5)
    assert (await one.get_session(session.id)).succeeded == 1


@virtually
async def test_two_inputs_at_once_under_one_key(cluster: MemoryCluster) -> None:
    one, two = cluster.client("one"), cluster.client("two")
    session = await one.create_session(await cluster.application())
    same = await two.open_session(session.id)
    for number in range(20):
        outcomes = await asyncio.gather(
            session.invoke(ask("get", "a"), key=f"k{number}"),
            same.invoke(ask("get", "b"), key=f"k{number}"),
            return_exceptions=True,
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["KeyReused", "Task"]


@virtually
async def test_a_failed_or_cancelled_task_of_a_key_stays_what_it_is(cluster: MemoryCluster) -> None:
    session = await cluster.client().create_session(await cluster.application())
    for _ in range(2):
        with pytest.raises(flame.TaskFailed):
            await session.invoke(ask("put", "", 1), key="fails")
    await (await session.create_task(ask("sleep", 60), key="cancelled")).cancel()
    with pytest.raises(flame.TaskCancelled):
        await session.invoke(ask("sleep", 60), key="cancelled")


@pytest.mark.parametrize("key", ["", "x" * 513, 5, b"k", "\ud800"], ids=lambda key: type(key).__name__)
def test_what_can_be_no_key(key: Any) -> None:
    @virtually
    async def refused(cluster: MemoryCluster) -> None:
        session = await cluster.client().create_session(await cluster.application())
        with pytest.raises(flame.InvalidArgument, match="key"):
            await session.create_task(b"x", key=key)

    refused()
