"""Whether this process, having loaded a service, can be forked safely.

A fork copies memory and one thread. What else a process has is shared or missing afterwards: other threads don't exist
in the child while the locks that they held stay taken, and a connection that two processes write to is broken for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_THREADS: Final = Path("/proc/self/task")
_DESCRIPTORS: Final = Path("/proc/self/fd")
_SHOWN: Final = 3
_TRIAL_S: Final = 2.0


def hindrance() -> str:
    """Return why this process, which runs an event loop, must not be forked; empty if it may."""
    return _system() or _tasks() or _sockets() or _threads()


def _system() -> str:
    needed = (
        (os, "fork"),
        (os, "pidfd_open"),
        (os, "P_PIDFD"),
        (socket, "SOCK_SEQPACKET"),
        (socket, "SCM_RIGHTS"),
    )
    missing = [name for module, name in needed if not hasattr(module, name)]
    if not missing and _THREADS.is_dir():
        return ""
    return f"{sys.platform} has no {missing[0] if missing else _THREADS}"


def _tasks() -> str:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return _counted(len(others), "other asyncio task", (task.get_name() for task in others))


def _sockets() -> str:
    """Tell of connections, and of what waits for some. A pair of sockets, such as a loop's own, leads nowhere else."""
    found = []
    for descriptor in _DESCRIPTORS.iterdir():
        with contextlib.suppress(OSError):
            if str(descriptor.readlink()).startswith("socket:"):
                found.append(_described(int(descriptor.name)))
    return _counted(len(outside := [text for text in found if text]), "open socket", outside)


def _described(descriptor: int) -> str:
    """Return where a socket leads; empty if that is within this process."""
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        peer = None
        with contextlib.suppress(OSError):
            peer = copy.getpeername()
        if copy.family == socket.AF_UNIX:
            name = peer or copy.getsockname()
            return os.fsdecode(name) if name else ""
        if copy.family in (socket.AF_INET, socket.AF_INET6):
            host, port = (peer or copy.getsockname())[:2]
            return f"{'to' if peer else 'at'} {host} port {port}"
        return str(copy.family)


def _threads() -> str:
    """Tell of threads that a fork does not end by itself: some libraries drop their own, as OpenBLAS does."""
    if len(list(_THREADS.iterdir())) > 1 and not _fork_and_forget():
        return f"a fork of it hangs, for {_TRIAL_S:g} s at least"
    main = str(threading.main_thread().native_id)
    others = [thread.name for thread in _THREADS.iterdir() if thread.name != main]
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    return _counted(len(others), "other thread", (names.get(other) or _command(other) for other in others))


def _fork_and_forget() -> bool:
    """Fork a process that only ends; tell whether it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is why we do this
        child = os.fork()
    if child == 0:
        os._exit(0)
    descriptor = os.pidfd_open(child)
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        ended = bool(poller.poll(_TRIAL_S * 1000))
    finally:
        os.close(descriptor)
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return ended


def _command(thread: str) -> str:
    try:
        return (_THREADS / thread / "comm").read_text(errors="replace").strip()
    except OSError:
        return thread


def _counted(count: int, noun: str, names: Iterator[str] | list[str]) -> str:
    if not count:
        return ""
    shown = sorted(names)
    more = "" if len(shown) <= _SHOWN else ", …"
    return f"{count} {noun}{'s' if count > 1 else ''} ({', '.join(shown[:_SHOWN])}{more})"
