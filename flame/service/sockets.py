"""Unix sockets that keep messages apart, at paths of any length.

The system takes about 100 bytes for a path, and work folders are longer than that; a name inside a folder that is open
already is not.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

STREAMS: Final = 2
"""Descriptors that go with a message at most: standard output and error."""
_DATAGRAM: Final = 1024 * 1024


def listen(path: str) -> socket.socket:
    """Listen at a path to which only this user can connect; raise `OSError` if that can't be."""
    listener = _socket()
    try:
        with _short(path) as short:
            listener.bind(short)
        Path(path).chmod(0o600)  # before `listen`: until then nobody can connect
        listener.listen(8)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: str) -> socket.socket:
    """Connect to whoever listens at a path; raise `OSError` if nobody does."""
    connection = _socket()
    try:
        with _short(path) as short:
            connection.connect(short)
    except BaseException:
        connection.close()
        raise
    return connection


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return the next message and the descriptors that came with it, which the caller closes; empty: that was all.

    Raises `BlockingIOError` if there is none now.
    """
    data, descriptors, _, _ = socket.recv_fds(
        connection, _DATAGRAM, STREAMS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    )
    return data, descriptors


def _socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.setblocking(False)
    return made


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    folder, name = os.path.split(path)
    descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)
