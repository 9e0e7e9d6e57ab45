"""The seam to the broker: the connection, live messages, requests."""

from __future__ import annotations

import asyncio
import re

import pytest

from flame.broker.errors import NoResponders, NotAcknowledged
from flame.broker.seam import Broker, LiveMessage
from flame.errors import BrokerUnavailable
from tests.contract.conftest import LIMIT_S, CutOff, Heard, Side


async def settled(broker: Broker) -> None:
    """Return when the broker has done everything that this connection asked for before."""
    with pytest.raises(NoResponders):
        await broker.request("nobody.is.there", b"", LIMIT_S)


# ---- the connection


async def test_a_connection_says_where_it_is_connected_to(broker: Broker) -> None:
    assert broker.connected
    assert re.fullmatch(r"\w+://[\w.:]+", broker.endpoint)


async def test_a_closed_connection_is_closed_for_good_and_may_be_closed_again(broker: Broker) -> None:
    await broker.close()
    await broker.close()
    assert not broker.connected
    with pytest.raises(BrokerUnavailable):
        await broker.publish("a.b", b"")
    with pytest.raises(BrokerUnavailable):
        await broker.subscribe("a.b", lambda _: None)
    with pytest.raises(BrokerUnavailable):
        await broker.request("a.b", b"", LIMIT_S)
    with pytest.raises(BrokerUnavailable):
        await broker.store("a.b", b"", LIMIT_S)
    with pytest.raises(BrokerUnavailable):
        await broker.bucket("b").get("k")


async def test_what_was_published_before_a_connection_was_closed_arrives(
    broker: Broker, other: Broker, name: str
) -> None:
    heard: Heard[LiveMessage] = Heard()
    await other.subscribe(f"{name}.*", heard)
    await settled(other)
    for number in range(100):
        await broker.publish(f"{name}.{number}", b"")
    await broker.close()
    assert [m.subject for m in await heard.number(100)] == [f"{name}.{number}" for number in range(100)]


async def test_listeners_hear_of_every_reconnect_until_they_are_forgotten(broker: Broker, cut_off: CutOff) -> None:
    heard: Heard[str] = Heard()
    forget = broker.on_reconnect(lambda: heard("first"))
    broker.on_reconnect(lambda: heard("second"))
    async with cut_off():
        pass
    assert await heard.number(2) == ["first", "second"]
    forget()
    forget()
    async with cut_off():
        pass
    assert broker.connected
    assert await heard.number(3) == ["first", "second", "second"]


async def test_a_listener_that_raises_hinders_no_other(broker: Broker, cut_off: CutOff) -> None:
    heard: Heard[str] = Heard()

    def failing() -> None:
        heard("failing")
        raise RuntimeError("a fault of the listener")

    broker.on_reconnect(failing)
    broker.on_reconnect(lambda: heard("other"))
    for _ in range(2):
        async with cut_off():
            pass
    assert await heard.number(4) == ["failing", "other"] * 2


async def test_nothing_is_connected_while_the_broker_is_away(broker: Broker, cut_off: CutOff) -> None:
    async with cut_off(), asyncio.timeout(LIMIT_S):
        with pytest.raises(BrokerUnavailable):
            await broker.request("anybody", b"", 0.2)
        assert not broker.connected


async def test_a_subscription_outlasts_a_lost_connection(broker: Broker, cut_off: CutOff, name: str) -> None:
    heard: Heard[LiveMessage] = Heard()
    await broker.subscribe(name, heard)
    async with cut_off():
        pass
    await broker.publish(name, b"afterwards")
    assert (await heard.number(1))[0].data == b"afterwards"


async def test_everything_can_be_stopped_after_the_connection_was_closed(broker: Broker, name: str) -> None:
    async def echo(subject: str, data: bytes) -> bytes:
        return data

    live = await broker.subscribe(name, lambda _: None)
    _, first = await broker.first(name)
    answering = await broker.answer(name, echo)
    await broker.close()
    for subscription in (live, first, answering):
        await subscription.stop()
        await subscription.stop()


# ---- live messages


