"""A cluster in one process: scheduler, nodes and clients on one broker in memory."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from unittest import mock

from flame.broker.memory import Faults, MemoryBroker, MemoryServer
from flame.calls import APPLICATION as FUNCTIONS
from flame.client import default
from flame.client.connection import Connection
from flame.client.session import Session
from flame.errors import ConfigurationError, ExecutorNotFound, NodeNotFound
from flame.protocol import defaults
from flame.protocol.records import ApplicationSpec
from flame.protocol.resources import Resources
from flame.protocol.subjects import check_application
from flame.service.functions import FunctionService
from flame.testing.clock import VirtualClock
from flame.testing.events import EventLog
from flame_services.scheduler.cluster import found_cluster
from flame_services.scheduler.control_api import ControlApi
from flame_services.scheduler.planner import Planner
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View
from flame_services.testing.executor import MakeService
from flame_services.testing.node import MemoryNode

SCHEDULER: Final = "memory"
COMMAND: Final = "(in the process of its test)"
"""What an application's specification says it is started by."""
NODE: Final = Resources(cpu=64, memory=2**40, gpu=8)


class MemoryCluster:
    """A cluster in this process, for testing services and clients. Nothing of it is real but the code.

    Clients are the classes of `flame`, executors run the loop that `flame.run` runs, and the scheduler decides by the
    plan of a real one; between them is a broker in memory. So what holds in a cluster holds here: common data, one
    record for each task, retries and time limits, cancellation, the modes of closing, executors that are released or
    lost. While it runs, `flame.connect`, `flame.create_session` and the like reach it from this loop, whatever
    endpoint they are given.

    Functions (`flame.functions`) run here too.

    What is different: executors share this process with the test. User code that blocks blocks all of them, unless its
    method is not ``async`` and so runs in a thread; a thread can't be killed; module state, the environment and the
    working directory are shared; nothing is forked (``on_fork`` is not called), nothing printed is captured as an
    executor's log, and resources are counted but not enforced.

    Example::

        async with MemoryCluster(clock=VirtualClock()) as cluster:
            await cluster.register(Agent, "agent", max_attempts=3)
            session = await cluster.create_session("agent", b"You said:")
            task = await session.invoke(b"hello")
            await session.close()

    Args:
        nodes: How many nodes it has, named ``node1``, ``node2`` and so on.
        clock: By which everything in this loop passes, from the start of the cluster to its end; ``None``: real time.
        faults: What may go wrong between any part and the broker.
        seed: Decides when a fault happens.
        capacity: What each node has.
        ack_wait_s: For how long a task stays with an executor that gives no sign of life.
    """

    def __init__(
        self,
        *,
        nodes: int = 1,
        clock: VirtualClock | None = None,
        faults: Faults | None = None,
        seed: int = 0,
        capacity: Resources = NODE,
        ack_wait_s: float = defaults.ACK_WAIT_S,
    ) -> None:
        """Touch nothing before `start`."""
        self.clock = clock
        self.server = MemoryServer(seed, faults=faults)
        """The broker: faults can be set there at any time, and connections interrupted."""
        self.nodes: dict[str, MemoryNode] = {}
        self._node_count = nodes
        self._capacity = capacity
        self._ack_wait_s = ack_wait_s
        self._services: dict[str, MakeService] = {FUNCTIONS: FunctionService}
        self._made: dict[str, list[object]] = {}
        self._clients: list[Connection] = []
        self._connection: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stack = AsyncExitStack()

    # ---- its life

    async def start(self) -> Self:
        """Return when it is ready: sessions can be created."""
        if self._loop is not None:
            raise ConfigurationError("MemoryCluster: it was started before; make another one")
        self._loop = asyncio.get_running_loop()
        with _moving(self.clock):
            await self._start()
        return self

    async def stop(self) -> None:
        """End everything: clients are closed, executors leave their sessions. Safe before `start`, and again."""
        with _moving(self.clock):
            await self._stack.aclose()

    async def _start(self) -> None:
        async with AsyncExitStack() as stack:
            if self.clock is not None:
                stack.enter_context(self.clock)
            folder = Path(tempfile.mkdtemp(prefix="flame-testing-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            await self._start_scheduler(stack)
            for number in range(1, self._node_count + 1):
                name = f"node{number}"
                node = MemoryNode(
                    self.server, name, self._services, self._made, folder / name, self._capacity
                )  # fmt: skip
                self.nodes[name] = node
                stack.push_async_callback(node.stop)
                await node.start()
            stack.push_async_callback(self._close_clients)
            stack.push_async_callback(self._close_default, stack.enter_context(self._taking_over()))
            self._stack = stack.pop_all()

    async def __aenter__(self) -> Self:
        """Start it."""
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it."""
        await self.stop()

    async def _start_scheduler(self, stack: AsyncExitStack) -> None:
        self.scheduler = self.server.connect("scheduler")
        stack.push_async_callback(self.scheduler.close)
        self.view = View()
        self._store = Store(self.scheduler, self.view)
        recorder = Recorder(self.scheduler, self._store, SCHEDULER)
        self._planner = Planner(self.scheduler, self.view, self._store, recorder, self._ack_wait_s)
        self._api = ControlApi(self.scheduler, self.view, self._store, recorder, SCHEDULER, 1)
        for part in (self._store, self._planner, self._api):
            stack.push_async_callback(part.stop)
        await found_cluster(self.scheduler, 1)
        await self._store.start()
        await self._api.start()
        await self._planner.start()

    async def _close_clients(self) -> None:
        for client in self._clients:
            await client.close()

    # ---- what flame.connect and the like reach

    @contextlib.contextmanager
    def _taking_over(self) -> Iterator[default._Defaults]:
        connections = default._Defaults()  # noqa: SLF001  # so that none is left of an earlier cluster on this loop
        with (
            mock.patch("flame.client.connection.connect_broker", self._connect),
            mock.patch("flame.client.default._defaults", connections),
        ):
            yield connections

    async def _connect(self, _endpoint: str, *, name: str = "flame", **_: object) -> MemoryBroker:
        self._check_loop()
        return self.server.connect(name)

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigurationError(
                "a MemoryCluster is reached from the event loop that it was started in, and from no other: of fixtures,"
                " pytest-asyncio's asyncio_default_fixture_loop_scope must be the loop_scope of the test; from another"
                " thread, or from flame.sync, use flame.testing.EmbeddedCluster"
            )

    async def _close_default(self, connections: default._Defaults) -> None:
        for opening in connections._by_loop.values():  # noqa: SLF001  # see `_taking_over`
            with contextlib.suppress(Exception):
                await (await opening).close()

    # ---- services

    async def register(self, service: Callable[[], object] | object, name: str | None = None, **spec: Any) -> str:
        """Register an application whose executors run ``service`` in this process, and return its name.

        Args:
            service: A class or a function without arguments: each executor gets an instance of its own. Of an instance
                each gets a deep copy, as each would be a fork of the process that has made it.
            name: The application's; ``None``: that of the class or function.
            spec: Any other field of `flame.ApplicationSpec`: ``max_instances``, ``timeout_s``, ``max_attempts``…

        Raises:
            ApplicationExists: The name is taken.
            InvalidArgument: A field is malformed; the text names it.
            ConfigurationError: ``service`` can't be one.
        """
        application = check_application(name or _name_of(service))
        make = _maker(service)
        fields = {"command": COMMAND, **spec}
        await self.connection.register_application(
            application, ApplicationSpec.check(f"application {application!r}", fields)
        )
        self._services[application] = make
        return application

    def services(self, application: str) -> list[Any]:
        """Return the instances that the application's executors were given so far, in order, to look into."""
        return list(self._made.get(application, ()))

    # ---- clients

    @property
    def connection(self) -> Connection:
        """A client of the cluster, always the same, closed with it."""
        if self._connection is None:
            self._connection = self.client("test")
        self._check_loop()
        return self._connection

    def client(self, name: str = "client") -> Connection:
        """Return another client of the cluster, closed with it."""
        if self._loop is None:
            raise ConfigurationError("MemoryCluster: not started; use `async with`, or await its start")
        self._check_loop()
        client = Connection(self.server.connect(name))
        self._clients.append(client)
        return client

    async def create_session(self, application: str, common_data: bytes = b"", **options: Any) -> Session:
        """Open a session by `connection`; see `flame.Connection.create_session`."""
        return await self.connection.create_session(application, common_data, **options)

    def events(self, *, session: str | None = None, application: str | None = None) -> EventLog:
        """Return a log of what happens, for assertions: ``async with cluster.events() as events:``."""
        return EventLog(self.connection, session=session, application=application)

    # ---- faults

    @property
    def executors(self) -> list[str]:
        """The names of the executors that have not ended."""
        return [executor.binding.executor for node in self.nodes.values() for executor in node.living]

    def kill_executor(self, executor: str) -> None:
        """End an executor as SIGKILL ends a process: what it was doing is cut off, and nobody hears of it any more.

        Tasks that it ran are run again elsewhere, with a higher ``context.attempt``, unless they were lost too often.
        User code sees a cancellation, which a killed process would not. Raises `ExecutorNotFound`.
        """
        for node in self.nodes.values():
            found = node.executors.get(executor)
            if found is not None and not found.released.is_set():
                found.kill()
                return
        living = ", ".join(self.executors) or "none"
        raise ExecutorNotFound(f"no executor {executor!r} lives here; these do: {living}")

    async def lose_node(self, name: str) -> None:
        """End a node with all its executors, without a word to anybody. Raises `NodeNotFound`."""
        node = self.nodes.get(name)
        if node is None:
            raise NodeNotFound(f"no node {name!r}; there are {', '.join(self.nodes)}")
        self.server.interrupt(node.broker)
        await node.lose()


@contextlib.contextmanager
def _moving(clock: VirtualClock | None) -> Iterator[None]:
    """Have time pass by itself, also where a test has stopped its clock."""
    if clock is None:
        yield
        return
    auto, clock.auto = clock.auto, True
    try:
        yield
    finally:
        clock.auto = auto


def _name_of(service: object) -> str:
    named = service if hasattr(service, "__name__") else type(service)
    return str(getattr(named, "__name__", "service")).strip("<>")


def _maker(service: Callable[[], object] | object) -> MakeService:
    """Return what makes an executor's own instance."""
    if isinstance(service, type):
        if not callable(getattr(service, "on_task_invoke", None)):
            raise ConfigurationError(
                f"register: {service.__name__} has no on_task_invoke; expected the class of a FlameService, an instance"
                " of it, or a function that makes one"
            )
        return service
    if callable(getattr(service, "on_task_invoke", None)):
        return lambda: copy.deepcopy(service)
    if callable(service):
        return service
    raise ConfigurationError(
        f"register: got {type(service).__name__}; expected the class of a FlameService, an instance of it, or a"
        " function that makes one"
    )
