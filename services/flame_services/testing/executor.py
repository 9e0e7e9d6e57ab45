"""One executor of a cluster in memory: an executor manager's part in its life, with a task for a process."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from flame.broker.memory import MemoryBroker, MemoryServer
from flame.cancel import end_tasks
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import defaults
from flame.protocol.records import BindingRecord
from flame.protocol.supervision import Assignment
from flame.service.environment import ExecutorEnvironment
from flame.service.executor import Executor, check_service
from flame_services.executor_manager.assignment import Briefing, Superseded, read_briefing
from flame_services.executor_manager.bound import BoundExecutor
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.keeper import LeaseKeeper
from flame_services.executor_manager.launch import LaunchRefused
from flame_services.executor_manager.life import Limits
from flame_services.executor_manager.reasons import Reason, last_lines

log = get_logger("flame.testing")

KILLED: Final = -9
"""The status of an executor that was ended at once: that of a process after SIGKILL."""
REMAINS_S: Final = 2.0
"""How long user code may go on after the cluster has ended: it is cancelled all that time."""
HOW: Final = "fresh: in the process of its test"
_RETRY_S: Final = 0.1

MakeService = Callable[[], object]


@dataclass(slots=True)
class Place:
    """What the executors of one node share."""

    server: MemoryServer
    broker: MemoryBroker
    node: str
    services: dict[str, MakeService]
    """By application."""
    made: dict[str, list[object]]
    """By application: the services that executors were given, in order."""
    leases: LeaseKeeper
    consumers: Consumers
    on_change: Callable[[], None]
    """Called when an executor begins or ends."""
    remains: set[asyncio.Task[Any]] = field(default_factory=set)
    """What is left of executors that were killed: user code may take its time, cut off from everything."""


class MemoryExecutor(BoundExecutor[Place]):
    """Carries one binding out with a task of this loop."""

    def __init__(self, place: Place, binding: BindingRecord) -> None:
        """Take a binding; `start` begins."""
        limits = Limits(defaults.READY_TIMEOUT_S, defaults.ENTER_TIMEOUT_S, defaults.LEAVE_TIMEOUT_S)
        super().__init__(place, binding, limits, log)
        self._broker: MemoryBroker | None = None
        self._serving: asyncio.Task[tuple[int, str]] | None = None
        self._ended: asyncio.Future[tuple[int, str]] = self._loop.create_future()
        """How it ended, and what it wrote last."""

    # ---- what is wanted of it

    def terminate(self, cause: Reason) -> None:
        """End it at once, through no fault of its own."""
        self.end(cause, blameless=True)

    def end(self, cause: Reason, *, blameless: bool = False) -> None:
        """End it at once, for a reason of ours; ``blameless``: that is not counted as an attempt of what runs in it."""
        if blameless:
            self._place.leases.excuse(self.binding.executor)
        self.life.give_up(cause, blameless=blameless)
        self.leave()
        self.kill()

    def kill(self) -> None:
        """End it as SIGKILL ends a process: nothing that it says from now on is heard by anybody."""
        if self._broker is not None:
            self._place.server.interrupt(self._broker)
        if not self._ended.done():
            self._ended.set_result((KILLED, ""))
        serving = self._serving
        if serving is not None and not serving.done():
            remains = asyncio.create_task(end_tasks((serving,)))
            self._place.remains.add(remains)
            remains.add_done_callback(self._place.remains.discard)

    async def close(self) -> None:
        """Let go of everything, after it was released or killed."""
        self._alarm.set(None)
        await end_soon(task for task in (self._task, self._serving) if task is not None)
        await self.writer.close()

    # ---- its life

    async def _carry_out(self) -> tuple[int, str] | None:
        assignment = await self._prepare()
        if assignment is None:
            return None
        ended = await self._run(assignment)
        await self._place.leases.hand_over(self.binding.executor)
        return ended

    async def _prepare(self) -> Assignment | None:
        """Read what the binding refers to, however long that takes; ``None`` if it is to leave before."""
        briefing: Briefing | None = None
        while briefing is None:
            if self.life.leaving or self._ended.done():
                return None
            try:
                briefing = await read_briefing(self._place.broker, self.binding)
            except (Superseded, LaunchRefused):
                raise
            except FlameError:
                await asyncio.sleep(_RETRY_S)
        if self.binding.application not in self._place.services:
            raise LaunchRefused(
                f"application {self.binding.application!r} has no service in this process:"
                " register it by MemoryCluster.register"
            )
        ledger = self._place.leases.open(self.binding, briefing.assignment.ack_wait_s)
        return replace(briefing.assignment, ledger=ledger)

    async def _run(self, assignment: Assignment) -> tuple[int, str]:
        if self._ended.done():
            return await self._ended  # killed meanwhile
        self._assignment = assignment
        self.life.tell_start(HOW)
        self.life.start(time.time())
        self._follow_life()
        self._broker = self._place.server.connect(self.binding.executor)
        self._serving = asyncio.create_task(self._serve(self._broker), name=f"service {self.binding.executor}")
        self._serving.add_done_callback(self._note_end)
        return await self._ended

    async def _serve(self, broker: MemoryBroker) -> tuple[int, str]:
        """Be the process of a service; return its exit status, and what it would have written to standard error."""
        place, application = self._place, self.binding.application
        try:
            service = place.services[application]()
            check_service(service)
            place.made.setdefault(application, []).append(service)
            environment = ExecutorEnvironment(broker.endpoint, place.node, self.binding.executor)
            return await Executor(service, environment, broker, HOW).serve(), ""
        except SystemExit as error:
            return (error.code if isinstance(error.code, int) else int(error.code is not None)), ""
        except Exception:  # noqa: BLE001  # whatever ends a service ends with a traceback on its standard error
            return 1, last_lines(traceback.format_exc().encode())
        finally:
            await broker.close()

    def _note_end(self, serving: asyncio.Task[tuple[int, str]]) -> None:
        if not self._ended.done():
            self._ended.set_result((KILLED, "") if serving.cancelled() else serving.result())

    def _clean_up(self) -> None:
        if not self._ended.done():
            self.kill()

    def _release(self) -> None:
        super()._release()
        self._place.on_change()

    def _overdue(self) -> None:
        deadline = self._alarm.armed
        if deadline is None or self.released.is_set():
            return
        if deadline.ask_first and not self._place.broker.connected:
            self._alarm.begin_anew()
        else:
            self.end(deadline.cause)


async def end_soon(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they end, but not for ever: user code may catch every cancellation."""
    tasks = list(tasks)
    try:
        async with asyncio.timeout(REMAINS_S):
            await end_tasks(tasks)
    except TimeoutError:
        names = ", ".join(task.get_name() for task in tasks if not task.done())
        log.warning("user code goes on although it was cancelled again and again", tasks=names)
