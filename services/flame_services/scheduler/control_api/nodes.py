"""The verbs about nodes."""

from __future__ import annotations

from flame.errors import NodeNotFound
from flame.protocol.api import List, Named, NodeInfo, NodePage
from flame.protocol.subjects import check_token
from flame_services.scheduler.control_api.paging import page
from flame_services.scheduler.view import View


class Nodes:
    """Answers from the view."""

    def __init__(self, view: View) -> None:
        """Answer from ``view``."""
        self._view = view

    async def get_node(self, request: Named) -> NodeInfo:
        """Return one node."""
        name = check_token("node", request.name)
        if name not in self._view.nodes:
            raise NodeNotFound(f"node {name} is not known; `flmctl list -n` shows those that are")
        return self._node_info(name)

    async def list_nodes(self, request: List) -> NodePage:
        """Return some nodes."""
        names, more = page(self._view.nodes, request)
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
            used=node.used,
            memory_by=record.memory_by,
            cpu_by=record.cpu_by,
            application=record.application,
        )
