"""Which processes may be forked. Each is a process of its own, since what is asked is about the whole of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

_SCRIPT = """
import asyncio, os, socket, tempfile, threading, time
from flame.service import forkable
kept = []
stop = threading.Event()

def ticking():
    stop.wait()

async def main():
    {body}
    print(forkable.hindrance(), flush=True)
    os._exit(0)

if __name__ == "__main__":
    asyncio.run(main())
"""


def hindrance_after(body: str) -> str:
    """Return what hinders the fork of a process that has done something."""
    script = _SCRIPT.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ").strip())
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    "body",
    [
        "pass",
        "kept.append(socket.socketpair())",
        "kept.append(open('/dev/null'))",
        """
        thread = threading.Thread(target=ticking)
        thread.start()
        os.register_at_fork(before=lambda: (stop.set(), thread.join()))
        """,
    ],
    ids=["nothing", "a pair of sockets", "a file", "threads that end before a fork"],
)
def test_what_is_at_rest_may_be_forked(body: str) -> None:
    assert hindrance_after(body) == ""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "threading.Thread(target=ticking, name='ticker', daemon=True).start()",
            "1 other thread (ticker)",
        ),
        (
            "for number in range(5): threading.Thread(target=ticking, name=f't{number}', daemon=True).start()",
            "5 other threads (t0, t1, t2, …)",
        ),
        (
            "kept.append(asyncio.create_task(asyncio.sleep(9), name='sleeper'))",
            "1 other asyncio task (sleeper)",
        ),
        (
            """
            listener = socket.create_server(("127.0.0.1", 0))
            kept.extend((listener, socket.create_connection(listener.getsockname())))
            """,
            "2 open sockets (at 127.0.0.1 port ",
        ),
        ("kept.append(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))", "1 open socket (at :: port 0)"),
        (
            """
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(tempfile.mkdtemp() + "/here")
            kept.append(listener)
            """,
            "1 open socket (/",
        ),
        (
            "kept.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))",
            "1 open socket (",
        ),
        (
            """
            forkable._TRIAL_S = 0.2
            threading.Thread(target=ticking, daemon=True).start()
            os.register_at_fork(after_in_child=lambda: time.sleep(60))
            """,
            "a fork of it hangs, for 0.2 s at least",
        ),
    ],
    ids=["a thread", "threads", "a task", "a connection", "a socket", "a named one", "a kernel's", "a fork that hangs"],
)
def test_what_is_not_says_why(body: str, reason: str) -> None:
    assert hindrance_after(body).startswith(reason)
