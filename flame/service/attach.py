"""`flame.run` in a process that somebody has started by hand: it joins the current cluster as an executor.

What it does is said on standard error, for whoever watches the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import Any, Final

from flame.broker.jetstream import connect
from flame.broker.seam import Broker
from flame.cancel import end_task
from flame.client.asking import ControlClient
from flame.config import resolve_target
from flame.errors import ApplicationDisabled, ApplicationNotFound, ConfigurationError, FlameError
from flame.ledger import barrier_register
from flame.protocol import defaults
from flame.protocol.api import Named, SessionInfo, Verb
from flame.protocol.attaching import ATTACHED
from flame.protocol.records import ApplicationRecord
from flame.protocol.states import ApplicationState, SessionState
from flame.protocol.subjects import check_application
from flame.protocol.supervision import Assignment
from flame.service import environment as names
from flame.service.attachment import Attachment
from flame.service.environment import ExecutorEnvironment
from flame.service.executor import Executor
from flame.service.interrupts import Interrupts

_ASK_S: Final = 2.0

_served = ""
"""The session that this process has served."""


async def attach(service: object, application: str) -> int:
    """Join the current cluster for one session of an application, and return when that has ended: the exit status.

    Raises what `flame.run` does.
    """
    check_application(application)
    if _served:
        raise ConfigurationError(
            f"flame.run: this process has served session {_served}, and no process serves two: start it again"
        )
    target = resolve_target()
    broker = await connect(target.endpoint, name=f"flame-attached, process {os.getpid()}", security=target.security)
    try:
        await _check(broker, application)
        attachment = Attachment(target, application)
        try:
            await attachment.start()
            return await _Attached(service, application, broker, attachment).run()
        finally:
            await attachment.close()
    finally:
        await broker.close()


async def _check(broker: Broker, application: str) -> None:
    """See that there is such an application, and that it takes sessions."""
    try:
        found = await ControlClient(broker).call(Verb.GET_APPLICATION, Named(name=application), ApplicationRecord)
    except ApplicationNotFound:
        raise ApplicationNotFound(
            f"flame.run: there is no application {application} at {broker.endpoint} to attach this process for:"
            " register it first, with `flmctl register -f FILE`; `flmctl list -a` shows those that are"
        ) from None
    if found.state is ApplicationState.DISABLED:
        raise ApplicationDisabled(
            f"flame.run: application {application} is disabled, so no session of it comes to be:"
            f" `flmctl enable -a {application}` first"
        )


class _Attached:
    """One process's time as an executor."""

    def __init__(self, service: object, application: str, broker: Broker, attachment: Attachment) -> None:
        self._application = application
        self._broker = broker
        self._attachment = attachment
        self._session = ""
        self._leaves = asyncio.Event()
        environment = ExecutorEnvironment(broker.endpoint, attachment.node, attachment.executor)
        self._executor = Executor(service, environment, broker, ATTACHED)
        self._executor.on_session = self._begin

    async def run(self) -> int:
        barrier_register()
        with Interrupts(self._leaves.set, self._attachment.must_end):
            _say(
                f"attached to {self._application} at {self._broker.endpoint}, as node {self._attachment.node}:"
                " waiting for a session (Ctrl-C leaves)"
            )
            serving = asyncio.create_task(self._executor.serve(), name="executor")
            leaving = asyncio.create_task(self._leaves.wait(), name="Ctrl-C")
            try:
                return await self._live(serving, leaving)
            finally:
                await end_task(leaving)
                await end_task(serving)
                os.environ.pop(names.EXECUTOR, None)

    async def _live(self, serving: asyncio.Task[int], leaving: asyncio.Task[bool]) -> int:
        lost = self._attachment.lost
        await _first(serving, leaving, lost)
        if leaving.done() and not serving.done() and not lost.done():
            await self._leave(serving)
        if not serving.done():
            await end_task(serving)
        if lost.done() and not leaving.done() and serving.cancelled():
            raise await self._attachment.explain_loss()
        self._attachment.let_go()
        status = 0 if serving.cancelled() else serving.result()
        await self._tell_end(left=leaving.done())
        return status

    async def _leave(self, serving: asyncio.Task[int]) -> None:
        """Leave in order: what runs may finish within the time that the manager gives it."""
        if not self._executor.serves:
            return  # there is nothing to finish
        _say(f"leaving: a task that runs has {defaults.LEAVE_TIMEOUT_S:g} s to finish (Ctrl-C ends at once)")
        self._attachment.leave()
        await _first(serving, self._attachment.lost)

    def _begin(self, assignment: Assignment) -> None:
        global _served  # noqa: PLW0603  # it is a matter of the whole process
        _served = self._session = assignment.session
        _say(f"serving session {assignment.session} (Ctrl-C leaves)")

    async def _tell_end(self, *, left: bool) -> None:
        fault = self._executor.fault
        if fault is not None:
            what = "was left out of order" if self._executor.serves else "could not be entered"
            _say(f"session {self._session} {what}: {fault.type}: {fault.message}")
            _say(fault.traceback.rstrip())
        elif not self._session:
            _say(f"left {self._application}")
        elif left or not await self._has_ended():
            _say(f"left session {self._session}, which goes on without this process")
        else:
            _say(f"session {self._session} has ended")

    async def _has_ended(self) -> bool:
        """Whether the session has: otherwise the cluster has told its executor to leave."""
        with contextlib.suppress(FlameError, TimeoutError):
            async with asyncio.timeout(_ASK_S):
                info = await ControlClient(self._broker).call(Verb.GET_SESSION, Named(name=self._session), SessionInfo)
                return info.session.state is not SessionState.OPEN
        return True


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"flame: {line}", file=sys.stderr, flush=True)  # noqa: T201  # to whoever has started it
