"""What the in-memory broker does beyond the seam's suite: its clock, its faults, its seed, and its order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flame.broker.errors import (
    BrokerError,
    ConsumerMissing,
    Duplicate,
    NoResponders,
    NotAcknowledged,
    StreamFull,
    StreamMissing,
    TooLarge,
)
from flame.broker.memory import Faults, ManualClock, MemoryBroker, MemoryServer
from flame.broker.memory.patterns import PatternTree, collide, matches, rewrite
from flame.broker.seam import Broker, Entry, LiveMessage
from flame.errors import BrokerUnavailable, ConfigurationError
from flame.protocol import topology
from flame.protocol.topology import BucketSpec, ConsumerSpec, Retention, StreamSpec
from tests.support.virtual_time import run_virtually

TASKS = StreamSpec(
    name="tasks", subjects=("task.*.*",), retention=Retention.WORK, one_per_subject=True, refuse_when_full=True
)
CONSUMER = ConsumerSpec(stream="tasks", name="s-1", filter_subject="task.s.*", ack_wait_s=15)
BUCKET = BucketSpec(name="things")


async def turns(count: int = 10) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def tasks(server: MemoryServer, *names: str) -> MemoryBroker:
    """A connection to a server that holds some tasks of session ``s`` and its consumer."""
    broker = server.connect()
    await broker.ensure_stream(TASKS)
    await broker.create_consumer(CONSUMER)
    for name in names:
        await broker.store(f"task.s.{name}", name.encode(), 1)
    return broker


async def test_it_is_a_broker() -> None:
    broker: Broker = MemoryServer().connect("mine")
    assert broker.endpoint == "memory://mine"
    assert broker.connected


# ---- order


async def test_a_message_never_arrives_while_it_is_being_published() -> None:
    broker = MemoryServer().connect()
    heard: list[bytes] = []
    await broker.subscribe("a.*", lambda message: heard.append(message.data))
    await broker.publish("a.1", b"one")
    assert heard == []
    await turns()
    assert heard == [b"one"]


async def test_a_listener_that_publishes_is_not_entered_again() -> None:
    broker = MemoryServer().connect()
    again: list[asyncio.Future[None]] = []
    depth = 0
    deepest = 0

    def on_message(message: LiveMessage) -> None:
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        if message.data != b"0":
            again.append(asyncio.ensure_future(broker.publish("a", b"%d" % (int(message.data) - 1))))
        depth -= 1

    await broker.subscribe("a", on_message)
    await broker.publish("a", b"5")
    await turns(50)
    assert (deepest, len(again)) == (1, 5)


async def test_what_one_connection_sends_arrives_in_order_whatever_it_is() -> None:
    server = MemoryServer()
    broker = await tasks(server, "one")
    heard: list[str] = []
    await broker.subscribe("x", lambda message: heard.append(message.data.decode()))
    puller = await broker.pull("tasks", "s-1")
    [delivery] = await puller.burst(1, 1)
    await broker.publish("x", b"first")
    await broker.acknowledge(delivery.handle)
    await broker.publish("x", b"second")
    await broker.acknowledge_surely(delivery.handle, 1)
    assert heard == ["first", "second"]
    assert (await broker.stream_state("tasks")).messages == 0


async def test_a_failing_listener_harms_no_other() -> None:
    broker = MemoryServer().connect()
    heard: list[bytes] = []

    def fail(_: LiveMessage) -> None:
        raise RuntimeError("mine")

    await broker.subscribe("a", fail)
    await broker.subscribe("a", lambda message: heard.append(message.data))
    await broker.publish("a", b"1")
    await turns()
    assert heard == [b"1"]


# ---- the clock


async def test_a_lease_that_nobody_extends_runs_out_by_the_servers_clock() -> None:
    clock = ManualClock()
    broker = await tasks(MemoryServer(clock=clock), "one")
    puller = await broker.pull("tasks", "s-1")
    [first] = await puller.burst(1, 1)
    waiting = asyncio.ensure_future((await broker.pull("tasks", "s-1")).burst(1, 60))
    await clock.advance(14.9)
    assert not waiting.done()
    await clock.advance(0.2)
    [second] = await waiting
    assert (first.delivered, second.delivered) == (1, 2)
    assert first.sequence == second.sequence


async def test_an_extended_lease_lasts_from_its_extension() -> None:
    clock = ManualClock()
    broker = await tasks(MemoryServer(clock=clock), "one")
    [held] = await (await broker.pull("tasks", "s-1")).burst(1, 1)
    waiting = asyncio.ensure_future((await broker.pull("tasks", "s-1")).burst(1, 60))
    await clock.advance(10)
    await broker.extend(held.handle)
    await clock.advance(14)
    assert not waiting.done()
    await clock.advance(2)
    assert [delivery.delivered for delivery in await waiting] == [2]


async def test_leases_that_run_out_come_back_in_their_order_and_before_new_tasks() -> None:
    clock = ManualClock()
    broker = await tasks(MemoryServer(clock=clock), "1", "2", "3", "4")
    puller = await broker.pull("tasks", "s-1")
    await puller.burst(2, 1)
    await clock.advance(16)
    again = await puller.burst(4, 1)
    assert [(d.data, d.delivered) for d in again] == [(b"1", 2), (b"2", 2), (b"3", 1)]
    assert [(d.data, d.delivered) for d in await puller.burst(4, 1)] == [(b"4", 1)]


async def test_a_wait_for_tasks_ends_by_the_servers_clock() -> None:
    clock = ManualClock()
    broker = await tasks(MemoryServer(clock=clock))
    burst = asyncio.ensure_future((await broker.pull("tasks", "s-1")).burst(8, 30))
    await clock.advance(29)
    assert not burst.done()
    await clock.advance(1)
    assert await burst == []


async def test_old_messages_go_at_their_age() -> None:
    clock = ManualClock()
    broker = MemoryServer(clock=clock).connect()
    await broker.ensure_stream(
        StreamSpec(name="kept", subjects=("kept.*",), max_age_s=60, one_per_subject=True, refuse_when_full=True)
    )
    await broker.store("kept.1", b"a", 1)
    await clock.advance(30)
    await broker.store("kept.2", b"b", 1)
    with pytest.raises(Duplicate):
        await broker.store("kept.1", b"c", 1)
    await clock.advance(30)
    assert await broker.subjects("kept", ">") == {"kept.2": 1}
    assert await broker.store("kept.1", b"c", 1) == 3


async def test_values_with_a_time_limit_go_unannounced_until_the_next_repair() -> None:
    clock = ManualClock()
    broker = MemoryServer(clock=clock).connect()
    await broker.ensure_bucket(BucketSpec(name="leases", ttl_s=3))
    bucket = broker.bucket("leases")
    heard: list[Entry] = []
    repairs: list[float] = []
    await bucket.put("leader", b"me")
    watch = await bucket.watch(">", heard.append, lambda: repairs.append(clock.time()))
    await clock.advance(4)
    assert await bucket.get("leader") is None
    assert [entry.value for entry in heard] == [b"me"]
    assert await bucket.create("leader", b"you") == 2
    await clock.advance(70)
    assert [entry.value for entry in heard] == [b"me", b"you", None]
    assert repairs == [60.0]
    await watch.stop()


async def test_a_request_that_nobody_answers_in_time_is_not_acknowledged() -> None:
    clock = ManualClock()
    broker = MemoryServer(clock=clock).connect()

    async def never(_subject: str, _data: bytes) -> bytes:
        await asyncio.Event().wait()
        return b""

    await broker.answer("ask", never)
    asked = asyncio.ensure_future(broker.request("ask", b"", 2))
    await clock.advance(1.9)
    assert not asked.done()
    await clock.advance(0.2)
    with pytest.raises(NotAcknowledged):
        await asked
    await broker.close()


async def test_time_that_is_not_moved_stands() -> None:
    clock = ManualClock(start=5)
    called: list[float] = []
    clock.call_later(1, lambda: called.append(clock.time())).cancel()
    clock.call_later(2, lambda: clock.call_later(0, lambda: called.append(clock.time())))
    await turns()
    assert (clock.time(), called) == (5, [])
    await clock.advance(3)
    assert (clock.time(), called) == (8, [7])


# ---- connections that break


async def test_what_is_under_way_when_a_connection_breaks_is_lost_and_what_is_sent_later_waits() -> None:
    clock = ManualClock()
    server = MemoryServer(clock=clock)
    broker = await tasks(server)
    lost = await broker.begin_store("task.s.lost", b"", 5)
    server.interrupt(broker)
    kept = await broker.begin_store("task.s.kept", b"", 5)
    seen = [broker.connected]
    server.restore()
    assert [*seen, broker.connected] == [False, True]
    assert await kept == 1
    await clock.advance(6)
    with pytest.raises(NotAcknowledged):
        await lost
    assert await broker.subjects("tasks", ">") == {"task.s.kept": 1}


async def test_a_buffer_for_a_broken_connection_is_limited() -> None:
    server = MemoryServer()
    broker = server.connect()
    server.interrupt()
    await broker.publish("a", bytes(1024**2))
    await broker.publish("a", bytes(1024**2))
    with pytest.raises(BrokerUnavailable):
        await broker.publish("a", b"1")
    server.restore()
    await broker.publish("a", bytes(1024**2))


async def test_subscriptions_survive_an_interruption_and_hear_nothing_of_it() -> None:
    server = MemoryServer()
    listener, sender = server.connect("listener"), server.connect("sender")
    heard: list[bytes] = []
    reconnects: list[int] = []
    await listener.subscribe("a", lambda message: heard.append(message.data))
    forget = listener.on_reconnect(lambda: reconnects.append(len(heard)))
    await sender.publish("a", b"1")
    await turns()
    server.interrupt(listener)
    await sender.publish("a", b"2")
    with pytest.raises(NoResponders):
        await sender.request("a", b"", 1)
    server.restore(listener)
    await turns()
    await sender.publish("a", b"3")
    await turns()
    assert (heard, reconnects) == ([b"1", b"3"], [1])
    forget()
    server.interrupt()
    server.restore()
    await turns()
    assert reconnects == [1]


async def test_a_subscription_made_while_disconnected_hears_after_the_reconnect() -> None:
    server = MemoryServer()
    broker = server.connect()
    server.interrupt()
    heard, _ = await broker.first("a")
    server.restore()
    await broker.publish("a", b"")
    await asyncio.wait_for(heard, 1)


async def test_tasks_handed_to_a_broken_connection_come_back_after_their_lease() -> None:
    clock = ManualClock()
    server = MemoryServer(clock=clock)
    one = await tasks(server)
    two = server.connect()
    burst = asyncio.ensure_future((await one.pull("tasks", "s-1")).burst(1, 30))
    await turns()
    await two.begin_store("task.s.1", b"", 1)
    await turns(1)  # it is handed out, and on its way
    server.interrupt(one)
    other = asyncio.ensure_future((await two.pull("tasks", "s-1")).burst(1, 30))
    await turns()
    server.restore()
    await turns()
    assert await burst == []
    await clock.advance(16)
    assert [delivery.delivered for delivery in await other] == [2]


async def test_a_pull_that_stood_on_a_broken_connection_takes_nothing() -> None:
    server = MemoryServer()
    one = await tasks(server)
    two = server.connect()
    burst = asyncio.ensure_future((await one.pull("tasks", "s-1")).burst(1, 30))
    await turns()
    server.interrupt(one)
    await two.store("task.s.1", b"", 1)
    [delivery] = await (await two.pull("tasks", "s-1")).burst(1, 1)
    assert delivery.delivered == 1
    server.restore()
    assert await burst == []


async def test_a_watch_reads_again_after_an_interruption_and_tells_what_is_gone() -> None:
    server = MemoryServer()
    watcher, writer = server.connect(), server.connect()
    await writer.ensure_bucket(BUCKET)
    bucket = writer.bucket("things")
    await bucket.put("kept", b"1")
    await bucket.put("gone", b"1")
    heard: list[tuple[str, bytes | None]] = []
    repaired = asyncio.Event()
    watch = await watcher.bucket("things").watch(
        ">", lambda entry: heard.append((entry.key, entry.value)), repaired.set
    )
    assert heard == [("kept", b"1"), ("gone", b"1")]
    heard.clear()
    server.interrupt(watcher)
    await bucket.delete("gone")
    await bucket.put("new", b"2")
    await bucket.put("kept", b"2")
    server.restore(watcher)
    await asyncio.wait_for(repaired.wait(), 1)
    assert heard == [("new", b"2"), ("kept", b"2"), ("gone", None)]
    await watch.stop()
    await bucket.put("kept", b"3")
    await turns()
    assert len(heard) == 3


async def test_a_restarted_server_keeps_what_is_stored_and_forgets_its_consumers() -> None:
    server = MemoryServer()
    broker = await tasks(server, "1")
    await broker.ensure_bucket(BUCKET)
    await broker.bucket("things").put("a", b"1")
    puller = await broker.pull("tasks", "s-1")
    [held] = await puller.burst(1, 1)
    reconnected = asyncio.Event()
    broker.on_reconnect(reconnected.set)
    standing = asyncio.ensure_future(puller.burst(1, 30))
    await turns()
    server.restart()
    await reconnected.wait()
    assert await standing == []
    with pytest.raises(ConsumerMissing):
        await puller.burst(1, 30)
    with pytest.raises(NoResponders):
        await broker.acknowledge_surely(held.handle, 1)
    await broker.create_consumer(CONSUMER)
    await broker.acknowledge(held.handle)  # before it was handed out again: ignored
    [again] = await puller.burst(1, 1)
    assert (again.data, again.delivered) == (b"1", 1)
    await broker.acknowledge_surely(held.handle, 1)  # somebody holds it now: it is finished
    assert (await broker.stream_state("tasks")).messages == 0
    assert await broker.bucket("things").get("a") == Entry("a", b"1", 1)


async def test_a_restart_may_keep_consumers() -> None:
    server = MemoryServer()
    broker = await tasks(server, "1")
    server.restart(lose_consumers=False)
    await turns()
    assert [delivery.data for delivery in await (await broker.pull("tasks", "s-1")).burst(1, 1)] == [b"1"]


async def test_closing_sends_what_is_buffered_and_answers_whoever_waits() -> None:
    server = MemoryServer()
    broker, other = await tasks(server), server.connect()
    await broker.publish("task.s.1", b"")
    asked = asyncio.ensure_future(other.request("nobody", b"", 5))
    stored = await other.begin_store("task.s.2", b"", 5)
    await broker.close()
    await other.close()
    await broker.close()
    with pytest.raises(NotAcknowledged):
        await stored
    with pytest.raises(BrokerUnavailable):
        await asked
    for action in (broker.publish("a", b""), broker.store("task.s.3", b"", 1), broker.stream_state("tasks")):
        with pytest.raises(BrokerUnavailable):
            await action
    assert not broker.connected
    assert set(await server.connect().subjects("tasks", ">")) == {"task.s.1", "task.s.2"}


# ---- faults


async def test_a_lost_store_is_not_acknowledged_and_not_stored() -> None:
    clock = ManualClock()
    server = MemoryServer(clock=clock)
    broker = await tasks(server)
    server.faults = Faults(lose_stores=1)
    stored = await broker.begin_store("task.s.1", b"", 5)
    await clock.advance(6)
    with pytest.raises(NotAcknowledged):
        await stored
    server.faults = Faults()
    assert await broker.subjects("tasks", ">") == {}


async def test_a_lost_answer_to_a_store_leaves_it_stored() -> None:
    clock = ManualClock()
    server = MemoryServer(clock=clock)
    broker = await tasks(server)
    await broker.ensure_bucket(BUCKET)
    server.faults = Faults(lose_store_answers=1)
    stored = await broker.begin_store("task.s.1", b"", 5)
    written = asyncio.ensure_future(broker.bucket("things").create("a", b"1"))
    await clock.advance(6)
    for lost in (stored, written):
        with pytest.raises(NotAcknowledged):
            await lost
    server.faults = Faults()
    assert await broker.subjects("tasks", ">") == {"task.s.1": 1}
    assert await broker.bucket("things").get("a") == Entry("a", b"1", 1)


async def test_a_lost_acknowledgement_brings_the_task_again_and_its_record_stays_the_first() -> None:
    clock = ManualClock()
    server = MemoryServer(clock=clock)
    broker = await tasks(server, "1")
    await broker.ensure_stream(
        StreamSpec(name="results", subjects=("result.*.*",), one_per_subject=True, refuse_when_full=True)
    )
    puller = await broker.pull("tasks", "s-1")
    [first] = await puller.burst(1, 1)
    server.faults = Faults(lose_acknowledgements=1)
    assert await (await broker.begin_store("result.s.1", b"first", 1, first.handle)) == 1
    await clock.advance(16)
    server.faults = Faults()
    [second] = await puller.burst(1, 1)
    with pytest.raises(Duplicate):
        await (await broker.begin_store("result.s.1", b"second", 1, second.handle))
    await turns()
    assert (await broker.stream_state("tasks")).messages == 0
    found = await broker.last("results", "result.s.1")
    assert found is not None
    assert found.data == b"first"


async def test_a_lost_delivery_comes_again_after_its_lease() -> None:
    clock = ManualClock()
    server = MemoryServer(clock=clock, faults=Faults(lose_deliveries=1))
    broker = await tasks(server, "1")
    puller = await broker.pull("tasks", "s-1")
    burst = asyncio.ensure_future(puller.burst(1, 2))
    await clock.advance(4)
    assert await burst == []
    server.faults = Faults()
    burst = asyncio.ensure_future(puller.burst(1, 30))
    await clock.advance(14)
    assert [delivery.delivered for delivery in await burst] == [2]


async def test_live_messages_may_be_lost_doubled_and_late() -> None:
    clock = ManualClock()
    server = MemoryServer(seed=1, clock=clock)
    broker = server.connect()
    heard: list[bytes] = []
    await broker.subscribe("a", lambda message: heard.append(message.data))
    await turns()
    server.faults = Faults(lose_live=1)
    await broker.publish("a", b"lost")
    await turns()
    server.faults = Faults(duplicate_live=1)
    await broker.publish("a", b"twice")
    await turns()
    server.faults = Faults(delay_live=1, longest_delay_s=10)
    await broker.publish("a", b"late")
    await turns()
    server.faults = Faults()
    await broker.publish("a", b"after")
    await turns()
    assert heard == [b"twice", b"twice", b"after"]
    await clock.advance(10)
    assert heard == [b"twice", b"twice", b"after", b"late"]


async def test_a_watch_notices_a_change_that_was_lost() -> None:
    clock = ManualClock()
    server = MemoryServer(clock=clock)
    broker = server.connect()
    await broker.ensure_bucket(BUCKET)
    bucket = broker.bucket("things")
    heard: list[tuple[str, bytes | None]] = []
    watch = await bucket.watch(">", lambda entry: heard.append((entry.key, entry.value)))
    server.faults = Faults(lose_live=1)
    await bucket.put("a", b"1")
    server.faults = Faults()
    await bucket.put("b", b"1")  # shows that something is missing
    await turns()
    assert heard == [("a", b"1"), ("b", b"1")]
    server.faults = Faults(lose_live=1)
    await bucket.delete("a")
    await turns()
    assert len(heard) == 2
    await clock.advance(2)
    assert heard[2:] == [("a", None)]
    await watch.stop()


async def test_lost_requests_and_answers_are_not_acknowledged() -> None:
    clock = ManualClock()
    server = MemoryServer(clock=clock)
    broker = await tasks(server)
    served: list[bytes] = []

    async def serve(data: bytes) -> bytes:
        served.append(data)
        return data

    await broker.serve("s", "1", "api", {"echo": serve})
    assert await broker.request("api.echo", b"fine", 1) == b"fine"
    for faults, expected in ((Faults(lose_requests=1), 0), (Faults(lose_answers=1), 1)):
        served.clear()
        server.faults = faults
        asked = asyncio.ensure_future(broker.request("api.echo", b"lost", 1))
        created = asyncio.ensure_future(broker.ensure_bucket(BUCKET))
        await clock.advance(6)
        for lost in (asked, created):
            with pytest.raises(NotAcknowledged):
                await lost
        assert len(served) == expected
        assert ("things" in server.tables) is bool(expected)


async def test_a_connection_that_breaks_by_itself_comes_back() -> None:
    clock = ManualClock()
    server = MemoryServer(clock=clock, faults=Faults(interrupt=1, longest_interruption_s=2))
    broker = server.connect()
    back = asyncio.Event()
    broker.on_reconnect(back.set)
    await broker.publish("a", b"")
    assert not broker.connected
    await clock.advance(2)
    assert back.is_set()
    assert broker.connected


@pytest.mark.parametrize("name", ["lose_live", "longest_delay_s"])
def test_faults_are_checked(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Faults(**{name: -0.1})
    with pytest.raises(ConfigurationError):
        Faults(interrupt=1.5)


EVERYTHING = Faults(
    delay_live=0.2,
    duplicate_live=0.2,
    lose_live=0.2,
    lose_requests=0.05,
    lose_answers=0.05,
    lose_stores=0.1,
    lose_store_answers=0.1,
    lose_deliveries=0.1,
    lose_acknowledgements=0.2,
    interrupt=0.02,
)


def _course(seed: int) -> list[Any]:
    """Everything that two connections see while a hundred tasks go through the server."""

    async def insist(operation: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await operation()
            except NotAcknowledged:
                seen.append("not acknowledged")
            except Duplicate:
                return "duplicate"

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = MemoryServer(seed=seed, faults=EVERYTHING)
        client, worker = server.connect("client"), server.connect("worker")
        for spec in topology.application_streams("app"):
            await insist(lambda spec=spec: client.ensure_stream(spec))  # type: ignore[misc]
        consumer = topology.session_consumer("app", "s", 1, 1)
        await insist(lambda: client.create_consumer(consumer))
        await client.subscribe("flame.event.>", lambda m: seen.append((loop.time(), m.subject, m.data)))
        worker.on_reconnect(lambda: seen.append("reconnected"))
        for number in range(100):
            subject = f"flame.task.app.s.{number}"
            await insist(lambda subject=subject: client.store(subject, b"", 5))  # type: ignore[misc]
        puller = await worker.pull(consumer.stream, consumer.name)
        done: set[str] = set()
        while len(done) < 100 or (await insist(lambda: client.stream_state(consumer.stream))).messages:
            for delivery in await puller.burst(10, 20):
                seen.append(delivery)
                task = delivery.subject.rsplit(".", 1)[1]
                record = f"flame.result.app.s.{task}"
                stored = await insist(
                    lambda record=record, d=delivery: worker.store(record, d.handle.encode(), 5)  # type: ignore[misc]
                )
                assert (stored == "duplicate") or task not in done or stored
                done.add(task)
                await worker.acknowledge(delivery.handle)
        state = await insist(lambda: client.stream_state("flame-result-app"))
        assert state.messages == 100
        seen.append((loop.time(), state))

    seen: list[Any] = []
    run_virtually(main())
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_and_the_same_calls_have_the_same_consequences(seed: int) -> None:
    course = _course(seed)
    assert course == _course(seed)
    assert course != _course(seed + 1)


# ---- the rest of its rules


async def test_a_missing_stream_is_not_noticed_while_somebody_listens() -> None:
    """As on NATS: only when nobody at all is there does the server say so at once."""
    clock = ManualClock()
    broker = MemoryServer(clock=clock).connect()
    with pytest.raises(StreamMissing):
        await broker.store("task.s.1", b"", 1)
    await broker.first("task.s.*")
    stored = await broker.begin_store("task.s.1", b"", 1)
    await clock.advance(2)
    with pytest.raises(NotAcknowledged):
        await stored


async def test_limits_refuse_or_make_room() -> None:
    broker = MemoryServer(max_payload_bytes=1000).connect()
    full = StreamSpec(name="full", subjects=("full.*",), max_messages=2, refuse_when_full=True)
    rolling = StreamSpec(name="rolling", subjects=("rolling.*",), max_bytes=300)
    await broker.ensure_stream(full)
    await broker.ensure_stream(rolling)
    for number in range(2):
        await broker.store(f"full.{number}", b"", 1)
    with pytest.raises(StreamFull):
        await broker.store("full.3", b"", 1)
    for number in range(10):
        await broker.store(f"rolling.{number}", bytes(100), 1)
    assert await broker.subjects("rolling", ">") == {"rolling.8": 1, "rolling.9": 1}
    with pytest.raises(TooLarge):
        await broker.store("rolling.1", bytes(1001), 1)


async def test_an_impossible_change_of_a_stream_is_refused() -> None:
    broker = MemoryServer().connect()
    await broker.ensure_stream(TASKS)
    await broker.ensure_stream(TASKS)
    with pytest.raises(BrokerError, match="retention"):
        await broker.ensure_stream(StreamSpec(name="tasks", subjects=("task.*.*",)))
    with pytest.raises(BrokerError, match="overlap"):
        await broker.ensure_stream(StreamSpec(name="more", subjects=("task.a.>",)))


async def test_more_pulls_than_a_consumer_takes_are_sent_away() -> None:
    broker = MemoryServer().connect()
    await broker.ensure_stream(TASKS)
    await broker.create_consumer(ConsumerSpec(stream="tasks", name="s-1", filter_subject="task.s.*", max_waiting=1))
    standing = asyncio.ensure_future((await broker.pull("tasks", "s-1")).burst(1, 30))
    await turns()
    assert await (await broker.pull("tasks", "s-1")).burst(1, 30) == []
    await broker.store("task.s.1", b"", 1)
    assert len(await standing) == 1


async def test_a_service_can_be_discovered() -> None:
    broker = MemoryServer().connect()

    async def echo(data: bytes) -> bytes:
        return data

    service = await broker.serve("flame", "1.2.3", "flame.api", {"echo": echo})
    assert b'"version": "1.2.3"' in await broker.request("$SRV.INFO.flame", b"", 1)
    await service.stop()
    with pytest.raises(NoResponders):
        await broker.request("$SRV.INFO.flame", b"", 1)


@pytest.mark.parametrize(
    ("pattern", "subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.*", "a.b", True),
        ("a.*", "a.b.c", False),
        ("a.*", "a", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a.b", True),
        ("*.b", "a.b", True),
        ("a.b", "axb", False),
    ],
)
def test_patterns_match_as_nats_has_it(pattern: str, subject: str, expected: bool) -> None:
    assert matches(pattern, subject) is expected
    tree: PatternTree[str] = PatternTree()
    tree.add(pattern, "it")
    tree.add(pattern, "it")
    tree.add("other.>", "other")
    assert tree.find(subject) == (["it"] if expected else [])
    tree.remove(pattern, "it")
    tree.remove(pattern, "it")
    assert tree.find(subject) == []
    if not {"*", ">"} & set(subject):
        assert collide(pattern, subject) is expected


def test_announcements_take_their_tokens_from_the_subject() -> None:
    target = "flame.event.app.{{wildcard(1)}}.{{wildcard(2)}}.done"
    assert rewrite("flame.result.app.*.*", target, "flame.result.app.s.t") == "flame.event.app.s.t.done"
    assert rewrite("flame.result.app.*.*", target, "flame.result.other.s.t") is None
