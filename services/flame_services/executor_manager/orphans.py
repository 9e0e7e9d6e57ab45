"""Processes that have lost their parent: the children of a template that is gone, and what services leave behind.

The manager asks the system to become the parent of those below it. That lets it learn how an executor ended whose
template is gone; in return it has to ask for the status of every other one, or they would stay as zombies.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from typing import Final

_PR_SET_CHILD_SUBREAPER: Final = 36
_LOOK_S: Final = 1.0

_claimed: set[int] = set()
"""A process's children are a matter of the whole process, and so is this."""


def claim(pid: int) -> None:
    """Say that somebody here will ask for the status of a process."""
    _claimed.add(pid)


def disclaim(pid: int) -> None:
    """Say that it has been asked for, or won't be."""
    _claimed.discard(pid)


def adopt_orphans() -> bool:
    """Have this process be the parent of orphans below it; tell whether the system does that.

    For a program that has no children but those claimed here: whoever calls this must run `reap_orphans`.
    """
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


async def reap_orphans() -> None:
    """Ask for the status of dead children that nobody claims, until cancelled."""
    while True:
        await asyncio.sleep(_LOOK_S)
        with contextlib.suppress(ChildProcessError):  # there is no child at all
            _reap_unclaimed()


def _reap_unclaimed() -> None:
    while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
        if dead.si_pid in _claimed:
            break  # it is asked for in a moment, and others after that
        os.waitid(os.P_PID, dead.si_pid, os.WEXITED | os.WNOHANG)
