"""Tasks that a key names: created again under the same key, they are the same task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from flame.client.task import TaskHandle
from flame.errors import FlameError, InvalidArgument, KeyReused
from flame.protocol.ids import MAX_KEY
from flame.protocol.messages import ResultRecord

AT_ONCE: Final = 100
"""Tasks with keys that are asked about at the same time."""


class KeyedTaskHandle(TaskHandle):
    """The handle of a task that was created under a key."""

    __slots__ = ("digest", "key", "large", "storing")

    digest: bytes
    key: str
    large: bytes
    """Its input, if that has to be stored in parts before the task is."""
    storing: asyncio.Task[None] | None
    """Finds out whether the task exists, and stores it otherwise."""

    def name(self, key: str, digest: bytes, large: bytes) -> None:
        """Say under which key it was created, and what its input was."""
        self.key = key
        self.digest = digest
        self.large = large
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

    def mark_stored(self, error: FlameError | None) -> None:
        """Note that the task is stored, or could not be."""
        self.large = b""
        super().mark_stored(error)

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


async def submit_each(
    submit: Callable[[bytes | str, str | None], Awaitable[TaskHandle]],
    inputs: Iterable[bytes | str],
    keys: Iterable[str | None],
) -> list[TaskHandle]:
    """Submit tasks under keys and return their handles, in order; raise the first error when all were submitted.

    Raises `InvalidArgument`, with nothing sent, if there is not one key for each input.
    """
    inputs, keys = list(inputs), checked_keys(keys)
    if len(keys) != len(inputs):
        raise InvalidArgument(f"keys: expected one for each of {len(inputs)} inputs, got {len(keys)}")
    handles: list[TaskHandle] = []
    error: BaseException | None = None
    for first in range(0, len(inputs), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        submitting = map(submit, inputs[some], keys[some])
        for outcome in await asyncio.gather(*submitting, return_exceptions=True):
            if isinstance(outcome, BaseException):
                error = error or outcome
            else:
                handles.append(outcome)
    if error is not None:
        raise error
    return handles


def checked_keys(keys: Iterable[str | None]) -> list[str | None]:
    """Return keys as a list if they can be that: one for each task, ``None`` for one without."""
    if isinstance(keys, str | bytes) or not isinstance(keys, Iterable):
        raise InvalidArgument(f"keys: expected one key for each input, got {type(keys).__name__} {repr(keys)[:60]}")
    return [None if key is None else check_key(key) for key in keys]