async def test_live_messages_are_heard_in_order(broker: Broker, name: str) -> None:
    heard: Heard[LiveMessage] = Heard()
    await broker.subscribe(name, heard)
    for number in range(1000):
        await broker.publish(name, str(number).encode())
    assert [int(m.data) for m in await heard.number(1000)] == list(range(1000))


@pytest.mark.parametrize("data", [b"", b"\0\xff", b"x" * 100_000], ids=["nothing", "bytes", "much"])
async def test_a_live_message_is_heard_as_it_was_sent(broker: Broker, name: str, data: bytes) -> None:
    heard: Heard[LiveMessage] = Heard()
    await broker.subscribe(name, heard)
    await broker.publish(name, data)
    assert await heard.number(1) == [LiveMessage(name, data, "")]


async def test_a_star_stands_for_one_part_of_a_subject(broker: Broker, name: str) -> None:
    heard: Heard[LiveMessage] = Heard()
    await broker.subscribe(f"{name}.*.c", heard)
    for subject in ("a.c", "a.b", "a.b.c", "c", "b.c"):
        await broker.publish(f"{name}.{subject}", b"")
    assert [m.subject for m in await heard.number(2)] == [f"{name}.a.c", f"{name}.b.c"]
    await settled(broker)
    assert len(heard.all) == 2


async def test_everybody_who_listens_hears_a_live_message(broker: Broker, other: Broker, name: str) -> None:
    heard: list[Heard[LiveMessage]] = [Heard(), Heard(), Heard()]
    for listener, kept in zip((broker, broker, other), heard, strict=True):
        await listener.subscribe(name, kept)
    await settled(other)
    await broker.publish(name, b"x")
    for kept in heard:
        assert len(await kept.number(1)) == 1


async def test_a_stopped_subscription_hears_nothing_more(broker: Broker, name: str) -> None:
    stopped: Heard[LiveMessage] = Heard()
    goes_on: Heard[LiveMessage] = Heard()
    subscription = await broker.subscribe(name, stopped)
    await broker.subscribe(name, goes_on)
    await broker.publish(name, b"1")
    await stopped.number(1)
    await subscription.stop()
    await subscription.stop()
    await broker.publish(name, b"2")
    await goes_on.number(2)
    await settled(broker)
    assert len(stopped.all) == 1


async def test_a_handler_that_raises_hears_the_next_message(broker: Broker, name: str) -> None:
    heard: Heard[LiveMessage] = Heard()

    def handler(message: LiveMessage) -> None:
        heard(message)
        raise RuntimeError("a fault of the handler")

    await broker.subscribe(name, handler)
    await broker.publish(name, b"1")
    await broker.publish(name, b"2")
    assert [m.data for m in await heard.number(2)] == [b"1", b"2"]


async def test_the_first_message_is_told_and_only_from_now_on(broker: Broker, name: str) -> None:
    await broker.publish(f"{name}.x", b"before")
    await settled(broker)
    heard, subscription = await broker.first(f"{name}.*")
    await settled(broker)
    assert not heard.done()
    for _ in range(3):
        await broker.publish(f"{name}.x", b"data")
    async with asyncio.timeout(LIMIT_S):
        assert await heard == b"data"
    await subscription.stop()
    await subscription.stop()


async def test_the_first_message_is_not_told_after_a_stop(broker: Broker, name: str) -> None:
    heard, subscription = await broker.first(name)
    await subscription.stop()
    await broker.publish(name, b"")
    await settled(broker)
    assert not heard.done()


async def test_the_first_message_is_told_after_a_lost_connection_too(
    broker: Broker, cut_off: CutOff, name: str
) -> None:
    heard, _ = await broker.first(name)
    async with cut_off():
        pass
    await broker.publish(name, b"")
    async with asyncio.timeout(LIMIT_S):
        await heard


# ---- requests


async def test_a_request_is_answered_by_who_serves_its_subject(broker: Broker, other: Broker, name: str) -> None:
    async def handler(subject: str, data: bytes) -> bytes:
        return f"{subject}: {data.decode()}".encode()

    await other.answer(f"{name}.*", handler)
    await settled(other)
    assert await broker.request(f"{name}.x", b"hello", LIMIT_S) == f"{name}.x: hello".encode()


