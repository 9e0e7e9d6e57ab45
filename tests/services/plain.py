"""A service that knows nothing of Flame's SDK: what one in another language would do, with nats-py for a client.

It takes one task at a time and answers with the input in capitals.
"""

import asyncio
import json
import os
import time
from typing import Any

import msgpack
import nats
from nats.errors import Error

REPORTS = f"flame.executor.{os.environ['FLAME_NODE']}.{os.environ['FLAME_EXECUTOR']}"


async def main() -> None:
    client = await nats.connect(os.environ["FLAME_ENDPOINT"])
    done = 0

    async def report(state: str, **fields: Any) -> dict[str, Any]:
        message = {"v": 1, "kind": "report", "state": state, "pid": os.getpid(), "succeeded": done, **fields}
        while True:
            try:
                answer = await client.request(REPORTS, msgpack.packb(message), timeout=2)
            except Error:
                await asyncio.sleep(0.1)
            else:
                orders: dict[str, Any] = msgpack.unpackb(answer.data)
                return orders

    orders = await report("idle")
    given = orders.get("assignment")
    if orders["want"] == "leave" or given is None:
        return
    inbox = await client.subscribe(client.new_inbox())
    take = f"$JS.API.CONSUMER.MSG.NEXT.{given['stream']}.{given['consumer']}"
    while (await report("bound", idle_s=0.1))["want"] != "leave":
        await client.publish(take, json.dumps({"batch": 1, "expires": 500_000_000}).encode(), inbox.subject)
        try:
            task = await inbox.next_msg(timeout=2)
        except Error:
            continue
        if not task.reply:
            continue  # nothing came in time
        result = {"state": "succeed", "output": task.data and msgpack.unpackb(task.data)["input"].upper()}
        record = {"v": 1, "kind": "result", "executor": os.environ["FLAME_EXECUTOR"], "started": time.time(), **result}
        await client.request(task.subject.replace("flame.task.", "flame.result."), msgpack.packb(record))
        await client.publish(task.reply, b"+ACK")
        done += 1
    await report("unbinding")
    await report("released")
    await client.close()


asyncio.run(main())
