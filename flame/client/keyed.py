"""Tasks that a key names: created again under the same key, they are the same task."""

from __future__ import annotations

import asyncio

from flame.client.task import TaskHandle
from flame.errors import InvalidArgument, KeyReused
from flame.protocol.ids import MAX_KEY
from flame.protocol.messages import ResultRecord


class KeyedTaskHandle(TaskHandle):
    """The handle of a task that was created under a key."""

    __slots__ = ("digest", "key", "storing")

    digest: bytes
    key: str
    storing: asyncio.Task[None] | None
    """Finds out whether the task exists, and stores it otherwise."""

    def name(self, key: str, digest: bytes) -> None:
        """Say under which key it was created, and what its input was."""
        self.key = key
        self.digest = digest
        self.storing = None

    def check(self, digest: bytes) -> None:
        """Raise `KeyReused` if the task of this key was created with another input; empty: that is not known."""
        if digest and digest != self.digest:
            raise self._reused()

    def check_stored(self) -> None:
        """Raise why the task could not be stored, or that it is another one."""
        if self.future.done() and (error := self.future.exception()) is not None:
            raise error

    def finish(self, record: ResultRecord) -> None:
        """Take the terminal record over, if it is of a task with the same input."""
        if record.digest and record.digest != self.digest:
            self.lose(self._reused())
        else:
            super().finish(record)

    def _reused(self) -> KeyReused:
        return KeyReused(
            f"session {self.session_id}: key {self.key!r} names a task that was created with another input"
            f" ({self.id}); take another key"
        )


def check_key(key: object) -> str:
    """Return a key if it can be one; otherwise raise `InvalidArgument`."""
    if not isinstance(key, str):
        raise InvalidArgument(f"key: expected str, got {type(key).__name__}")
    if not 0 < len(key) <= MAX_KEY:
        raise InvalidArgument(f"key: expected 1 to {MAX_KEY} characters, got {len(key)}")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"key {key[:60]!r}: is no text that UTF-8 could hold") from None
    return key
