"""A template: a process that has loaded a service once and forks an executor for each order of the manager.

It never runs the event loop that it was called from again, and starts no thread: what is forked must be at rest. So it
waits synchronously, for its socket, for the manager's connection and for a descriptor of each executor's process.

An executor hears its order over a socket of its own. So some can be forked ahead of their orders, while nothing else
is to be done: they have a loop and a connection to the broker by then.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from flame.errors import MalformedMessage
from flame.protocol.forking import Adopt, Ended, Finish, Forked, ForkOrder, NotForked, decode_for_template
from flame.service import sockets
from flame.service.forked import FAILED, default_signals, end_process, flush_streams, leave_template

ORPHAN_S: Final = 60.0
"""Without a manager and without an executor a template ends after this long."""
QUIET_S: Final = 0.02
"""Executors are forked ahead when there has been no order for this long: the last one's needs the processor first."""
_LIFETIME_GRACE_S: Final = 3.0
"""How long it outlives the cluster that it belongs to: its manager ends it in order if it can."""
_PEER: Final = struct.Struct("3i")


@dataclass(slots=True)
class _Child:
    """A fork of this process."""

    pid: int
    descriptor: int
    """Of the process."""
    channel: socket.socket
    """On which it is waiting for its order; closed once it has one."""
    executor: str = ""
    """What it was ordered to be."""


