"""`flame.run`: where a service hands its process over to Flame."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from typing import Final, NoReturn

from flame.broker.jetstream import connect
from flame.broker.seam import Broker
from flame.ledger import barrier_register
from flame.protocol.supervision import Assignment
from flame.service import environment as names
from flame.service.describing import describe
from flame.service.environment import ExecutorEnvironment
from flame.service.executor import FORKED, Executor, check_service
from flame.service.forkable import hindrance
from flame.service.forked import carry_out, leave_loop, loop_factory, receive_order, run_executor
from flame.service.template import Template

CONNECT_TIMEOUT_S: Final = 20.0
ORPHAN_GRACE_S: Final = 3.0
"""How long a process outlives the cluster that it belongs to: its manager ends it in order if it can."""


async def run(service: object, *, application: str | None = None) -> None:
    """Serve one session with ``service``, an instance of a `FlameService`, and return when that has ended.

    For the main program of a service: ``asyncio.run(flame.run(MyAgent()))``. An executor manager starts it.

    Started by hand, in a terminal or a debugger, it joins the cluster that `flame.connect` would find as an executor of
    ``application``, or of what ``FLAME_APPLICATION`` names, which must be registered: the next session of that which
    needs an executor gets this process, and is served here until it ends. A debugger may stop the process for as long
    as it takes. What happens is said on standard error. Ctrl-C and SIGTERM leave: a task that runs has 10 s to finish,
    and what is left is run elsewhere; a second one ends the process at once. Where a manager has started the process
    ``application`` means nothing.

    Where that is safe, this process becomes a *template* instead: it stays here, and each session is served by a fork
    of it, with ``service`` as it is now. So what a program does before this call is done once for all sessions;
    threads, connections and tasks that it leaves running make it unsafe, and then each session has a process of its
    own. In a fork this doesn't return either: the process ends with its session, having run what was registered with
    `atexit` there. See `FlameService.on_fork`, and ``fresh_process`` of an application, which rules templates out.

    Raises:
        ConfigurationError: ``service`` is no service; or the process was started by hand, and there is no
            ``application``, the cluster's address is malformed, or the programs of Flame are not installed here.
        InvalidName, ApplicationNotFound, ApplicationDisabled: ``application`` can't be served.
        BrokerUnavailable: The broker can't be reached.
        SchedulerUnavailable: Started by hand: no scheduler answers.
        Unavailable: Started by hand: the program that looks after this process there has ended.
        SystemExit: The session could not be entered or left in order; the manager knows why.
    """
    check_service(service)
    if names.DESCRIBE in os.environ:
        describe(service, os.environ[names.DESCRIBE])
        return
    application = application or os.environ.get(names.APPLICATION)
    if application and names.EXECUTOR not in os.environ:
        from flame.service.attach import attach  # noqa: PLC0415  # most executors are started by their managers

        status = await attach(service, application)
        if status:
            sys.exit(status)
        return
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

    def be_executor(channel: socket.socket) -> NoReturn:
        leave_loop(loop, task)
        run_executor(lambda: _serve_order(service, environment, channel))

    try:
        Template(environment.template, environment.lifetime_fd, be_executor).run()
    except OSError as error:
        return f"it can't listen at {environment.template}: {error.strerror}"


async def _serve_order(service: object, environment: ExecutorEnvironment, channel: socket.socket) -> int:
    """Be the executor that an order asks for; the connection to the broker is made before that comes."""
    _attach(environment)
    connecting = asyncio.create_task(_connect(environment, f"flame-executor, process {os.getpid()}", check=False))
    received = await receive_order(channel, connecting)
    if received is None:
        os._exit(0)  # nobody needs it, and it has done nothing
    order, streams = received
    carry_out(order, *streams)
    for descriptor in streams:
        os.close(descriptor)
    environment = replace(environment, executor=order.executor)
    return await _live(service, environment, await connecting, FORKED, order.assignment)


async def _serve(service: object, environment: ExecutorEnvironment, started: str) -> int:
    """Be one executor from beginning to end and return its exit status."""
    _attach(environment)
    broker = await _connect(environment, f"flame-executor-{environment.executor}", check=True)
    return await _live(service, environment, broker, started, None)


def _attach(environment: ExecutorEnvironment) -> None:
    """Do what a process does once that was started, or forked, to be an executor."""
    barrier_register()  # before there is a second thread: then the system would have to wait for all processors
    if environment.lifetime_fd is not None:
        _end_with_cluster(environment.lifetime_fd)


async def _connect(environment: ExecutorEnvironment, name: str, *, check: bool) -> Broker:
    return await connect(environment.endpoint, name=name, timeout_s=CONNECT_TIMEOUT_S, check=check)


async def _live(
    service: object, environment: ExecutorEnvironment, broker: Broker, started: str, assignment: Assignment | None
) -> int:
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
