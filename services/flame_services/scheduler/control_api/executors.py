"""The verbs about executors."""

from __future__ import annotations

from flame.errors import ExecutorNotFound
from flame.protocol.api import ExecutorPage, ListExecutors, Named
from flame.protocol.records import ExecutorRecord
from flame.protocol.subjects import check_token
from flame_services.scheduler.control_api.paging import page
from flame_services.scheduler.view import View


class Executors:
    """Answers from the view."""

    def __init__(self, view: View) -> None:
        """Answer from ``view``."""
        self._view = view

    async def get_executor(self, request: Named) -> ExecutorRecord:
        """Return one executor."""
        check_token("executor", request.name)
        for executor in self._view.executors.values():
            if executor.record.id == request.name:
                return executor.record
        raise ExecutorNotFound(f"executor {request.name} is not known; `flmctl list -e` shows those that are")

    async def list_executors(self, request: ListExecutors) -> ExecutorPage:
        """Return some executors."""

        def wanted(record: ExecutorRecord) -> bool:
            return request.session in (None, record.session) and request.node in (None, record.node)

        chosen = (name for name, executor in self._view.executors.items() if wanted(executor.record))
        names, more = page(chosen, request)
        return ExecutorPage(items=tuple(self._view.executors[name].record for name in names), more=more)
