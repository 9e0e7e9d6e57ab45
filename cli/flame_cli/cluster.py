"""How a command reaches the cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from flame_cli.errors import debugging

if TYPE_CHECKING:
    from flame import Connection

T = TypeVar("T")


def run(endpoint: str | None, command: Callable[[Connection], Awaitable[T]], *, name: str = "flmctl") -> T:
    """Connect, run one command, close the connection and return what the command brought.

    Args:
        endpoint: ``None``: that of the environment, otherwise the local default.
        command: What to do with the connection.
        name: What the broker is told about this client.
    """
    quiet_logs()
    return asyncio.run(_run(endpoint, command, name))


def quiet_logs() -> None:
    """Keep the library's logs off the terminal unless they are asked for: commands speak for themselves."""
    if debugging():
        from flame.logs import configure_logs

        configure_logs("debug")
    else:
        for part in ("flame", "nats", "asyncio"):
            logging.getLogger(part).setLevel(logging.CRITICAL + 1)


async def _run(endpoint: str | None, command: Callable[[Connection], Awaitable[T]], name: str) -> T:
    from flame import connect

    async with await connect(endpoint, name=name) as connection:
        return await command(connection)
