"""An executor of the floor: ``python -m benchmarks.floor.executor --endpoint URL --lifetime-fd N``.

Says ``ready`` when it takes tasks. Ends with a signal, or with whoever holds the other end of its lifetime pipe.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Final

import msgpack
import nats
import uvloop

from benchmarks.floor.names import CONSUMER, RESULT, STANDING, TASK, TASKS

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

_NEXT: Final = f"$JS.API.CONSUMER.MSG.NEXT.{TASKS}.{CONSUMER}"
_REQUEST: Final = json.dumps({"batch": STANDING, "expires": 30_000_000_000}).encode()
_CUT: Final = len(TASK)


class Executor:
    """Takes tasks with one standing request, stores their results, acknowledges them after that."""

    def __init__(self, nc: Client) -> None:
        """Bind to a connection."""
        self._nc = nc
        self._inbox = nc.new_inbox()
        self._stored = f"{nc.new_inbox()}."
        self._stored_cut = len(self._stored)
        self._handles: dict[str, str] = {}
        """What to acknowledge when a result is stored."""
        self._asked = 0
        self._count = 0

    async def start(self) -> None:
        """Ask for tasks."""
        await self._nc.subscribe(f"{self._stored}*", cb=self._on_stored)
        await self._nc.subscribe(self._inbox, cb=self._on_task)
        await self._ask()

    async def _ask(self) -> None:
        self._asked += STANDING
        await self._nc.publish(_NEXT, _REQUEST, self._inbox)

    async def _on_stored(self, msg: Msg) -> None:
        if msg.data.startswith(b'{"error"'):
            sys.exit(f"a result was refused: {msg.data!r}")
        handle = self._handles.pop(msg.subject[self._stored_cut :], None)
        if handle is not None:
            await self._nc.publish(handle, b"+ACK")

    async def _on_task(self, msg: Msg) -> None:
        if msg.headers is not None and "Status" in msg.headers:
            self._asked = 0  # the request has run out
            await self._ask()
            return
        self._asked -= 1
        task = msgpack.unpackb(msg.data)
        result = msgpack.packb({"s": "succeed", "o": task["i"], "t": time.time()})
        self._count += 1
        token = str(self._count)
        self._handles[token] = msg.reply
        await self._nc.publish(RESULT + msg.subject[_CUT:], result, self._stored + token)
        if self._asked <= STANDING // 2:
            await self._ask()


async def _main(endpoint: str, lifetime_fd: int) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(lifetime_fd, ended.set)
    nc = await nats.connect(endpoint.split(","))
    await Executor(nc).start()
    await nc.flush()
    print("ready", flush=True)
    await ended.wait()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--lifetime-fd", type=int, required=True)
    given = parser.parse_args()
    uvloop.run(_main(given.endpoint, given.lifetime_fd))
