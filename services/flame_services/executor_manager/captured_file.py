"""One file that a process appends its output to, read from behind and freed as it is read."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Any, Final

CHUNK_BYTES: Final = 64 * 1024
KEPT_BYTES: Final = 64 * 1024
"""What is read and kept all the same, for the reason of an executor's end."""
FREED_BYTES: Final = 1024 * 1024
"""Space is given back in pieces of this size."""
QUOTA_BYTES: Final = 64 * 1024 * 1024
"""What may wait to be read; of more, the oldest is dropped."""
PARTIAL_LINE_S: Final = 0.2
"""How long the beginning of a line waits for its end."""


def cut(data: bytes, complete: bool) -> int:
    """Return how much of ``data`` to publish: whole lines.

    The beginning of a line waits for its end, unless it fills a chunk or is ``complete``: nothing follows soon.
    """
    lines = data.rfind(b"\n") + 1
    if len(data) >= CHUNK_BYTES:
        return lines or len(data)
    return len(data) if complete else lines


class CapturedFile:
    """What a process wrote to one of its standard streams.

    It is opened for each reading only: a node has hundreds of them, and most are silent.
    """

    def __init__(self, path: Path, stream: str) -> None:
        """Follow a file from its beginning; ``stream`` is ``stdout`` or ``stderr``."""
        self.path: Final = path
        self.stream: Final = stream
        self.dropped = 0
        """Bytes that were not published and won't be, since the last chunk."""
        self._offset = 0
        self._freed = 0
        self._size = 0
        self._grew_at = 0.0

    @property
    def unread(self) -> int:
        """Bytes that were there at the last look and are not published."""
        return self._size - self._offset

    def next_chunk(self, now: float, ended: bool) -> bytes:
        """Look, and return what is to be published next; empty if there is nothing.

        ``ended``: the process is gone and no more will come. What is returned comes again until `advance`.
        """
        self._look(now)
        if self.unread > QUOTA_BYTES:
            self.dropped += self.unread - QUOTA_BYTES
            self._offset = self._size - QUOTA_BYTES
            self._free()
        if self.unread == 0:
            return b""
        data = self._read(self._offset, CHUNK_BYTES)
        return data[: cut(data, complete=ended or now - self._grew_at >= PARTIAL_LINE_S)]

    def advance(self, length: int) -> None:
        """Take note that a chunk was published."""
        self._offset += length
        self.dropped = 0
        self._free()

    def tail(self, length: int) -> bytes:
        """Return the last bytes that the process wrote."""
        try:
            size = self.path.stat().st_size
        except OSError:
            return b""
        return self._read(max(0, size - length), length)

    def remove(self) -> None:
        """Delete the file."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _look(self, now: float) -> None:
        try:
            size = self.path.stat().st_size
        except OSError:
            return
        if size != self._size:
            self._grew_at = now
            self._size = size
        if size < self._offset:  # somebody emptied it
            self._offset = self._freed = 0

    def _read(self, offset: int, length: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                return os.pread(file.fileno(), length, offset)
        except OSError:
            return b""

    def _free(self) -> None:
        """Give the space of what was read back to the disk. Positions stay, so the writer notices nothing."""
        until = (self._offset - KEPT_BYTES) // FREED_BYTES * FREED_BYTES
        if until > self._freed and free_space(self.path, self._freed, until - self._freed):
            self._freed = until


_PUNCH_HOLE_KEEP_SIZE: Final = 0x03


def _find_fallocate() -> Any:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    function = getattr(library, "fallocate64", None)
    if function is None and sys.maxsize > 2**32:  # there, the plain one takes 64 bits
        function = getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


_fallocate = _find_fallocate()


def free_space(path: Path, offset: int, length: int) -> bool:
    """Free a part of a file, which reads as zeros from now on; tell whether the system can."""
    if _fallocate is None:
        return False
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        return bool(_fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, offset, length) == 0)
    finally:
        os.close(descriptor)
