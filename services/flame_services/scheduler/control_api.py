"""The control API: what clients may ask of a scheduler, any scheduler."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

from flame.broker.errors import RevisionConflict, StreamFull, StreamMissing
from flame.broker.seam import Broker, Subscription
from flame.errors import (
    ApplicationDisabled,
    ApplicationExists,
    ApplicationInUse,
    ApplicationNotFound,
    ExecutorNotFound,
    FlameError,
    InternalError,
    MalformedMessage,
    NodeNotFound,
    PayloadTooLarge,
    SessionExists,
    SessionFailed,
    SessionNotFound,
    SessionNotOpen,
    SpecMismatch,
    Unavailable,
)
from flame.logs import get_logger
from flame.protocol import defaults, subjects, topology
from flame.protocol.api import (
    ApplicationPage,
    CloseSession,
    CreateSession,
    ExecutorPage,
    Info,
    List,
    ListExecutors,
    ListSessions,
    ListTasks,
    LookUpTasks,
    Named,
    NodeInfo,
    NodePage,
    OpenSession,
    RegisterApplication,
    Request,
    SessionInfo,
    SessionPage,
    TaskInfo,
    TaskLooks,
    TaskPage,
    UnregisterApplication,
    UpdateApplication,
    Verb,
    answer_error,
    answer_ok,
)
from flame.protocol.codec import unpack
from flame.protocol.messages import ResultRecord
from flame.protocol.records import ApplicationRecord, ExecutorRecord, Record, SessionRecord
from flame.protocol.states import (
    APPLICATION,
    SESSION,
    ApplicationEvent,
    ApplicationState,
    SessionEvent,
    SessionState,
    TaskState,
)
from flame.protocol.subjects import check_application, check_token
from flame.version import __version__
from flame_services.scheduler.counts import count_tasks
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import Session, View

log = get_logger("flame.scheduler")

T = TypeVar("T")

_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_MINT_ATTEMPTS: Final = 8
_LARGEST_ANSWER: Final = defaults.MAX_PAYLOAD_BYTES - 4096
"""In bytes; the headers of the message need some too."""
_ANSWER_BYTES: Final = defaults.MAX_PAYLOAD_BYTES - 2 * defaults.INLINE_LIMIT_BYTES
"""Of results in one answer, at most; the rest is for what says whose they are."""
_FEW: Final = 4
"""Up to so many tasks are looked up one by one."""
_FORCE_WAIT_S: Final = 8.0
"""How long a forced unregistration waits for its sessions to end: less than a client waits for an answer."""


class ControlApi:
    """Answers requests from the view, and carries changes out on the buckets."""

    def __init__(self, broker: Broker, view: View, store: Store, name: str, replicas: int) -> None:
        """Serve as the scheduler ``name``."""
        self._broker = broker
        self._view = view
        self._store = store
        self._name = name
        self._replicas = replicas
        self._service: Subscription | None = None

    async def start(self) -> None:
        """Begin to answer."""
        verbs: dict[Verb, tuple[type[Request], Callable[[Any], Awaitable[Record | None]]]] = {
            Verb.INFO: (Request, self._info),
            Verb.REGISTER_APPLICATION: (RegisterApplication, self._register_application),
            Verb.UPDATE_APPLICATION: (UpdateApplication, self._update_application),
            Verb.UNREGISTER_APPLICATION: (UnregisterApplication, self._unregister_application),
            Verb.GET_APPLICATION: (Named, self._get_application),
            Verb.LIST_APPLICATIONS: (List, self._list_applications),
            Verb.CREATE_SESSION: (CreateSession, self._create_session),
            Verb.OPEN_SESSION: (OpenSession, self._open_session),
            Verb.GET_SESSION: (Named, self._get_session),
            Verb.LIST_SESSIONS: (ListSessions, self._list_sessions),
            Verb.CLOSE_SESSION: (CloseSession, self._close_session),
            Verb.GET_EXECUTOR: (Named, self._get_executor),
            Verb.LIST_EXECUTORS: (ListExecutors, self._list_executors),
            Verb.GET_NODE: (Named, self._get_node),
            Verb.LIST_NODES: (List, self._list_nodes),
            Verb.LIST_TASKS: (ListTasks, self._list_tasks),
            Verb.LOOK_UP_TASKS: (LookUpTasks, self._look_up_tasks),
        }
        handlers = {verb.value: _handler(verb, *what) for verb, what in verbs.items()}
        self._service = await self._broker.serve(subjects.API_SERVICE, __version__, subjects.API_PREFIX, handlers)

    async def stop(self) -> None:
        """Answer no more."""
        service, self._service = self._service, None
        if service is not None:
            await service.stop()

    async def _info(self, _request: Request) -> Info:
        ready = sum(1 for node in self._view.nodes.values() if node.takes)
        return Info(version=__version__, scheduler=self._name, nodes=ready)

    # ---- applications

    async def _register_application(self, request: RegisterApplication) -> ApplicationRecord:
        name = check_application(request.name)
        if await self._store.applications.get(name) is not None:
            raise ApplicationExists(f"application {name} is registered already; unregister it first")
        # Streams first: nothing may be asked of an application before it can be kept.
        for spec in topology.application_streams(name, self._replicas):
            try:
                await self._broker.ensure_stream(spec)
            except StreamFull as error:
                raise Unavailable(
                    f"application {name}: the broker has no room for its streams ({error});"
                    " raise max_file_store in its jetstream block"
                ) from error
        record = ApplicationRecord(name=name, spec=request.spec, created=time.time())
        try:
            await self._store.applications.create(name, record)
        except RevisionConflict:
            raise ApplicationExists(f"application {name} is registered already; unregister it first") from None
        log.info("application registered", application=name)
        return record

    async def _update_application(self, request: UpdateApplication) -> ApplicationRecord:
        name = check_application(request.name)

        def update(record: ApplicationRecord) -> ApplicationRecord | None:
            return None if record.spec == request.spec else record.changed(spec=request.spec, updated=time.time())

        record = await self._store.applications.change(name, update)
        if record is None:
            raise _no_application(name)
        log.info("application updated", application=name)
        return record

    async def _unregister_application(self, request: UnregisterApplication) -> None:
        name = check_application(request.name)
        record = await self._application(name)
        living = self._living(name)
        if living and not request.force:
            raise ApplicationInUse(
                f"application {name} has {len(living)} open session(s), such as {living[0].id}; close them or force it"
            )
        if record.state is ApplicationState.ENABLED:
            await self._store.applications.change(
                name, lambda r: r.changed(state=APPLICATION.next(r.state, ApplicationEvent.DISABLE))
            )
        for session in living:
            await self._begin_close(session.id)
        deadline = asyncio.get_running_loop().time() + _FORCE_WAIT_S
        while self._living(name):
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable(f"application {name} takes no more sessions; some are still ending: ask again")
            await asyncio.sleep(0.05)
        await self._store.applications.delete(name)
        for spec in topology.application_streams(name):
            await self._broker.delete_stream(spec.name)
        log.info("application unregistered", application=name)

    def _living(self, application: str) -> list[Session]:
        sessions = self._view.sessions.values()
        return [s for s in sessions if s.record.application == application and (not s.record.settled or s.bindings)]

    async def _get_application(self, request: Named) -> ApplicationRecord:
        return await self._application(request.name)

    async def _application(self, name: str) -> ApplicationRecord:
        known = self._view.applications.get(check_application(name))
        if known is not None:
            return known
        found = await self._store.applications.get(name)
        if found is None:
            raise _no_application(name)
        return found[0]

    async def _list_applications(self, request: List) -> ApplicationPage:
        names, more = _page(self._view.applications, request)
        return ApplicationPage(items=tuple(self._view.applications[name] for name in names), more=more)

    # ---- sessions

    async def _create_session(self, request: CreateSession) -> SessionRecord:
        application = await self._application(request.application)
        if application.state is not ApplicationState.ENABLED:
            raise ApplicationDisabled(f"application {application.name} is disabled: it takes no new sessions")
        if len(request.common_data) > defaults.INLINE_LIMIT_BYTES:
            raise PayloadTooLarge(
                f"common_data of {len(request.common_data)} bytes: the limit is {defaults.INLINE_LIMIT_BYTES}"
            )
        if request.id is not None:
            check_token("session", request.id)
        key = await self._keep_common_data(request)
        for _ in range(1 if request.id is not None else _MINT_ATTEMPTS):
            session_id = request.id or _mint(application.name)
            record = SessionRecord(
                id=session_id,
                application=application.name,
                options=request.options,
                created=time.time(),
                common_data_key=key,
            )
            try:
                await self._store.sessions.create(session_id, record)
            except RevisionConflict:
                continue
            return record
        if key:
            await self._store.common_data.delete(key)
        raise SessionExists(
            f"session {request.id} exists, or did and its results have not aged out; open it, or choose another id"
        )

    async def _keep_common_data(self, request: CreateSession) -> str:
        """Keep common data under a key of its own, before the session that names it can be seen."""
        if not request.common_data:
            return ""
        key = subjects.common_data_key(request.application, secrets.token_hex(8))
        await self._store.common_data.create(key, request.common_data)
        return key

    async def _open_session(self, request: OpenSession) -> SessionRecord:
        check_token("session", request.id)
        found = await self._store.sessions.get(request.id)
        if found is None:
            if request.create is None:
                raise SessionNotFound(f"session {request.id} is not known; `flmctl list -s` shows those that are")
            try:
                return await self._create_session(request.create.model_copy(update={"id": request.id}))
            except SessionExists:  # somebody else was quicker
                found = await self._store.sessions.get(request.id)
                if found is None:
                    raise  # it exists, but can't be read
        record = found[0]
        _check_open(record)
        if request.create is not None:
            await self._check_same(record, request.create)
        return record

    async def _check_same(self, record: SessionRecord, wanted: CreateSession) -> None:
        differs = []
        if wanted.application != record.application:
            differs.append(f"application is {record.application}, not {wanted.application}")
        have = record.options.model_dump()
        want = wanted.options.model_dump()
        differs.extend(f"{name} is {have[name]}, not {want[name]}" for name in have if have[name] != want[name])
        if not differs:
            kept = await self._store.common_data.get(record.common_data_key) if record.common_data_key else None
            if (kept.value if kept is not None else b"") != wanted.common_data:
                differs.append("common_data is another")
        if differs:
            raise SpecMismatch(f"session {record.id} is open with another specification: {'; '.join(differs)}")

    async def _get_session(self, request: Named) -> SessionInfo:
        session = await self._session(request.name)
        return (await count_tasks(self._broker, self._view, [session]))[0]

    async def _session(self, session_id: str) -> Session:
        known = self._view.sessions.get(check_token("session", session_id))
        if known is not None:
            return known
        found = await self._store.sessions.get(session_id)
        if found is None:
            raise SessionNotFound(f"session {session_id} is not known; `flmctl list -s` shows those that are")
        return Session(*found)

    async def _list_sessions(self, request: ListSessions) -> SessionPage:
        def wanted(record: SessionRecord) -> bool:
            return (
                request.application in (None, record.application)
                and request.state in (None, record.state)
                and request.labels.items() <= record.options.labels.items()
            )

        chosen = (name for name, session in self._view.sessions.items() if wanted(session.record))
        names, more = _page(chosen, request)
        items = await count_tasks(self._broker, self._view, [self._view.sessions[name] for name in names])
        return SessionPage(items=tuple(items), more=more)

    async def _close_session(self, request: CloseSession) -> SessionRecord:
        record = await self._begin_close(check_token("session", request.id))
        if record is None:
            raise SessionNotFound(f"session {request.id} is not known; `flmctl list -s` shows those that are")
        return record

    async def _begin_close(self, session_id: str) -> SessionRecord | None:
        def close(record: SessionRecord) -> SessionRecord | None:
            if record.state is not SessionState.OPEN:
                return None
            return record.changed(state=SESSION.next(record.state, SessionEvent.CLOSE))

        record = await self._store.sessions.change(session_id, close)
        if record is not None:
            await self._store.announce(record)
        return record

    # ---- tasks

    async def _look_up_tasks(self, request: LookUpTasks) -> TaskLooks:
        """Tell what became of tasks, by leader reads.

        Waiting is asked before results: a task that is not waiting any more had its record stored before it went.
        """
        application, session = check_application(request.application), check_token("session", request.session)
        try:
            waiting = await self._waiting(application, session, request.tasks)
            # A finished task waits for its acknowledgement for a moment: of few tasks, tell even then.
            few = len(request.tasks) <= _FEW
            missing = [task for task in request.tasks if few or task not in waiting]
            results: dict[str, bytes] = {}
            unread: list[str] = []
            size = 0
            for begin in range(0, len(missing), 64):
                some = missing[begin : begin + 64]
                if unread:
                    unread.extend(some)
                    continue
                for task, data in zip(some, await self._results(application, session, some), strict=True):
                    if data is None:
                        continue
                    if results and size + len(data) > _ANSWER_BYTES:
                        unread.append(task)
                    else:
                        results[task] = data
                        size += len(data)
        except StreamMissing:
            raise ApplicationNotFound(f"application {application} is not registered any more") from None
        return TaskLooks(waiting=tuple(waiting - set(results)), results=results, unread=tuple(unread))

    async def _list_tasks(self, request: ListTasks) -> TaskPage:
        """List the tasks of a session that are stored, and those whose records are.

        Every call counts the subjects of all of them; what waits is asked first, as in `_look_up_tasks`.
        """
        application, session = check_application(request.application), check_token("session", request.session)
        streams = subjects.task_stream(application), subjects.result_stream(application)
        try:
            waiting = await self._broker.subjects(streams[0], subjects.session_tasks(application, session))
            recorded = await self._broker.subjects(streams[1], subjects.session_results(application, session))
        except StreamMissing:
            raise _no_application(application) from None
        finished = {subject.rpartition(".")[2] for subject in recorded}
        unfinished = {subject.rpartition(".")[2] for subject in waiting} - finished
        running = set(sorted(unfinished)[: self._running(session)])
        names, more = _page(finished | unfinished, request)
        items: list[TaskInfo] = []
        size = 0
        while names:
            batch = _room(size)
            if not batch:
                return TaskPage(items=tuple(items), more=True)
            some, names = names[:batch], names[batch:]
            records = await self._results(application, session, [name for name in some if name in finished])
            found = dict(zip([name for name in some if name in finished], records, strict=True))
            for name in some:
                if name not in finished:
                    items.append(TaskInfo(id=name, state=TaskState.RUNNING if name in running else TaskState.PENDING))
                elif (record := found[name]) is not None:  # otherwise it has just aged out
                    items.append(TaskInfo(id=name, state=_state_in(record), record=record))
                    size += len(record)
        return TaskPage(items=tuple(items), more=more)

    def _running(self, session_id: str) -> int:
        """Return how many tasks of a session run, as its executors say."""
        session = self._view.sessions.get(session_id)
        if session is None:
            return 0
        executors = self._view.executors
        return sum(executors[key].record.running for key in session.bindings if key in executors)

    async def _waiting(self, application: str, session: str, tasks: tuple[str, ...]) -> set[str]:
        stream = subjects.task_stream(application)
        for task in tasks:
            check_token("task", task)
        if len(tasks) > _FEW:
            stored = await self._broker.subjects(stream, subjects.session_tasks(application, session))
            return {task for task in tasks if subjects.task(application, session, task) in stored}
        found = [await self._broker.last(stream, subjects.task(application, session, task)) for task in tasks]
        return {task for task, message in zip(tasks, found, strict=True) if message is not None}

    async def _results(self, application: str, session: str, tasks: list[str]) -> list[bytes | None]:
        stream = subjects.result_stream(application)
        names = [subjects.result(application, session, task) for task in tasks]
        found = await asyncio.gather(*(self._broker.last(stream, name) for name in names))
        return [None if message is None else message.data for message in found]

    # ---- executors and nodes

    async def _get_executor(self, request: Named) -> ExecutorRecord:
        check_token("executor", request.name)
        for executor in self._view.executors.values():
            if executor.record.id == request.name:
                return executor.record
        raise ExecutorNotFound(f"executor {request.name} is not known; `flmctl list -e` shows those that are")

    async def _list_executors(self, request: ListExecutors) -> ExecutorPage:
        def wanted(record: ExecutorRecord) -> bool:
            return request.session in (None, record.session) and request.node in (None, record.node)

        chosen = (name for name, executor in self._view.executors.items() if wanted(executor.record))
        names, more = _page(chosen, request)
        return ExecutorPage(items=tuple(self._view.executors[name].record for name in names), more=more)

    async def _get_node(self, request: Named) -> NodeInfo:
        name = check_token("node", request.name)
        if name not in self._view.nodes:
            raise NodeNotFound(f"node {name} is not known; `flmctl list -n` shows those that are")
        return self._node_info(name)

    async def _list_nodes(self, request: List) -> NodePage:
        names, more = _page(self._view.nodes, request)
        return NodePage(items=tuple(self._node_info(name) for name in names), more=more)

    def _node_info(self, name: str) -> NodeInfo:
        node = self._view.nodes[name]
        record = node.record
        return NodeInfo(
            name=name,
            hostname=record.hostname,
            state=node.state,
            cpu=record.capacity.cpu,
            memory=record.capacity.memory,
            gpu=record.capacity.gpu,
            arch=record.arch,
            os=record.os,
            executors=len(node.bindings),
        )


def _handler(
    verb: Verb, request_type: type[Request], act: Callable[[Any], Awaitable[Record | None]]
) -> Callable[[bytes], Awaitable[bytes]]:
    async def handle(data: bytes) -> bytes:
        try:
            fields = unpack(data)
            fields.pop("v")
            known = {name: value for name, value in fields.items() if name in request_type.model_fields}
            return _fitting(verb, await act(request_type.check(verb.value, known)))
        except FlameError as error:
            return answer_error(error)
        except Exception as error:
            log.exception("a request failed", verb=verb.value)
            return answer_error(InternalError(f"{verb.value}: {error!r}; the scheduler's log has the details"))

    return handle


def _room(size: int) -> int:
    """Return how many results are certain to fit into an answer that holds ``size`` bytes of them."""
    return max(0, (_ANSWER_BYTES - size) // defaults.INLINE_LIMIT_BYTES)


def _no_application(name: str) -> ApplicationNotFound:
    return ApplicationNotFound(f"application {name!r} is not registered; `flmctl list -a` shows those that are")


def _state_in(record: bytes) -> TaskState:
    try:
        return ResultRecord.decode(record).state
    except MalformedMessage:
        return TaskState.FAILED  # as its client will call it


def _check_open(record: SessionRecord) -> None:
    if record.state is SessionState.FAILED:
        raise SessionFailed(f"session {record.id} failed: {record.reason}")
    if record.state is not SessionState.OPEN:
        raise SessionNotOpen(f"session {record.id} is {record.state.value}; create another")


def _mint(application: str) -> str:
    return f"{application}-{''.join(secrets.choice(_ALPHABET) for _ in range(6))}"


def _fitting(verb: Verb, result: Record | None) -> bytes:
    """Encode an answer; of a page as much as a message may hold, since what is larger would never arrive."""
    data = answer_ok(result)
    items = getattr(result, "items", ())
    while len(data) > _LARGEST_ANSWER and result is not None and len(items) > 1:
        items = items[: len(items) // 2]
        result = result.changed(items=items, more=True)
        data = answer_ok(result)
    if len(data) > _LARGEST_ANSWER:
        raise InternalError(f"{verb.value}: an answer of {len(data)} bytes is more than a message may hold")
    return data


def _page(names: Iterable[str], request: List) -> tuple[list[str], bool]:
    """Return the names of one page, in order, and whether there are more."""
    rest = sorted(name for name in names if name > request.after)
    return rest[: request.limit], len(rest) > request.limit