class Template:
    """Listens for orders and carries them out, until it is told to finish or its manager is gone for good."""

    def __init__(self, path: str, lifetime_fd: int | None, be_executor: Callable[[socket.socket], NoReturn]) -> None:
        """Listen at ``path``; raise `OSError` if that can't be.

        ``be_executor`` is what a fork does: it waits for an order on the socket that it is given, and for its end.
        """
        self._path = path
        self._be_executor = be_executor
        self._listener = sockets.listen(path)
        self._manager: socket.socket | None = None
        self._lifetime_fd = lifetime_fd
        self._children: dict[int, _Child] = {}
        """All that live, by the descriptor of their process."""
        self._ahead: deque[_Child] = deque()
        """Those that have no order yet."""
        self._unsent: deque[tuple[bytes, int]] = deque()
        """What the manager has not heard yet, each with a descriptor to send or -1."""
        self._wishes = Adopt("")
        self._ahead_works = True
        """Cleared when one that was forked ahead dies, until the next order: another one could only fare the same."""
        self._ordered_at = time.monotonic()
        self._orphaned_at = 0.0
        """Since when it has had neither manager nor executor; 0: it has."""
        self._kill_at = 0.0
        """When it and what is left of its group is killed, the cluster being gone; 0: never."""
        self._finishing = False

    def run(self) -> NoReturn:
        """Serve until the end of this process."""
        default_signals()
        gc.collect()
        gc.freeze()  # otherwise the first collection in a child would copy everything
        status = FAILED
        try:
            while not self._is_over():
                self._serve_once()
            status = 0
        except BaseException:  # noqa: BLE001 (above this is the service's own code, which has no part in this)
            traceback.print_exc()
        finally:
            self._dismiss_ahead()
            with contextlib.suppress(OSError):
                Path(self._path).unlink(missing_ok=True)
            end_process(status)

    # ---- waiting

    def _serve_once(self) -> None:
        ready = self._wait()
        if self._manager is not None and self._manager.fileno() in ready:
            self._hear(self._manager)
        if self._listener.fileno() in ready:
            self._accept()
        if self._lifetime_fd in ready:
            self._lifetime_fd = None
            self._kill_at = time.monotonic() + _LIFETIME_GRACE_S
        for descriptor in ready & self._children.keys():
            self._reap(self._children.pop(descriptor))
        self._send_all()
        self._prepare()

    def _wait(self) -> set[int]:
        """Return the descriptors at which something has happened."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        if self._manager is not None:
            poller.register(self._manager, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if self._lifetime_fd is not None:
            poller.register(self._lifetime_fd, select.POLLIN)
        for descriptor in self._children:
            poller.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in poller.poll(self._patience_ms())}

    def _patience_ms(self) -> float | None:
        """Return how long to wait for something to happen before something else is due."""
        now = time.monotonic()
        if self._manager is not None or len(self._children) > len(self._ahead):
            self._orphaned_at = 0.0
        elif not self._orphaned_at:
            self._orphaned_at = now
        due = [self._kill_at] if self._kill_at else []
        if self._orphaned_at:
            due.append(self._orphaned_at + ORPHAN_S)
        if self._wants_more_ahead(now):
            due.append(self._ordered_at + QUIET_S)
        elif self._ahead and self._wishes.ahead_s:
            due.append(self._ordered_at + self._wishes.ahead_s)
        return max(0.0, min(due) - now) * 1000 if due else None

    def _is_over(self) -> bool:
        now = time.monotonic()
        if self._kill_at and now >= self._kill_at:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        return (self._finishing and len(self._children) == len(self._ahead)) or bool(
            self._orphaned_at and now >= self._orphaned_at + ORPHAN_S
        )

    # ---- the manager

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            manager, _ = self._listener.accept()
            _, user, _ = _PEER.unpack(manager.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if user not in (os.getuid(), 0):
                manager.close()
                return
            self._drop_manager()
            manager.setblocking(False)
            self._manager = manager

    def _drop_manager(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _hear(self, manager: socket.socket) -> None:
        """Carry out what the manager says."""
        try:
            data, descriptors = sockets.receive(manager)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._drop_manager()
            return
        try:
            self._carry_out(data, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _carry_out(self, data: bytes, descriptors: list[int]) -> None:
        try:
            message = decode_for_template(data)
        except MalformedMessage as error:
            print(f"flame: order ignored: {error}", file=sys.stderr)  # noqa: T201 (nothing else is left to tell)
            return
        if isinstance(message, ForkOrder):
            self._order(message, data, descriptors)
        elif isinstance(message, Adopt) and len(descriptors) == sockets.STREAMS:
            flush_streams()
            os.dup2(descriptors[0], 1)
            os.dup2(descriptors[1], 2)
            with contextlib.suppress(OSError):
                os.chdir(message.folder)
            self._wishes = message
        elif isinstance(message, Finish):
            self._finishing = True

    def _send_all(self) -> None:
        """Tell the manager what it has not heard, as far as that goes now."""
        while self._manager is not None and self._unsent:
            data, descriptor = self._unsent[0]
            try:
                socket.send_fds(self._manager, [data], [] if descriptor < 0 else [descriptor])
            except BlockingIOError:
                return
            except OSError:
                self._drop_manager()
                return
            self._unsent.popleft()
            if descriptor >= 0:
                os.close(descriptor)

    # ---- executors

    def _order(self, order: ForkOrder, data: bytes, descriptors: list[int]) -> None:
        """Hand an order to an executor: one that is waiting, otherwise a new one."""
        self._ordered_at = time.monotonic()
        self._ahead_works = True
        try:
            child = self._hand(data, descriptors)
            copy = os.dup(child.descriptor)
        except OSError as error:
            self._unsent.append((NotForked(order.executor, f"fork: {error.strerror}").encode(), -1))
            return
        child.executor = order.executor
        self._unsent.append((Forked(order.executor, child.pid).encode(), copy))

    def _hand(self, data: bytes, descriptors: list[int]) -> _Child:
        while True:
            fresh = not self._ahead
            child = self._fork(descriptors) if fresh else self._ahead.popleft()
            try:
                socket.send_fds(child.channel, [data], descriptors)
            except OSError:  # it is dead, and will be reaped
                if fresh:
                    raise
            else:
                return child
            finally:
                child.channel.close()

    def _fork(self, close: Iterable[int] = ()) -> _Child:
        """Return a child that waits for its order, and has closed some descriptors besides this process's own.

        Raises `OSError` if the system refuses.
        """
        channel, its_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_channel:
            channel.setblocking(False)
            flush_streams()  # what is buffered is not to be written twice
            try:
                pid = os.fork()
            except OSError:
                channel.close()
                raise
            if pid == 0:
                try:
                    channel.close()
                    leave_template((*self._own_descriptors(), *close))
                    self._be_executor(its_channel)
                finally:
                    os._exit(FAILED)
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:  # no descriptor is left: it could not be looked after
            channel.close()
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        child = self._children[descriptor] = _Child(pid, descriptor, channel)
        return child

    def _own_descriptors(self) -> list[int]:
        """Return what a child has no use for; what belongs to its siblings is among it."""
        found = [self._listener] if self._manager is None else [self._listener, self._manager]
        found += [child.channel for child in self._ahead]
        unsent = [descriptor for _, descriptor in self._unsent if descriptor >= 0]
        return [*(each.detach() for each in found), *self._children, *unsent]

    def _reap(self, child: _Child) -> None:
        """Take note of a child's end."""
        # Its group first: until it is reaped, nobody else can get its number.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        result = os.waitid(os.P_PIDFD, child.descriptor, os.WEXITED)
        os.close(child.descriptor)
        if child in self._ahead:
            self._ahead.remove(child)
            child.channel.close()
            self._ahead_works = False
        elif result is not None:
            status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
            self._unsent.append((Ended(child.executor, child.pid, status).encode(), -1))

    # ---- ahead of orders

    def _wants_more_ahead(self, now: float) -> bool:
        if not self._ahead_works or self._finishing or self._manager is None:
            return False
        used = not self._wishes.ahead_s or now - self._ordered_at < self._wishes.ahead_s
        return used and len(self._ahead) < self._wishes.ahead

    def _prepare(self) -> None:
        """Fork ahead what may be needed, or dismiss what was not."""
        now = time.monotonic()
        if self._ahead and self._wishes.ahead_s and now - self._ordered_at >= self._wishes.ahead_s:
            self._dismiss_ahead()
        elif self._wants_more_ahead(now) and now - self._ordered_at >= QUIET_S:
            with contextlib.suppress(OSError):
                self._ahead.append(self._fork())

    def _dismiss_ahead(self) -> None:
        """End those that were forked ahead."""
        while self._ahead:
            child = self._ahead.popleft()
            child.channel.close()
            os.kill(child.pid, signal.SIGKILL)
            os.waitid(os.P_PIDFD, child.descriptor, os.WEXITED)
            os.close(child.descriptor)
            del self._children[child.descriptor]
