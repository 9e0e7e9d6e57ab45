"""A connection to a cluster, used synchronously."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from flame.client.connection import Connection as AsyncConnection
from flame.client.connection import connect as connect_async
from flame.client.logs import LogLine
from flame.client.session import Session as AsyncSession
from flame.client.spec import SessionSpec
from flame.client.task import Task
from flame.credentials import GivenSecrets
from flame.protocol import defaults
from flame.protocol.api import Info, NodeInfo, SessionInfo
from flame.protocol.events import ClusterEvent
from flame.protocol.records import ApplicationRecord, ApplicationSpec, ExecutorRecord
from flame.protocol.states import CloseMode, SessionState, TaskState
from flame.sync.background import Background, background
from flame.sync.iterators import BlockingIterator
from flame.sync.session import Session, listed

if TYPE_CHECKING:
    from flame.calls.session import FunctionOptions
    from flame.sync.calls import FunctionSession

T = TypeVar("T")


def connect(
    endpoint: str | None = None, *, name: str = "flame-client", timeout_s: float = defaults.CONNECT_TIMEOUT_S
) -> Connection:
    """Connect to a cluster; see `flame.connect`."""
    here = background()

    async def connected() -> AsyncConnection:
        connection = await connect_async(endpoint, name=name, timeout_s=timeout_s)
        here.keep(connection)
        return connection

    return Connection(here, here.run(connected()))


class Connection:
    """A connection to a cluster. Made by `connect`; may be used by several threads at once.

    What the methods mean, take and raise is said in full at those of the same names of `flame.Connection`.
    """

    def __init__(self, background: Background, connection: AsyncConnection) -> None:
        """Made by `connect`."""
        self._background = background
        self._connection = connection

    @property
    def closed(self) -> bool:
        """Whether it was closed: nothing can be asked or heard any more."""
        return self._background.ended or self._connection.closed

    @property
    def endpoint(self) -> str:
        """Where the broker is, without credentials."""
        return self._connection.endpoint

    def close(self) -> None:
        """Close the connection; see `flame.Connection.close`. One that isn't is closed when the program ends."""
        if not self._background.ended:
            self._run(self._close())

    async def _close(self) -> None:
        self._background.forget(self._connection)
        await self._connection.close()

    def __enter__(self) -> Self:
        """Return the connection."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    # ---- sessions

    def create_session(  # noqa: PLR0913  # each is something to say of a session
        self,
        application: str,
        common_data: bytes = b"",
        *,
        session_id: str | None = None,
        min_instances: int | None = None,
        max_instances: int | None = None,
        priority: int = defaults.PRIORITY,
        resources: str | None = None,
        labels: Mapping[str, str] | None = None,
        weight: float | None = None,
        idle_timeout_s: float | None = None,
        credentials: GivenSecrets | None = None,
        delegations: GivenSecrets | None = None,
    ) -> Session:
        """Open a new session; see `flame.Connection.create_session`."""
        return self._session(
            self._connection.create_session(
                application,
                common_data,
                session_id=session_id,
                min_instances=min_instances,
                max_instances=max_instances,
                priority=priority,
                resources=resources,
                labels=labels,
                weight=weight,
                idle_timeout_s=idle_timeout_s,
                credentials=credentials,
                delegations=delegations,
            )
        )

    def functions(self, **options: Unpack[FunctionOptions]) -> FunctionSession:
        """Return a session whose tasks are calls of this program's own functions; see `flame.Connection.functions`."""
        from flame.sync.calls import FunctionSession  # noqa: PLC0415  # for those who use it

        return FunctionSession(self._background, self._connection.functions(**options))

    def open_session(self, session_id: str, spec: SessionSpec | None = None) -> Session:
        """Return an open session, created if ``spec`` says how; see `flame.Connection.open_session`."""
        return self._session(self._connection.open_session(session_id, spec))

    def close_session(self, session_id: str, *, mode: CloseMode | str = CloseMode.CLOSE) -> None:
        """Ask for a session's end and return at once; see `flame.Connection.close_session`."""
        self._run(self._connection.close_session(session_id, mode=mode))

    def update_common_data(self, session_id: str, data: bytes, *, expected_version: int | None = None) -> int:
        """Give a session other common data; see `flame.Connection.update_common_data`."""
        return self._run(self._connection.update_common_data(session_id, data, expected_version=expected_version))

    def cancel_tasks(self, session_id: str, tasks: Iterable[str], reason: str = "") -> dict[str, TaskState]:
        """Give tasks of a session up by their ids; see `flame.Connection.cancel_tasks`."""
        return self._run(self._connection.cancel_tasks(session_id, listed(tasks), reason))

    def get_session(self, session_id: str) -> SessionInfo:
        """Return a session with the counts of its tasks; see `flame.Connection.get_session`."""
        return self._run(self._connection.get_session(session_id))

    def list_sessions(
        self,
        *,
        application: str | None = None,
        state: SessionState | str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> list[SessionInfo]:
        """Return the sessions that are known, ordered by id; see `flame.Connection.list_sessions`."""
        return self._run(self._connection.list_sessions(application=application, state=state, labels=labels))

    def list_tasks(self, session_id: str, *, after: str = "", limit: int = 100) -> list[Task]:
        """Return tasks of a session, which may have ended; see `flame.Connection.list_tasks`."""
        return self._run(self._connection.list_tasks(session_id, after=after, limit=limit))

    # ---- applications

    def register_application(self, name: str, spec: ApplicationSpec | dict[str, Any]) -> None:
        """Register an application; see `flame.Connection.register_application`."""
        self._run(self._connection.register_application(name, spec))

    def update_application(self, name: str, spec: ApplicationSpec | dict[str, Any]) -> ApplicationRecord:
        """Give an application another specification as a whole; see `flame.Connection.update_application`."""
        return self._run(self._connection.update_application(name, spec))

    def disable_application(self, name: str) -> ApplicationRecord:
        """Let an application take no new sessions; see `flame.Connection.disable_application`."""
        return self._run(self._connection.disable_application(name))

    def enable_application(self, name: str) -> ApplicationRecord:
        """Let an application take new sessions again; see `flame.Connection.enable_application`."""
        return self._run(self._connection.enable_application(name))

    def unregister_application(self, name: str, *, force: bool = False) -> None:
        """Remove an application with its waiting tasks and results; see `flame.Connection.unregister_application`."""
        self._run(self._connection.unregister_application(name, force=force))

    def get_application(self, name: str) -> ApplicationRecord:
        """Return an application; see `flame.Connection.get_application`."""
        return self._run(self._connection.get_application(name))

    def list_applications(self) -> list[ApplicationRecord]:
        """Return every application, ordered by name; see `flame.Connection.list_applications`."""
        return self._run(self._connection.list_applications())

    # ---- the cluster

    def info(self) -> Info:
        """Return what the cluster is; see `flame.Connection.info`."""
        return self._run(self._connection.info())

    def get_executor(self, executor_id: str) -> ExecutorRecord:
        """Return an executor; see `flame.Connection.get_executor`."""
        return self._run(self._connection.get_executor(executor_id))

    def list_executors(self, *, session: str | None = None, node: str | None = None) -> list[ExecutorRecord]:
        """Return the executors, ordered by node and id; see `flame.Connection.list_executors`."""
        return self._run(self._connection.list_executors(session=session, node=node))

    def get_node(self, name: str) -> NodeInfo:
        """Return a node; see `flame.Connection.get_node`."""
        return self._run(self._connection.get_node(name))

    def list_nodes(self) -> list[NodeInfo]:
        """Return every node, ordered by name; see `flame.Connection.list_nodes`."""
        return self._run(self._connection.list_nodes())

    def read_logs(
        self, *, session: str | None = None, executor: str | None = None, follow: bool = False, tail: int | None = None
    ) -> BlockingIterator[LogLine]:
        """Read what a session's services wrote to their standard output and error; see `flame.Connection.read_logs`."""
        read = partial(self._connection.read_logs, session=session, executor=executor, follow=follow, tail=tail)
        return BlockingIterator(self._background, read)

    def events(
        self, *, session: str | None = None, application: str | None = None, tasks: bool = False
    ) -> BlockingIterator[ClusterEvent]:
        """Follow what happens in the cluster from now on; see `flame.Connection.events`.

        Use ``with connection.events() as events:`` to listen from a certain moment on, and to leave early.
        """
        follow = partial(self._connection.events, session=session, application=application, tasks=tasks)
        return BlockingIterator(self._background, follow)

    # ---- how

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._background.run(coroutine)

    def _session(self, coroutine: Coroutine[Any, Any, AsyncSession]) -> Session:
        return Session(self._background, self._run(coroutine))
