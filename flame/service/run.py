"""`flame.run`: where a service hands its process over to Flame."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NoReturn

from flame.broker.jetstream import connect
from flame.ledger import barrier_register
from flame.protocol.forking import ForkOrder
from flame.protocol.messages import Assignment
from flame.service import environment as names
from flame.service.environment import ExecutorEnvironment
from flame.service.executor import FORKED, Executor, check_service
from flame.service.forkable import hindrance
from flame.service.forked import become_executor, leave_loop, loop_factory, run_executor
from flame.service.template import Template

CONNECT_TIMEOUT_S: Final = 20.0
ORPHAN_GRACE_S: Final = 3.0
"""How long a process outlives the cluster that it belongs to: its manager ends it in order if it can."""


async def run(service: object) -> None:
    """Serve one session with ``service``, an instance of a `FlameService`, and return when that has ended.

    For the main program of a service: ``asyncio.run(flame.run(MyAgent()))``. An executor manager starts it.

    Where that is safe, this process becomes a *template* instead: it stays here, and each session is served by a fork
    of it, with ``service`` as it is now. So what a program does before this call is done once for all sessions;
    threads, connections and tasks that it leaves running make it unsafe, and then each session has a process of its
    own. In a fork this doesn't return either: the process ends with its session, having run what was registered with
    `atexit` there. See `FlameService.on_fork`, and ``fresh_process`` of an application, which rules templates out.

    Raises:
        ConfigurationError: The process was not started by an executor manager, or ``service`` is no service.
        BrokerUnavailable: The broker can't be reached.
        SystemExit: The session could not be entered or left in order; the manager knows why.
    """
    check_service(service)
    environment = ExecutorEnvironment.read()
    started = ""
    if environment.template:
        os.environ.pop(names.TEMPLATE, None)
        started = f"fresh: {_be_template(service, environment)}"
    status = await _serve(service, environment, started)
    if status:
        sys.exit(status)


def _be_template(service: object, environment: ExecutorEnvironment) -> str:
    """Become a template and don't return; or return why this process can't be one."""
    reason = hindrance()
    if reason:
        return reason
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    loop_factory()  # loaded before any fork

    def become(order: ForkOrder, stdout: int, stderr: int, close: Sequence[int]) -> NoReturn:
        leave_loop(loop, task)
        try:
            become_executor(order, stdout, stderr, close)
        except OSError:
            traceback.print_exc()
            os._exit(1)
        identity = replace(environment, executor=order.executor, template="")
        run_executor(lambda: _serve(service, identity, FORKED, order.assignment))

    try:
        Template(environment.template, environment.lifetime_fd, become).run()
    except OSError as error:
        return f"it can't listen at {environment.template}: {error.strerror}"


async def _serve(
    service: object, environment: ExecutorEnvironment, started: str, assignment: Assignment | None = None
) -> int:
    """Be one executor from beginning to end and return its exit status."""
    barrier_register()  # before there is a second thread: then the system would have to wait for all processors
    if environment.lifetime_fd is not None:
        _end_with_cluster(environment.lifetime_fd)
    broker = await connect(
        environment.endpoint,
        name=f"flame-executor-{environment.executor}",
        timeout_s=CONNECT_TIMEOUT_S,
        check=assignment is None,
    )
    try:
        return await Executor(service, environment, broker, started).serve(assignment)
    finally:
        await broker.close()


def _end_with_cluster(lifetime_fd: int) -> None:
    """End this process and its children when the cluster's owner is gone, even if user code blocks the loop."""

    def watch() -> None:
        while True:
            try:
                if not os.read(lifetime_fd, 1):
                    break
            except InterruptedError:
                continue
            except OSError:
                return  # not ours to watch
        time.sleep(ORPHAN_GRACE_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    try:
        os.set_inheritable(lifetime_fd, False)
    except OSError:
        return
    threading.Thread(target=watch, name="flame-lifetime", daemon=True).start()
