"""Serving the control API: each verb finds its handler, whatever goes wrong becomes an answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from flame.broker.seam import Broker, Subscription
from flame.errors import FlameError, InternalError
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.api import (
    CancelTasks,
    CloseSession,
    CreateSession,
    Info,
    List,
    ListExecutors,
    ListSessions,
    ListTasks,
    LookUpTasks,
    Named,
    OpenSession,
    RegisterApplication,
    Request,
    UnregisterApplication,
    UpdateApplication,
    UpdateCommonData,
    Verb,
    answer_error,
)
from flame.protocol.codec import unpack
from flame.protocol.records import Record
from flame.version import __version__
from flame_services.scheduler.control_api.applications import Applications
from flame_services.scheduler.control_api.cancel import Cancel
from flame_services.scheduler.control_api.executors import Executors
from flame_services.scheduler.control_api.nodes import Nodes
from flame_services.scheduler.control_api.paging import fitting
from flame_services.scheduler.control_api.sessions import Sessions
from flame_services.scheduler.control_api.tasks import Tasks
from flame_services.scheduler.recorder import Recorder
from flame_services.scheduler.store import Store
from flame_services.scheduler.view import View

log = get_logger("flame.scheduler")

Handler = Callable[[Any], Awaitable[Record | None]]


class ControlApi:
    """Answers requests from the view, and carries changes out on the buckets."""

    def __init__(self, broker: Broker, view: View, store: Store, recorder: Recorder, name: str, replicas: int) -> None:
        """Serve as the scheduler ``name``."""
        self._broker = broker
        self._view = view
        self._name = name
        applications = Applications(broker, view, store, replicas)
        sessions = Sessions(broker, view, store, applications)
        tasks = Tasks(broker, view)
        cancel = Cancel(broker, sessions, recorder)
        executors, nodes = Executors(view), Nodes(view)
        self._verbs: dict[Verb, tuple[type[Request], Handler]] = {
            Verb.INFO: (Request, self.info),
            Verb.REGISTER_APPLICATION: (RegisterApplication, applications.register_application),
            Verb.UPDATE_APPLICATION: (UpdateApplication, applications.update_application),
            Verb.DISABLE_APPLICATION: (Named, applications.disable_application),
            Verb.ENABLE_APPLICATION: (Named, applications.enable_application),
            Verb.UNREGISTER_APPLICATION: (UnregisterApplication, applications.unregister_application),
            Verb.GET_APPLICATION: (Named, applications.get_application),
            Verb.LIST_APPLICATIONS: (List, applications.list_applications),
            Verb.CREATE_SESSION: (CreateSession, sessions.create_session),
            Verb.OPEN_SESSION: (OpenSession, sessions.open_session),
            Verb.GET_SESSION: (Named, sessions.get_session),
            Verb.LIST_SESSIONS: (ListSessions, sessions.list_sessions),
            Verb.CLOSE_SESSION: (CloseSession, sessions.close_session),
            Verb.UPDATE_COMMON_DATA: (UpdateCommonData, sessions.update_common_data),
            Verb.LIST_TASKS: (ListTasks, tasks.list_tasks),
            Verb.LOOK_UP_TASKS: (LookUpTasks, tasks.look_up_tasks),
            Verb.CANCEL_TASKS: (CancelTasks, cancel.cancel_tasks),
            Verb.GET_EXECUTOR: (Named, executors.get_executor),
            Verb.LIST_EXECUTORS: (ListExecutors, executors.list_executors),
            Verb.GET_NODE: (Named, nodes.get_node),
            Verb.LIST_NODES: (List, nodes.list_nodes),
        }
        self._service: Subscription | None = None

    async def start(self) -> None:
        """Begin to answer."""
        handlers = {verb.value: _answering(verb, *what) for verb, what in self._verbs.items()}
        self._service = await self._broker.serve(subjects.API_SERVICE, __version__, subjects.API_PREFIX, handlers)

    async def stop(self) -> None:
        """Answer no more."""
        service, self._service = self._service, None
        if service is not None:
            await service.stop()

    async def info(self, _request: Request) -> Info:
        """Say what the cluster is."""
        ready = sum(1 for node in self._view.nodes.values() if node.takes)
        return Info(version=__version__, scheduler=self._name, nodes=ready)


def _answering(verb: Verb, request_type: type[Request], act: Handler) -> Callable[[bytes], Awaitable[bytes]]:
    async def handle(data: bytes) -> bytes:
        try:
            fields = unpack(data)
            fields.pop("v")
            known = {name: value for name, value in fields.items() if name in request_type.model_fields}
            return fitting(verb, await act(request_type.check(verb.value, known)))
        except FlameError as error:
            return answer_error(error)
        except Exception as error:
            log.exception("a request failed", verb=verb.value)
            return answer_error(InternalError(f"{verb.value}: {error!r}; the scheduler's log has the details"))

    return handle
