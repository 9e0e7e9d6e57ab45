"""A template without a service, for tests of the role itself: its executors do what their environment says.

Arguments: the path to listen at, and settings of `flame.service.template` as NAME=SECONDS.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from flame.protocol.forking import ForkOrder, decode_for_template
from flame.service import sockets, template
from flame.service.forked import carry_out, end_process

SETTINGS = dict(argument.split("=") for argument in sys.argv[2:])


def be_executor(channel: socket.socket) -> NoReturn:
    channel.setblocking(True)
    data, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, sockets.STREAMS)
    if not data:
        os._exit(0)
    order = decode_for_template(data)
    assert isinstance(order, ForkOrder)
    carry_out(order, *descriptors)
    for descriptor in (*descriptors, channel.detach()):
        os.close(descriptor)
    tell(order.executor)
    if "SIGNAL" in os.environ:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    if "SLEEP" in os.environ:
        time.sleep(float(os.environ["SLEEP"]))
    end_process(int(os.environ.get("EXIT", "0")))


def tell(executor: str) -> None:
    """Write what can be seen from inside."""
    # The loop that the template was called from has left its own three, which nobody touches.
    descriptors = open_descriptors() - INHERITED
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    lines = (
        f"executor {executor}",
        f"folder {Path.cwd()}",
        f"set {os.environ.get('GIVEN')} {os.environ.get('TAKEN')} {os.environ.get('KEPT')}",
        f"leads {os.getpid() == os.getpgrp() == os.getsid(0)}",
        f"files {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}",
        f"descriptors {len(descriptors)}",
        f"default handlers {all(handler is signal.SIG_DFL for handler in handlers)}",
    )
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def open_descriptors() -> set[int]:
    """Return those of this process, that of the folder being read included."""
    return {int(file.name) for file in Path("/proc/self/fd").iterdir()}


def refuse() -> int:
    raise BlockingIOError(11, "Resource temporarily unavailable")


INHERITED: set[int] = set()


async def main() -> None:
    INHERITED.update(open_descriptors())
    signal.signal(signal.SIGTERM, lambda *_: None)
    for name, value in SETTINGS.items():
        if name == "REFUSE":
            os.fork = refuse
        else:
            setattr(template, name, float(value))
    lifetime = os.environ.get("LIFETIME")
    template.Template(sys.argv[1], int(lifetime) if lifetime else None, be_executor).run()


sys.stdout.write("not written yet; ")
asyncio.run(main())
