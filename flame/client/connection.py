"""A connection to a cluster: applications, sessions, executors and nodes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack
from weakref import WeakSet

from flame.broker.jetstream import connect as connect_broker
from flame.broker.seam import Broker
from flame.client.asking import ControlClient
from flame.client.common_data import for_opening, store_common_data, with_stored_data
from flame.client.events import ClusterEvents
from flame.client.home import NOWHERE, check_loop, runner_of
from flame.client.ids import TaskIds
from flame.client.listing import list_tasks
from flame.client.logs import LogLine, read_logs
from flame.client.session import Session
from flame.client.spec import SessionSpec, check_common_data
from flame.client.task import Task
from flame.config import resolve_target
from flame.credentials import GivenSecrets
from flame.errors import BrokerUnavailable, InvalidArgument, SessionExists, Unavailable
from flame.protocol import defaults, subjects
from flame.protocol.api import (
    LOOK_UP_LIMIT,
    ApplicationPage,
    CancelTasks,
    CloseSession,
    CreateSession,
    ExecutorPage,
    Info,
    List,
    ListExecutors,
    ListSessions,
    Named,
    NodeInfo,
    NodePage,
    OpenSession,
    RegisterApplication,
    Request,
    SessionInfo,
    SessionPage,
    TaskCancels,
    UnregisterApplication,
    UpdateApplication,
    UpdateCommonData,
    Verb,
)
from flame.protocol.ids import mint_session_id
from flame.protocol.records import ApplicationRecord, ApplicationSpec, ExecutorRecord, Record, SessionRecord
from flame.protocol.states import CloseMode, SessionState, TaskState
from flame.protocol.subjects import check_application, check_token

if TYPE_CHECKING:
    from flame.calls.session import FunctionOptions, FunctionSession

R = TypeVar("R", bound=Record)

_MINT_ATTEMPTS: Final = 8


async def connect(
    endpoint: str | None = None, *, name: str = "flame-client", timeout_s: float = defaults.CONNECT_TIMEOUT_S
) -> Connection:
    """Connect to a cluster.

    Args:
        endpoint: ``nats://host:port[,…]``; ``None`` takes ``FLAME_ENDPOINT``, otherwise the current context of the file
            that ``FLAME_CONFIG`` names or of ``~/.flame/flame.yaml``, otherwise ``nats://127.0.0.1:4222``.
        name: Shown to whoever lists the broker's connections.
        timeout_s: How long to try.

    Raises:
        ConfigurationError: The endpoint is malformed, or a file of the configuration; the text says what and where.
        BrokerUnavailable: Nothing answers there, or no NATS server with JetStream.
    """
    endpoint, security = resolve_target(endpoint)
    return Connection(await connect_broker(endpoint, name=name, timeout_s=timeout_s, security=security))


class Connection:
    """A connection to a cluster. Made by `connect`; belongs to the event loop it was made in."""

    def __init__(self, broker: Broker) -> None:
        """Use a connected broker; `close` closes it."""
        self.broker = broker
        """The seam to the broker."""
        self.task_ids = TaskIds()
        """Mints the ids of this client's tasks."""
        self._control = ControlClient(broker)
        self._sessions: set[Session] = set()
        self._events: WeakSet[ClusterEvents] = WeakSet()
        """Those that somebody still iterates over."""
        self.open_in: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        """The event loop that it belongs to; ``None`` when it is closed."""
        self.runner = runner_of(self.open_in)
        """Whose ``_thread_id`` is that of the one thread in which it may be used."""
        self.keep_alive: object = None
        """Something that lives as long as the connection."""
        self._forget_reconnect = broker.on_reconnect(self._reconnected)

    @property
    def closed(self) -> bool:
        """Whether it was closed: nothing can be asked or heard any more."""
        return self.open_in is None

    @property
    def endpoint(self) -> str:
        """Where the broker is, without credentials."""
        return self.broker.endpoint

    async def close(self) -> None:
        """Close the connection. Sessions stay open in the cluster; what waits here for tasks gets an error."""
        if self.open_in is None:
            return
        check_loop(f"the connection to {self.endpoint}", self.open_in)
        self.open_in, self.runner = None, NOWHERE
        self._control.close()
        self._forget_reconnect()
        for events in tuple(self._events):
            events.fail(BrokerUnavailable("the connection was closed: nothing more can be heard"))
        for session in tuple(self._sessions):
            await session.abandon(
                BrokerUnavailable("the connection was closed while the task was outstanding; it goes on")
            )
        await self.broker.close()

    async def __aenter__(self) -> Self:
        """Return the connection."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        await self.close()

    # ---- sessions

    async def create_session(  # noqa: PLR0913  # each is something to say of a session
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
        """Open a new session; see `SessionSpec` for the arguments.

        Raises:
            ApplicationNotFound: No such application is registered.
            ApplicationDisabled: It takes no new sessions, see `disable_application`.
            SessionExists: ``session_id`` is taken, or was and its results have not aged out.
            InvalidArgument: A value is malformed or out of range.
            SchedulerUnavailable: No scheduler answers.
        """
        spec = SessionSpec(
            application=application,
            common_data=common_data,
            min_instances=min_instances,
            max_instances=max_instances,
            priority=priority,
            resources=resources,
            labels=labels or {},
            weight=weight,
            idle_timeout_s=idle_timeout_s,
            credentials=credentials or {},
            delegations=delegations or {},
        )
        request = spec.request(session_id)
        for attempt in range(1, _MINT_ATTEMPTS + 1):
            wanted = request.model_copy(update={"id": session_id or mint_session_id(application)})
            try:
                return await self._hold(await self._create(await with_stored_data(self.broker, wanted)))
            except SessionExists:
                if session_id is not None or attempt == _MINT_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def functions(self, **options: Unpack[FunctionOptions]) -> FunctionSession:
        """Return a session whose tasks are calls of this program's own functions; see `flame.functions`."""
        from flame.calls.session import FunctionSession  # noqa: PLC0415  # for those who use it

        return FunctionSession(self, options)

    async def open_session(self, session_id: str, spec: SessionSpec | None = None) -> Session:
        """Return an open session; one that doesn't exist is created if ``spec`` says how.

        Raises:
            SessionNotFound: It doesn't exist and ``spec`` is ``None``.
            SessionNotOpen: It has ended; `SessionFailed` if it failed.
            SpecMismatch: It is open with another specification than ``spec``.
        """
        check_token("session", session_id)
        find = partial(self.call, Verb.OPEN_SESSION, OpenSession(id=session_id), SessionRecord)
        create = await for_opening(self.broker, find, None if spec is None else spec.request(session_id))
        return await self._hold(
            await self.call(Verb.OPEN_SESSION, OpenSession(id=session_id, create=create), SessionRecord)
        )

    async def close_session(self, session_id: str, *, mode: CloseMode | str = CloseMode.CLOSE) -> None:
        """Ask for a session's end and return at once; see `Session.close` for ``mode``.

        Raises:
            SessionNotFound: It doesn't exist.
            InvalidArgument: ``mode`` is none.
        """
        await self.request_close(session_id, mode)

    async def update_common_data(self, session_id: str, data: bytes, *, expected_version: int | None = None) -> int:
        """Give a session other common data; see `Session.update_common_data`. Raises `SessionNotFound`."""
        ref = None
        if len(check_common_data(data)) > defaults.INLINE_LIMIT_BYTES:
            application = (await self.get_session_record(check_token("session", session_id))).application
            ref, data = await store_common_data(self.broker, application, session_id, data), b""
        fields = {
            "session": check_token("session", session_id),
            "data": data,
            "data_ref": ref,
            "expected_version": expected_version,
            "token": secrets.token_hex(8),
        }
        request = UpdateCommonData.check("update_common_data", fields)
        return (await self.call(Verb.UPDATE_COMMON_DATA, request, SessionRecord)).common_data_version

    async def cancel_tasks(self, session_id: str, tasks: Iterable[str], reason: str = "") -> dict[str, TaskState]:
        """Give tasks of a session up by their ids; see `Session.cancel_tasks`. Raises `SessionNotFound`."""
        check_token("session", session_id)
        if isinstance(tasks, str | bytes):
            raise InvalidArgument(f"tasks: expected a list of ids, got {tasks!r:.60}: put it into a list")
        ids = [check_token("task", task) for task in tasks]
        states: dict[str, TaskState] = {}
        for begin in range(0, len(ids), LOOK_UP_LIMIT):
            fields = {"session": session_id, "tasks": ids[begin : begin + LOOK_UP_LIMIT], "reason": reason}
            request = CancelTasks.check("cancel_tasks", fields)
            states |= (await self.call(Verb.CANCEL_TASKS, request, TaskCancels)).states
        return states

    async def get_session(self, session_id: str) -> SessionInfo:
        """Return a session with the counts of its tasks. Raises `SessionNotFound`."""
        return await self.call(Verb.GET_SESSION, Named(name=check_token("session", session_id)), SessionInfo)

    async def list_sessions(
        self,
        *,
        application: str | None = None,
        state: SessionState | str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> list[SessionInfo]:
        """Return the sessions that are known, those that have ended within the last day included, ordered by id.

        Args:
            application: Only those of this application, which need not exist.
            state: Only those in this state: ``open``, ``closing``, ``closed`` or ``failed``.
            labels: Only those that have each of these labels with this value.

        Raises:
            InvalidArgument: One of them can't be.
        """
        filters = {"application": application, "state": state, "labels": dict(labels or {})}
        if application is not None:
            check_application(application)
        request = ListSessions.check("list_sessions", filters)
        return await self._control.list_all(Verb.LIST_SESSIONS, request, SessionPage, lambda item: item.session.id)

    async def list_tasks(self, session_id: str, *, after: str = "", limit: int = 100) -> list[Task]:
        """Return tasks of a session, which may have ended; see `Session.list_tasks`. Raises `SessionNotFound`."""
        record = await self.get_session_record(session_id)
        return await list_tasks(self, record.application, session_id, after=after, limit=limit)

    # ---- applications

    async def register_application(self, name: str, spec: ApplicationSpec | dict[str, Any]) -> None:
        """Register an application.

        Args:
            name: At most 48 letters, digits, ``_`` and ``-``.
            spec: What it is; a map is checked as `ApplicationSpec`.

        Raises:
            ApplicationExists: The name is taken.
            InvalidArgument: The name or a field is malformed; the text names every wrong field.
        """
        check_application(name)
        if not isinstance(spec, ApplicationSpec):
            spec = ApplicationSpec.check(f"application {name!r}", spec)
        await self.call(Verb.REGISTER_APPLICATION, RegisterApplication(name=name, spec=spec), ApplicationRecord)

    async def update_application(self, name: str, spec: ApplicationSpec | dict[str, Any]) -> ApplicationRecord:
        """Give an application another specification as a whole: what ``spec`` leaves out has its default again.

        Executors that run are left alone. Every executor that starts from now on is started by the new specification,
        also those of sessions that are open. What concerns a session rather than a process counts for open sessions at
        once: ``delay_release_s``, ``session_retry_limit``, ``min_instances`` and ``max_instances``. If fewer
        executors are allowed than a session has, the idle ones leave and the busy ones stay until they are; if more
        are, a session that is being served gets them when it is served anew. An application that is disabled stays so.

        Raises:
            ApplicationNotFound: It isn't registered.
            InvalidArgument: A field is malformed; the text names every wrong field.
        """
        check_application(name)
        if not isinstance(spec, ApplicationSpec):
            spec = ApplicationSpec.check(f"application {name!r}", spec)
        return await self.call(Verb.UPDATE_APPLICATION, UpdateApplication(name=name, spec=spec), ApplicationRecord)

    async def disable_application(self, name: str) -> ApplicationRecord:
        """Let an application take no new sessions. Those that it has go on, and can be opened. Idempotent.

        Raises:
            ApplicationNotFound: It isn't registered.
        """
        return await self.call(Verb.DISABLE_APPLICATION, Named(name=check_application(name)), ApplicationRecord)

    async def enable_application(self, name: str) -> ApplicationRecord:
        """Let an application that was disabled take new sessions again. Idempotent.

        Raises:
            ApplicationNotFound: It isn't registered.
        """
        return await self.call(Verb.ENABLE_APPLICATION, Named(name=check_application(name)), ApplicationRecord)

    async def unregister_application(self, name: str, *, force: bool = False) -> None:
        """Remove an application with its waiting tasks and results.

        Raises:
            ApplicationNotFound: It isn't registered.
            ApplicationInUse: It has sessions that have not ended, and not ``force``.
        """
        request = UnregisterApplication(name=check_application(name), force=force)
        await self._control.ask(Verb.UNREGISTER_APPLICATION, request)

    async def get_application(self, name: str) -> ApplicationRecord:
        """Return an application. Raises `ApplicationNotFound`."""
        return await self.call(Verb.GET_APPLICATION, Named(name=check_application(name)), ApplicationRecord)

    async def list_applications(self) -> list[ApplicationRecord]:
        """Return every application, ordered by name."""
        return await self._control.list_all(Verb.LIST_APPLICATIONS, List(), ApplicationPage, lambda item: item.name)

    # ---- the cluster

    async def info(self) -> Info:
        """Return what the cluster is."""
        return await self.call(Verb.INFO, Request(), Info)

    async def get_executor(self, executor_id: str) -> ExecutorRecord:
        """Return an executor. Raises `ExecutorNotFound`."""
        return await self.call(Verb.GET_EXECUTOR, Named(name=check_token("executor", executor_id)), ExecutorRecord)

    async def list_executors(self, *, session: str | None = None, node: str | None = None) -> list[ExecutorRecord]:
        """Return the executors, ordered by node and id: all, or only those of a session, on a node, or both."""
        for what, name in (("session", session), ("node", node)):
            if name is not None:
                check_token(what, name)
        request = ListExecutors(session=session, node=node)
        return await self._control.list_all(
            Verb.LIST_EXECUTORS, request, ExecutorPage, lambda item: subjects.executor_key(item.node, item.id)
        )

    async def get_node(self, name: str) -> NodeInfo:
        """Return a node. Raises `NodeNotFound`."""
        return await self.call(Verb.GET_NODE, Named(name=check_token("node", name)), NodeInfo)

    async def list_nodes(self) -> list[NodeInfo]:
        """Return every node, ordered by name."""
        return await self._control.list_all(Verb.LIST_NODES, List(), NodePage, lambda item: item.name)

    async def read_logs(
        self, *, session: str | None = None, executor: str | None = None, follow: bool = False, tail: int | None = None
    ) -> AsyncGenerator[LogLine, None]:
        """Read what a session's services wrote to their standard output and error, in the order it was kept in.

        Output is kept for a day and up to 256 MiB an application, older output goes first; it arrives within a second
        of being written. Use ``async with contextlib.aclosing(...)`` to leave early.

        Args:
            session: Of all executors of this session, which may have ended.
            executor: Of this executor only, which may have ended.
            follow: Go on with what is written from now on, also across reconnects, until the session has ended (with
                ``executor``, until that has) and everything was told.
            tail: Begin with the last so many lines; ``None``: with the oldest there is.

        Raises:
            SessionNotFound: There is no such session.
            ExecutorNotFound: There is no such executor, and nothing that it wrote.
            ApplicationNotFound: The application was unregistered, and its output is gone.
            InvalidArgument: Neither a session nor an executor is given, or ``tail`` is negative.
        """
        async with aclosing(read_logs(self, session=session, executor=executor, follow=follow, tail=tail)) as lines:
            async for line in lines:
                yield line

    def events(
        self, *, session: str | None = None, application: str | None = None, tasks: bool = False
    ) -> ClusterEvents:
        """Follow what happens in the cluster from now on: an asynchronous iterator of `ClusterEvent`.

        Each change of state of an application, a session, an executor or a node comes once, with its reason; and of a
        session also what it waits for (``waiting``) and that an executor failed to enter it (``retrying``). It ends
        only with the connection, by `BrokerUnavailable`. What happens while the connection is interrupted is not told,
        and events wait in memory until they are taken. Use ``async with connection.events() as events:`` to listen from
        a certain moment on, and to leave early.

        Args:
            session: Only that session and its executors.
            application: Only that application, its sessions and their executors.
            tasks: Also that tasks run, if they do for 100 ms or somebody waits to hear it, and their ends.

        Raises:
            SessionNotFound: At the first step or on entry: there is no such session.
            ApplicationNotFound: The same of the application.
            InvalidArgument: A name can't be one, or the session is not one of the application.
        """
        events = ClusterEvents(self, session, application, tasks=tasks)
        self._events.add(events)
        return events

    # ---- for sessions

    def check_usable(self) -> None:
        """Raise `BrokerUnavailable` if it is closed, and `WrongThread` anywhere but in its event loop."""
        if self.open_in is None:
            raise BrokerUnavailable("the connection is closed; make another")
        check_loop(f"the connection to {self.endpoint}", self.open_in)

    async def call(self, verb: Verb, request: Request, answer: type[R]) -> R:
        """Ask a scheduler; its refusals are raised as the exceptions they stand for."""
        return await self._control.call(verb, request, answer)

    async def request_close(self, session_id: str, mode: CloseMode | str = CloseMode.CLOSE) -> SessionRecord:
        """Ask for a session's end and return what it is now."""
        check_token("session", session_id)
        request = CloseSession.check("close_session", {"id": session_id, "mode": mode})
        return await self.call(Verb.CLOSE_SESSION, request, SessionRecord)

    async def get_session_record(self, session_id: str) -> SessionRecord:
        """Return a session's record as the scheduler has it."""
        return (await self.get_session(session_id)).session

    def forget(self, session: Session) -> None:
        """Drop a session that is not listened to any more."""
        self._sessions.discard(session)

    async def _create(self, request: CreateSession) -> SessionRecord:
        """Create a session whose id is chosen; when the answer is lost, find out whether that was carried out."""
        try:
            return await self.call(Verb.CREATE_SESSION, request, SessionRecord)
        except Unavailable:
            assert request.id is not None
            return await self.call(Verb.OPEN_SESSION, OpenSession(id=request.id, create=request), SessionRecord)

    async def _hold(self, record: SessionRecord) -> Session:
        session = Session(self, record)
        await session.listen()
        self._sessions.add(session)
        return session

    def _reconnected(self) -> None:
        for session in tuple(self._sessions):
            session.reconcile_now()
