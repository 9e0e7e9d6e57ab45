"""The guard of an embedded broker: a program of its own that ends the server when its owner is gone.

Run as ``python -I -S guard.py GRACE_S COMMAND...``, with little of the standard library, so that it starts
in 20 ms. The owner sees to the descriptors:

- standard input is the read end of the *lifetime pipe*. Only the owner holds the other end, so it reads as
  ended when the owner says so or dies, SIGKILL included.
- standard output is the *status pipe*: ``pid N`` once the server was started, ``exit N`` once it has ended
  (negative: by that signal).
- standard error is the server's log, and becomes the server's standard output and error.
- whatever else was passed on is inherited by the server (the lock of the store).

When the lifetime pipe ends, or on SIGTERM, SIGINT or SIGHUP, the server gets SIGTERM and GRACE_S later
SIGKILL; on SIGUSR1 it gets SIGKILL at once. The guard ends when the server has, with its exit status (128 + N
for signal N).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

LIFETIME = 0
STATUS = 1
LOG = 2

ASK = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KILL = signal.SIGUSR1

_SIGNALS = (*ASK, KILL, signal.SIGCHLD)

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the server until it ends and return its exit status, as a shell would give it."""
    grace_s, command = float(arguments[0]), arguments[1:]
    bell = _ring_on_signals()
    server = _start(command)
    _tell(f"pid {server}")
    status = _watch(server, bell, grace_s)
    _tell(f"exit {status}")
    return status if status >= 0 else 128 - status


def _ring_on_signals() -> int:
    """Return a descriptor that becomes readable, one byte each, with every signal that matters here.

    The signals stay blocked until the server was started; what the owner's thread had blocked no longer is.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, _SIGNALS)
    bell, clapper = os.pipe()
    for descriptor in (bell, clapper):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(clapper, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, lambda _number, _frame: None)
    return bell


def _start(command: list[str]) -> int:
    """Start the server and return its process id. One that can't be run is one that ends at once."""
    die_with_parent = _die_with_parent()
    guard = os.getpid()
    server = os.fork()
    if server == 0:
        _become(command, guard, die_with_parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return server


def _become(command: list[str], guard: int, die_with_parent: object) -> None:
    """Turn the forked child into the server; does not return."""
    try:
        for number in (*_SIGNALS, signal.SIGPIPE):  # Python ignores SIGPIPE, and that would be inherited
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # now none is swallowed by a handler of the guard
        if callable(die_with_parent):
            die_with_parent(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guard:  # it died before it could be noticed
                os._exit(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), LIFETIME)
        os.dup2(LOG, STATUS)
        os.execv(command[0], command)
    except OSError as error:
        os.write(LOG, f"can't run {command[0]}: {error.strerror}\n".encode("utf-8", "surrogateescape"))
    finally:
        os._exit(127)


def _die_with_parent() -> object:
    """Return the system call ``prctl``; None where there is none, and the owner's watch has to do."""
    if sys.platform != "linux":
        return None
    try:
        import ctypes  # noqa: PLC0415 (not every interpreter has it)
    except ImportError:
        return None
    return ctypes.CDLL(None).prctl


def _watch(server: int, bell: int, grace_s: float) -> int:
    """Wait for the server's end, bringing it about when it is time, and return its status."""
    poller = select.poll()
    poller.register(LIFETIME, select.POLLIN)
    poller.register(bell, select.POLLIN)
    kill_at: float | None = None
    while True:
        wait_ms = None if kill_at is None else max(0.0, kill_at - time.monotonic()) * 1000
        ready = {descriptor for descriptor, _ in poller.poll(wait_ms)}
        signals = os.read(bell, 4096) if bell in ready else b""
        if LIFETIME in ready:
            poller.unregister(LIFETIME)

        ended, status = os.waitpid(server, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if KILL in signals or (kill_at is not None and time.monotonic() >= kill_at):
            os.kill(server, signal.SIGKILL)
            kill_at = None
        elif kill_at is None and (LIFETIME in ready or any(number in signals for number in ASK)):
            os.kill(server, signal.SIGTERM)
            kill_at = time.monotonic() + grace_s


def _tell(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the owner is gone; the lifetime pipe says so too
        os.write(STATUS, f"{line}\n".encode("ascii"))


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # nothing is left to clean up
