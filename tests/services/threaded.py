"""A service whose handler is not ``async``: it waits as long as its input says, if nobody wants it to end before."""

import asyncio
import json
import os
import time

import flame


class Threaded(flame.FlameService):
    def on_task_invoke(self, context: flame.TaskContext) -> str:
        seconds, obeys = json.loads(context.input)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not (obeys and context.cancelled):
            time.sleep(0.005)
        return str(os.getpid())


if __name__ == "__main__":
    asyncio.run(flame.run(Threaded()))
