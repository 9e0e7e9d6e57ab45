"""`flame.run`: where a service hands its process over to Flame."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Final

from flame.broker.jetstream import connect
from flame.service.environment import ExecutorEnvironment
from flame.service.executor import Executor, check_service

CONNECT_TIMEOUT_S: Final = 20.0
ORPHAN_GRACE_S: Final = 3.0
"""How long a process outlives the cluster that it belongs to: its manager ends it in order if it can."""


async def run(service: object) -> None:
    """Serve one session with ``service``, an instance of a `FlameService`, and return when that has ended.

    For the main program of a service: ``asyncio.run(flame.run(MyAgent()))``. An executor manager starts it.

    Raises:
        ConfigurationError: The process was not started by an executor manager, or ``service`` is no service.
        BrokerUnavailable: The broker can't be reached.
        SystemExit: The session could not be entered or left in order; the manager knows why.
    """
    check_service(service)
    environment = ExecutorEnvironment.read()
    if environment.lifetime_fd is not None:
        _end_with_cluster(environment.lifetime_fd)
    broker = await connect(
        environment.endpoint, name=f"flame-executor-{environment.executor}", timeout_s=CONNECT_TIMEOUT_S
    )
    try:
        status = await Executor(service, environment, broker).serve()
    finally:
        await broker.close()
    if status:
        sys.exit(status)


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
