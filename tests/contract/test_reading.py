"""The seam to the broker: reading a stream in order, and following it."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from flame.broker.errors import StreamMissing
from flame.broker.seam import Broker, StoredMessage
from flame.errors import BrokerUnavailable
from tests.contract.conftest import LIMIT_S, CutOff
from tests.contract.test_streams import plain


async def read(broker: Broker, stream: str, pattern: str, after: int = 0) -> list[StoredMessage]:
    return [message async for message in broker.read(stream, pattern, after=after)]


async def follow(broker: Broker, stream: str, pattern: str, count: int, after: int = 0) -> list[StoredMessage]:
    """The first so many messages of a reader that follows."""
    found: list[StoredMessage] = []
    async with asyncio.timeout(2 * LIMIT_S), aclosing(broker.read(stream, pattern, after=after, follow=True)) as reader:
        async for message in reader:
            found.append(message)
            if len(found) == count:
                break
    return found


async def fill(broker: Broker, name: str, count: int, begin: int = 0) -> None:
    numbers = range(begin, begin + count)
    stores = [await broker.begin_store(f"{name}.{'ab'[n % 2]}", str(n).encode(), LIMIT_S) for n in numbers]
    await asyncio.gather(*stores)


def numbers(messages: list[StoredMessage]) -> list[int]:
    return [int(message.data) for message in messages]


async def test_everything_is_read_in_the_order_it_was_stored_in(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    await fill(broker, name, 1000)
    found = await read(broker, name, f"{name}.*")
    assert numbers(found) == list(range(1000))
    assert [message.sequence for message in found] == list(range(1, 1001))
    assert found[0][:3] == (f"{name}.a", b"0", 1)
    assert all(abs(message.stored_at - time.time()) < LIMIT_S for message in found)


async def test_only_what_matches_and_lies_behind_the_place_is_read(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    await fill(broker, name, 10)
    assert numbers(await read(broker, name, f"{name}.b")) == [1, 3, 5, 7, 9]
    assert numbers(await read(broker, name, f"{name}.b", after=4)) == [5, 7, 9]
    assert await read(broker, name, f"{name}.b", after=10) == []
    assert await read(broker, name, f"{name}.b", after=1000) == []


async def test_of_an_empty_stream_nothing_is_read(broker: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    assert await read(broker, name, f"{name}.*") == []


async def test_a_missing_stream_is_told(broker: Broker, name: str) -> None:
    with pytest.raises(StreamMissing):
        await read(broker, name, f"{name}.*")
    with pytest.raises(StreamMissing):
        await follow(broker, name, f"{name}.*", 1)


async def test_who_follows_gets_what_is_there_and_what_comes(broker: Broker, other: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    await fill(broker, name, 10)
    following = asyncio.create_task(follow(other, name, f"{name}.*", 20))
    await asyncio.sleep(0)
    await fill(broker, name, 10, begin=10)
    assert numbers(await following) == list(range(20))


async def test_a_slow_reader_loses_nothing(broker: Broker, other: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    await fill(broker, name, 2000)
    found = []
    async with asyncio.timeout(LIMIT_S):
        async for message in other.read(name, f"{name}.*"):
            found.append(message)
            if len(found) % 500 == 0:
                await asyncio.sleep(0.05)
    assert numbers(found) == list(range(2000))


async def test_who_follows_hears_everything_once_although_it_was_cut_off(
    broker: Broker, name: str, cut_off: CutOff
) -> None:
    await broker.ensure_stream(plain(name))
    await fill(broker, name, 5)
    heard = asyncio.Event()
    found: list[StoredMessage] = []

    async def go_on() -> None:
        async with aclosing(broker.read(name, f"{name}.*", follow=True)) as reader:
            async for message in reader:
                found.append(message)
                heard.set()
                if len(found) == 10:
                    return

    following = asyncio.create_task(go_on())
    async with asyncio.timeout(LIMIT_S):
        await heard.wait()
    async with cut_off():
        pass
    await fill(broker, name, 5, begin=5)
    async with asyncio.timeout(2 * LIMIT_S):
        await following
    assert numbers(found) == list(range(10))


async def test_who_follows_a_stream_that_is_deleted_is_told(broker: Broker, other: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    await fill(broker, name, 1)
    following = asyncio.create_task(follow(other, name, f"{name}.*", 2))
    await asyncio.sleep(0)
    await broker.delete_stream(name)
    with pytest.raises(StreamMissing):
        await following


async def test_who_follows_on_a_connection_that_is_closed_is_told(broker: Broker, other: Broker, name: str) -> None:
    await broker.ensure_stream(plain(name))
    following = asyncio.create_task(follow(other, name, f"{name}.*", 1))
    await asyncio.sleep(0)
    await other.close()
    with pytest.raises(BrokerUnavailable):
        await following
