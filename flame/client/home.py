"""The event loop that a part of the client belongs to: in another one it would wait for ever, or do harm."""

from __future__ import annotations

import asyncio
from threading import get_ident
from typing import Final

from flame.errors import WrongThread


class Thread:
    """Stands in for an event loop that doesn't tell in which thread it runs, and for none: no thread has number 0."""

    def __init__(self, number: int) -> None:
        """Have that number."""
        self._thread_id = number


NOWHERE: Final = Thread(0)


def runner_of(home: asyncio.AbstractEventLoop) -> Thread:
    """Return what has in ``_thread_id`` the thread in which an event loop runs, none while it doesn't.

    To compare that with one's own is the cheapest check there is: asking for the running loop takes longer than all
    else that is looked at for a task. Where they differ `check_loop` decides.
    """
    # asyncio's own loops say so themselves; uvloop's don't.
    return home if hasattr(home, "_thread_id") else Thread(get_ident())  # type: ignore[return-value]


def check_loop(what: str, home: asyncio.AbstractEventLoop) -> None:
    """Raise `WrongThread` anywhere but in the event loop ``home``."""
    try:
        here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if here is not home:
        where = "outside of an event loop" if here is None else "in another event loop"
        raise WrongThread(
            f"{what} was used {where} than the one that it belongs to: use it there, or use flame.sync, which works in"
            " any thread"
        )
