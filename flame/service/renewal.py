"""Common data that was changed: hearing of it, getting it, and having the service hear of it between two tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from flame.errors import ValueGone
from flame.protocol.supervision import Assignment, ExecutorReport, Orders
from flame.protocol.values import ValueRef
from flame.service.contexts import SessionContext
from flame.service.handlers import Handler

ASK_AGAIN_S = 1.0
"""The manager may not be able to read it just now."""


class Renewal:
    """The session's common data as this executor has it, and what it has heard of a newer version."""

    def __init__(
        self,
        assignment: Assignment,
        context: SessionContext,
        updated: Handler,
        load: Callable[[ValueRef], Awaitable[bytes]],
    ) -> None:
        """Begin with what the assignment says; ``context`` is what the service knows, and ``updated`` tells it.

        ``load`` brings what is too large for an answer.
        """
        self.version = assignment.common_data_version
        """Of what the service has."""
        self.on_ask: Callable[[], None] = lambda: None
        """Called when the manager should be asked at once."""
        self._context = context
        self._updated = updated
        self._load = load
        self.wanted = 0
        """The newest version that it has heard of and not got; 0: none."""
        self._older_answers = 0
        """Answers since the latest wish that brought less: the second one was certainly asked for after it."""
        self._news: tuple[int, bytes | ValueRef] | None = None
        self._gone: ValueRef | None = None
        """What could not be loaded: it was replaced meanwhile, or is missing."""
        self._answered = asyncio.Event()

    def want(self, version: int) -> bool:
        """Take note that there is a version, and return whether it isn't here."""
        if version <= self.version:
            return False
        if version > self.wanted:
            self.wanted, self._older_answers = version, 0
        return True

    def fill(self, report: ExecutorReport) -> None:
        """Ask for it in a report."""
        if self.wanted:
            report.common_data_version, report.common_data_wanted = self.version, self.wanted

    def hear(self, orders: Orders) -> None:
        """Take over what an answer brings."""
        version = orders.common_data_version
        if version is None or not self.wanted:
            return
        data = orders.common_data if orders.common_data_ref is None else orders.common_data_ref
        if data is not None and version > (self._news[0] if self._news else self.version):
            self._news = (version, data)
        if version < self.wanted and self._older_answers == 0:
            self._older_answers = 1
            self.on_ask()
            return
        if version > self.version and self._news is None:
            self.on_ask()  # it was changed while it was read
            return
        self.wanted = 0
        self._answered.set()

    async def fetch(self) -> None:
        """Return when what is wanted has come, or it is certain that there is no such version."""
        while self.wanted:
            self._answered.clear()
            self.on_ask()
            try:
                async with asyncio.timeout(ASK_AGAIN_S):
                    await self._answered.wait()
            except TimeoutError:
                continue

    async def apply(self) -> None:
        """Have the service hear of what has come, and return when it has; raises what that raises."""
        while self._news is not None:
            (version, data), self._news = self._news, None
            if isinstance(data, ValueRef):
                loaded = await self._loaded(version, data)
                if loaded is None:
                    return
                data = loaded
            self._context.renew(data, version)
            await self._updated(self._context)
            self.version = version

    async def _loaded(self, version: int, ref: ValueRef) -> bytes | None:
        """Load common data; ``None`` if it is gone, as when it was replaced just then: then it is asked for again."""
        try:
            return await self._load(ref)
        except ValueGone:
            if ref == self._gone:
                raise
            self._gone = ref
            self.wanted = max(self.wanted, version)
            return None
