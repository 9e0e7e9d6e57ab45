"""A template: a process that has loaded a service once and forks an executor for each order of the manager.

It never runs the event loop that it was called from again, and starts no thread: what is forked must be at rest. So it
waits synchronously, for its socket, for the manager's connection and for a descriptor of each executor's process.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from flame.errors import MalformedMessage
from flame.protocol.forking import Adopt, Ended, Finish, Forked, ForkOrder, NotForked, decode_for_template
from flame.service import sockets
from flame.service.forked import FAILED, default_signals, end_process, flush_streams

ORPHAN_S: Final = 60.0
"""Without a manager and without an executor a template ends after this long."""
_LIFETIME_GRACE_S: Final = 3.0
"""How long it outlives the cluster that it belongs to: its manager ends it in order if it can."""
_DATAGRAM: Final = 1024 * 1024
_DESCRIPTORS: Final = 2
_PEER: Final = struct.Struct("3i")

Become = Callable[[ForkOrder, int, int, Sequence[int]], None]
"""Turns a forked child into the executor of an order, given its standard output and error and what to close."""


class Template:
    """Listens for orders and carries them out, until it is told to finish or its manager is gone for good."""

    def __init__(self, path: str, lifetime_fd: int | None, become: Become) -> None:
        """Listen at ``path``; raise `OSError` if that can't be. ``become`` must not return."""
        self._path = path
        self._become = become
        self._listener = sockets.listen(path)
        self._manager: socket.socket | None = None
        self._lifetime_fd = lifetime_fd
        self._executors: dict[int, tuple[str, int]] = {}
        """Name and process id, by the descriptor of the process."""
        self._unsent: deque[tuple[bytes, int]] = deque()
        """What the manager has not heard yet, each with a descriptor to send or -1."""
        self._finishing = False
        self._end_at = 0.0
        """When it ends unless something happens, monotonic; 0: not set."""
        self._killed_at = 0.0

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
            with contextlib.suppress(OSError):
                Path(self._path).unlink(missing_ok=True)
            end_process(status)

    # ---- waiting

    def _serve_once(self) -> None:
        ready = self._wait()
        if self._manager is not None and self._manager.fileno() in ready:
            self._hear()
        if self._listener.fileno() in ready:
            self._accept()
        if self._lifetime_fd in ready:
            self._lifetime_fd = None
            self._killed_at = time.monotonic() + _LIFETIME_GRACE_S
        for descriptor in ready & self._executors.keys():
            self._reap(descriptor)
        self._send_all()

    def _wait(self) -> set[int]:
        """Return the descriptors at which something has happened."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        if self._manager is not None:
            poller.register(self._manager, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if self._lifetime_fd is not None:
            poller.register(self._lifetime_fd, select.POLLIN)
        for descriptor in self._executors:
            poller.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in poller.poll(self._patience_ms())}

    def _patience_ms(self) -> float | None:
        if self._manager is not None or self._executors:
            self._end_at = 0.0
        elif not self._end_at:
            self._end_at = time.monotonic() + ORPHAN_S
        limits = [at for at in (self._end_at, self._killed_at) if at]
        return max(0.0, min(limits) - time.monotonic()) * 1000 if limits else None

    def _is_over(self) -> bool:
        now = time.monotonic()
        if self._killed_at and now >= self._killed_at:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        return (self._finishing and not self._executors) or bool(self._end_at and now >= self._end_at)

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

    def _hear(self) -> None:
        """Carry out what the manager says."""
        assert self._manager is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._manager, _DATAGRAM, _DESCRIPTORS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
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
        if isinstance(message, ForkOrder) and len(descriptors) == _DESCRIPTORS:
            self._fork(message, *descriptors)
        elif isinstance(message, Adopt) and len(descriptors) == _DESCRIPTORS:
            flush_streams()
            os.dup2(descriptors[0], 1)
            os.dup2(descriptors[1], 2)
            with contextlib.suppress(OSError):
                os.chdir(message.folder)
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

    def _fork(self, order: ForkOrder, stdout: int, stderr: int) -> None:
        flush_streams()  # what is buffered is not to be written twice
        try:
            pid = os.fork()
        except OSError as error:
            self._refuse(order, error)
            return
        if pid == 0:
            try:
                self._become(order, stdout, stderr, self._own_descriptors())
            finally:
                os._exit(FAILED)
        try:
            descriptor = os.pidfd_open(pid)
            copy = os.dup(descriptor)
        except OSError as error:  # no descriptor is left: it could not be looked after
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._refuse(order, error)
            return
        self._executors[descriptor] = (order.executor, pid)
        self._unsent.append((Forked(order.executor, pid).encode(), copy))

    def _refuse(self, order: ForkOrder, error: OSError) -> None:
        self._unsent.append((NotForked(order.executor, f"fork: {error.strerror}").encode(), -1))

    def _own_descriptors(self) -> list[int]:
        """Return what a child has no use for; its siblings' are among it."""
        sockets = [self._listener] if self._manager is None else [self._listener, self._manager]
        unsent = [descriptor for _, descriptor in self._unsent if descriptor >= 0]
        return [*(each.detach() for each in sockets), *self._executors, *unsent]

    def _reap(self, descriptor: int) -> None:
        """Take note of an executor's end."""
        executor, pid = self._executors.pop(descriptor)
        # Its group first: until it is reaped, nobody else can get its number.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        result = os.waitid(os.P_PIDFD, descriptor, os.WEXITED)
        os.close(descriptor)
        if result is not None:
            status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
            self._unsent.append((Ended(executor, pid, status).encode(), -1))