async def test_requests_are_answered_several_at_once(broker: Broker, name: str) -> None:
    together = asyncio.Event()
    waiting: list[bytes] = []

    async def handler(subject: str, data: bytes) -> bytes:
        waiting.append(data)
        if len(waiting) == 3:
            together.set()
        await together.wait()
        return data

    await broker.answer(name, handler)
    async with asyncio.timeout(LIMIT_S):
        answers = await asyncio.gather(*(broker.request(name, str(n).encode(), LIMIT_S) for n in range(3)))
    assert answers == [b"0", b"1", b"2"]


async def test_a_request_that_nobody_serves_fails_at_once(broker: Broker, name: str) -> None:
    async with asyncio.timeout(LIMIT_S / 2):
        with pytest.raises(NoResponders):
            await broker.request(name, b"", 10 * LIMIT_S)


async def test_a_request_that_is_not_answered_in_time_may_have_been_carried_out(broker: Broker, name: str) -> None:
    heard: Heard[bytes] = Heard()

    async def never(subject: str, data: bytes) -> bytes:
        heard(data)
        await asyncio.Event().wait()
        raise AssertionError

    await broker.answer(name, never)
    with pytest.raises(NotAcknowledged):
        await broker.request(name, b"x", 0.1)
    assert await heard.number(1) == [b"x"]


async def test_a_handler_that_raises_answers_nothing_and_serves_the_next(broker: Broker, name: str) -> None:
    async def handler(subject: str, data: bytes) -> bytes:
        if data == b"bad":
            raise RuntimeError("a fault of the handler")
        return data

    await broker.answer(name, handler)
    with pytest.raises(NotAcknowledged):
        await broker.request(name, b"bad", 0.1)
    assert await broker.request(name, b"good", LIMIT_S) == b"good"


async def test_who_stopped_answering_is_not_there(broker: Broker, name: str) -> None:
    async def echo(subject: str, data: bytes) -> bytes:
        return data

    subscription = await broker.answer(name, echo)
    assert await broker.request(name, b"x", LIMIT_S) == b"x"
    await subscription.stop()
    with pytest.raises(NoResponders):
        await broker.request(name, b"x", LIMIT_S)


async def test_a_service_answers_its_verbs_and_no_others(broker: Broker, other: Broker, name: str) -> None:
    async def double(data: bytes) -> bytes:
        return data + data

    async def reverse(data: bytes) -> bytes:
        return data[::-1]

    service = await other.serve(name, "1.0.0", f"{name}.api", {"double": double, "reverse": reverse})
    await settled(other)
    assert await broker.request(f"{name}.api.double", b"ab", LIMIT_S) == b"abab"
    assert await broker.request(f"{name}.api.reverse", b"ab", LIMIT_S) == b"ba"
    with pytest.raises(NoResponders):
        await broker.request(f"{name}.api.triple", b"ab", LIMIT_S)
    await service.stop()
    with pytest.raises(NoResponders):
        await broker.request(f"{name}.api.double", b"ab", LIMIT_S)


async def test_each_request_is_answered_by_one_of_those_who_share_a_service(
    broker: Broker, side: Side, name: str
) -> None:
    asked: list[str] = []
    servers = [await side.connect() for _ in range(3)]
    for number, server in enumerate(servers):

        async def handler(data: bytes, number: int = number) -> bytes:
            asked.append(f"{number}")
            return data

        await server.serve(name, "1.0.0", name, {"verb": handler})
        await settled(server)
    for number in range(60):
        assert await broker.request(f"{name}.verb", str(number).encode(), LIMIT_S) == str(number).encode()
    assert len(asked) == 60
    assert len(set(asked)) > 1


async def test_a_service_answers_several_requests_at_once(broker: Broker, name: str) -> None:
    together = asyncio.Barrier(3)

    async def handler(data: bytes) -> bytes:
        await together.wait()
        return data

    await broker.serve(name, "1.0.0", name, {"verb": handler})
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(*(broker.request(f"{name}.verb", b"", LIMIT_S) for _ in range(3)))
