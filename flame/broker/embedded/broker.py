"""An embedded broker: its start, its stop and everything in between."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
import weakref
from types import TracebackType
from typing import Self

from flame.broker.embedded.config import EmbeddedBrokerConfig, server_configuration
from flame.broker.embedded.data_folder import DataFolder
from flame.broker.embedded.errors import BrokerStartFailed, PortInUse
from flame.broker.embedded.executable import find_nats_server
from flame.broker.embedded.probe import jetstream_fault
from flame.broker.embedded.process import GuardedServer
from flame.errors import BrokerUnavailable, ConfigurationError

_POLL_S = 0.002
_SETTLE_S = 5.0

_STOPPED_EARLY = "the embedded broker was stopped while it was starting"


class EmbeddedBroker:
    """A NATS server with JetStream that lives no longer than the process that started it.

    `start` and `stop` may be called from different event loops, and again after one another: messages and
    port survive. A child of ``os.fork`` has no part in its parent's broker.
    """

    def __init__(self, config: EmbeddedBrokerConfig) -> None:
        """Keep the configuration; nothing is touched before `start`."""
        self.config = config
        self._folder = DataFolder(config.data_dir)
        self._port = config.port
        self._server: GuardedServer | None = None
        self._claimed = False
        _brokers.add(self)

    @property
    def endpoint(self) -> str:
        """The URL for clients, such as ``nats://127.0.0.1:4222``; the same after a restart.

        Raises:
            BrokerUnavailable: the port is to be chosen at the first start, and there was none.
        """
        return f"nats://{_bracketed(self._reachable_host())}:{self.port}"

    @property
    def port(self) -> int:
        """The port for clients.

        Raises:
            BrokerUnavailable: it is to be chosen at the first start, and there was none.
        """
        if self._port == 0:
            raise BrokerUnavailable("the embedded broker has no port yet: start it first")
        return self._port

    @property
    def pid(self) -> int:
        """Process id of the server.

        Raises:
            BrokerUnavailable: it was not started, or was stopped.
        """
        pid = self._started_server().pid
        if pid is None:
            raise BrokerUnavailable("the embedded broker has no server yet: it is starting")
        return pid

    @property
    def guard_pid(self) -> int:
        """Process id of the guard.

        Raises:
            BrokerUnavailable: it was not started, or was stopped.
        """
        return self._started_server().guard_pid

    async def start(self) -> None:
        """Start the server; it accepts JetStream requests when this returns.

        If this raises, or is cancelled, no process is left and the data folder is free.

        Raises:
            BrokerNotInstalled: there is no ``nats-server``.
            DataDirInUse: another broker uses the data folder.
            PortInUse: another program listens on the port.
            ConfigurationError: the data folder or the address can't be used.
            BrokerStartFailed: the server ended, or was not ready in time.
            RuntimeError: this broker is running or starting already.
        """
        if self._claimed and (self._server is None or self._server.poll() is None):
            raise RuntimeError("this embedded broker is started already")
        self.kill()  # the remains of a server that ended by itself
        executable = find_nats_server()
        self._claimed = True
        try:
            self._folder.claim()
            await self._start([str(executable), "-c", str(self._folder.config_file)])
        except BaseException:
            self.kill()
            raise

    async def stop(self) -> None:
        """End the server, killing it after ``stop_timeout_s``, and release the data folder.

        No process is left when this returns, and none when it is cancelled. Safe before `start`, and again.
        """
        server = self._server
        try:
            if server is not None:
                server.request_stop()
                async with asyncio.timeout(self.config.stop_timeout_s + _SETTLE_S):
                    await server.ended()
        except TimeoutError:
            pass  # the guard is stuck
        finally:
            self.kill()

    def kill(self) -> None:
        """End the server at once and release the data folder; needs no event loop.

        Stored messages survive. For ``atexit`` and the like; safe before `start`, and again.
        """
        server, self._server = self._server, None
        if server is not None:
            server.kill()
            deadline = time.monotonic() + _SETTLE_S
            while not self._folder.store_is_free() and time.monotonic() < deadline:
                time.sleep(_POLL_S)  # a server that lost its guard, and is dying
        self._folder.release()
        self._claimed = False

    async def wait(self) -> int:
        """Return the server's exit status (negative: killed by that signal) when it has ended.

        That is also when somebody stops it. The broker still has to be stopped, to release the data folder.

        Raises:
            BrokerUnavailable: it was not started, or was stopped.
        """
        return await self._started_server().ended()

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        await self.stop()

    async def _start(self, command: list[str]) -> None:
        step = "an earlier server of this data folder to end"
        try:
            async with asyncio.timeout(self.config.ready_timeout_s):
                store_lock = await self._claim_store()
                step = "nats-server to become ready"
                server = self._launch(command, store_lock)
                await self._listening(server)
                fault = await jetstream_fault(self._reachable_host(), self.port)
        except TimeoutError:
            if self._server is None:
                raise self._folder.store_in_use() from None
            raise self._failure(f"waited {self.config.ready_timeout_s:g} s for {step}") from None
        if server.stopping:
            raise BrokerStartFailed(_STOPPED_EARLY)
        if fault is not None:
            raise self._failure(f"nats-server started, but {fault}")

    async def _claim_store(self) -> int:
        """Wait for the server of an owner that was killed: two must not write to one store."""
        while (lock := self._folder.try_claim_store()) is None:
            await asyncio.sleep(_POLL_S)
            if not self._claimed:
                raise BrokerStartFailed(_STOPPED_EARLY)
        return lock

    def _launch(self, command: list[str], store_lock: int) -> GuardedServer:
        try:
            self._check_port()
            folder = self._folder
            folder.prepare(
                server_configuration(
                    self.config,
                    port=self._port,
                    data_dir=folder.path,
                    ports_dir=folder.ports_dir,
                    log_file=folder.log_file,
                )
            )
            self._server = GuardedServer(
                command,
                log_file=folder.log_file,
                store_lock=store_lock,
                grace_s=self.config.stop_timeout_s,
            )
            folder.note_store_holder(store_lock, self._server.guard_pid)
        except OSError as error:
            raise BrokerStartFailed(f"can't start nats-server in {self._folder.path}: {error}") from error
        finally:
            os.close(store_lock)
        return self._server

    def _check_port(self) -> None:
        """Refuse a port that is taken, before the last run's log is put aside."""
        if self._port == 0:
            return
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.config.host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise self._port_in_use() from None
            raise ConfigurationError(
                f"can't listen on port {self._port} of {self.config.host}: {error.strerror}"
            ) from error

    async def _listening(self, server: GuardedServer) -> None:
        """Wait until the server has said which port it listens on."""
        pid = await server.started()
        while server.poll() is None and pid is not None:
            port = self._folder.port_of(pid)
            if port is not None:
                self._port = port
                return
            await asyncio.sleep(_POLL_S)
        if server.stopping:
            raise BrokerStartFailed(_STOPPED_EARLY)
        if self._port and "address already in use" in self._folder.log_tail():
            raise self._port_in_use()
        raise self._failure(f"nats-server ended with status {server.exit_status}")

    def _port_in_use(self) -> PortInUse:
        return PortInUse(
            f"port {self._port} on {self.config.host} is in use: choose another with --port, or 0 for a free one"
        )

    def _failure(self, what: str) -> BrokerStartFailed:
        tail = self._folder.log_tail() or "(it is empty)"
        return BrokerStartFailed(f"{what}; the end of {self._folder.log_file}:\n{tail}")

    def _started_server(self) -> GuardedServer:
        if self._server is None:
            raise BrokerUnavailable("the embedded broker is not running: start it first")
        return self._server

    def _reachable_host(self) -> str:
        """The address to connect to: a broker that listens on all of them is on the loopback one too."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)

    def _abandon(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.abandon()
        self._folder.release()
        self._claimed = False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


_brokers: weakref.WeakSet[EmbeddedBroker] = weakref.WeakSet()


def _abandon_in_child() -> None:
    """Close what a forked child inherited: holding the lifetime pipe, it would keep a dead owner's server."""
    for broker in list(_brokers):
        broker._abandon()  # noqa: SLF001 (this module's own)


os.register_at_fork(after_in_child=_abandon_in_child)
