"""Tells a socket when a task starts, and ends only the second attempt at it: the first one waits to be killed."""

from __future__ import annotations

import asyncio
import os
import socket
import time

import flame


class Holding(flame.FlameService):
    """Tells the datagram socket at the path that is the input: its process and the time."""

    async def on_task_invoke(self, context: flame.TaskContext) -> None:
        """Tell, and return unless this is the first attempt."""
        told = f"{os.getpid()} {time.monotonic()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as teller:
            teller.sendto(told.encode(), context.input.decode())
        if context.attempt == 1:
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(flame.run(Holding()))
