"""A template, as its manager sees it: a process, and the socket on which executors are ordered from it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from flame.errors import FlameError, MalformedMessage
from flame.logs import get_logger
from flame.protocol.forking import Adopt, Ended, Finish, Forked, ForkOrder, NotForked, decode_for_manager
from flame.service import sockets
from flame_services.executor_manager.forked import ForkedProcess
from flame_services.executor_manager.process import ExecutorProcess

log = get_logger("flame.manager.template")

FORK_S: Final = 5.0
"""A template that doesn't answer an order for this long is ended."""
FINISH_S: Final = 1.0
_PEER: Final = struct.Struct("3i")


class TemplateLost(FlameError):
    """The template is gone, or was ended because it did not answer. It has forked nothing that would be used."""


class ForkRefused(FlameError):
    """The system refused a fork; the template lives on."""


class Template:
    """Forks executors of one application, for as long as its process lives."""

    def __init__(
        self, path: Path, process: ExecutorProcess, environment: Mapping[str, str], connection: socket.socket
    ) -> None:
        """Take over a connection that `reach` has made; ``environment`` is what the process was started with."""
        self.path: Final = path
        self.process: Final = process
        self.environment: Final = environment
        self.lost: Final = asyncio.Event()
        """It is gone."""
        self.used_at = 0.0
        """When it was last asked for an executor, or one of its executors ended; loop time."""
        self.on_lost: Callable[[Template], None] = lambda _: None
        """Called once, when it is gone."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._executors: dict[str, ForkedProcess] = {}
        self._ordered: dict[str, asyncio.Future[ForkedProcess]] = {}
        self._sending = asyncio.Lock()
        self._writable: asyncio.Future[None] | None = None
        self._touch()
        self._loop.add_reader(connection.fileno(), self._hear)
        process.ended.add_done_callback(lambda _: self._lose("its process has ended"))

    @property
    def unused(self) -> bool:
        """Whether it has no executor and is to make none."""
        return not self._executors and not self._ordered

    def adopt(self, wishes: Adopt, output: int) -> None:
        """Have it write to ``output`` and do as is wished from now on: it was started as an executor would be."""
        with contextlib.suppress(OSError):  # then it is being lost
            socket.send_fds(self._connection, [wishes.encode()], [output, output])

    async def fork(self, order: ForkOrder, stdout: int, stderr: int) -> ForkedProcess:
        """Return the process of a new executor; raise `TemplateLost` or `ForkRefused`."""
        if self.lost.is_set():
            raise TemplateLost("the template is gone")
        self._touch()
        answer: asyncio.Future[ForkedProcess] = self._loop.create_future()
        self._ordered[order.executor] = answer
        try:
            async with asyncio.timeout(FORK_S):
                await self._send(order.encode(), [stdout, stderr])
                return await answer
        except TimeoutError:
            self._lose(f"it did not answer within {FORK_S:g} s")
            raise TemplateLost(f"the template did not answer within {FORK_S:g} s") from None
        except OSError as error:
            self._lose(f"its connection failed: {error.strerror}")
            raise TemplateLost(f"the template's connection failed: {error.strerror}") from None
        finally:
            self._ordered.pop(order.executor, None)

    async def end(self) -> None:
        """Have it end with its last executor; return when it is gone."""
        with contextlib.suppress(OSError):
            await self._send(Finish().encode(), [])
        while not self.process.ended.done():
            _, late = await asyncio.wait([self.process.ended], timeout=FINISH_S)
            if late and self.unused:
                self.process.signal(signal.SIGKILL)

    # ---- the connection

    async def _send(self, data: bytes, descriptors: list[int]) -> None:
        async with self._sending:
            while not self.lost.is_set():
                try:
                    socket.send_fds(self._connection, [data], descriptors)
                except BlockingIOError:
                    await self._room()
                else:
                    return

    async def _room(self) -> None:
        """Wait until the socket takes something, or the template is lost."""
        room = self._writable = self._loop.create_future()
        self._loop.add_writer(self._connection.fileno(), lambda: None if room.done() else room.set_result(None))
        try:
            await room
        finally:
            self._writable = None
            if not self.lost.is_set():
                self._loop.remove_writer(self._connection.fileno())

    def _hear(self) -> None:
        try:
            while not self.lost.is_set():
                data, descriptors = sockets.receive(self._connection)
                if not data:
                    self._lose("it has closed its connection")
                    return
                self._take(data, descriptors)
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(f"its connection failed: {error.strerror}")

    def _take(self, data: bytes, descriptors: list[int]) -> None:
        message = None
        try:
            message = decode_for_manager(data)
        except MalformedMessage as error:
            log.warning("a template's answer can't be read", pid=self.process.pid, reason=str(error))
        if isinstance(message, Forked) and descriptors:
            self._begin(message, descriptors.pop())
        elif isinstance(message, NotForked):
            self._answer(message.executor, ForkRefused(message.reason))
        elif isinstance(message, Ended) and (executor := self._executors.get(message.executor)) is not None:
            executor.tell(message.status)
        for descriptor in descriptors:
            os.close(descriptor)

    def _begin(self, message: Forked, descriptor: int) -> None:
        process = ForkedProcess(message.pid, descriptor)
        self._executors[message.executor] = process
        process.ended.add_done_callback(lambda _: self._forget(message.executor))
        if not self._answer(message.executor, process):
            process.signal(signal.SIGKILL)  # nobody waits for it any more

    def _answer(self, executor: str, answer: ForkedProcess | ForkRefused) -> bool:
        """Give whoever ordered an executor the answer; tell whether anybody was still waiting."""
        waiting = self._ordered.get(executor)
        if waiting is None or waiting.done():
            return False
        if isinstance(answer, ForkedProcess):
            waiting.set_result(answer)
        else:
            waiting.set_exception(answer)
        return True

    def _forget(self, executor: str) -> None:
        self._executors.pop(executor, None)
        self._touch()

    def _touch(self) -> None:
        self.used_at = self._loop.time()

    def _lose(self, reason: str) -> None:
        """Let go of it. Its process is ended, so that it forks nothing any more."""
        if self.lost.is_set():
            return
        self.lost.set()
        log.info("a template is gone", pid=self.process.pid, reason=reason)
        self._loop.remove_reader(self._connection.fileno())
        self._loop.remove_writer(self._connection.fileno())
        self._connection.close()
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self.process.signal(signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        for waiting in self._ordered.values():
            if not waiting.done():
                waiting.set_exception(TemplateLost("the template died"))
        for executor in tuple(self._executors.values()):
            executor.lose_template()
        self.on_lost(self)


def reach(path: Path, process: ExecutorProcess) -> socket.socket | None:
    """Connect to a process that may have become a template; ``None`` if it has not, so far."""
    try:
        connection = sockets.connect(str(path))
    except OSError:
        return None
    pid, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if user != os.getuid() or not process.owns(pid):
        connection.close()
        return None
    return connection
