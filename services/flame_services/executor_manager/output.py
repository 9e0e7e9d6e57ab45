"""What executors write to standard output and error, on its way to the log stream of their application.

Executors append to files, never to a pipe: a slow or absent reader can't hold them up, and a manager that dies
doesn't break them. This end reads behind them. If the log stream is full or missing they don't notice either.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from flame.broker.seam import Broker
from flame.credentials import HIDDEN, check_secrets, texts_to_hide
from flame.errors import FlameError
from flame.logs import get_logger
from flame.protocol import subjects
from flame.protocol.records import BindingRecord
from flame.protocol.supervision import Assignment, LogChunk
from flame_services.executor_manager.captured_file import CapturedFile

log = get_logger("flame.manager.output")

LOOK_S: Final = 0.1
QUIET_LOOK_S: Final = 0.5
"""Between looks at the files of an executor that has written nothing for `QUIET_S`."""
QUIET_S: Final = 5.0
STORE_TIMEOUT_S: Final = 5.0
RETRY_S: Final = 2.0
LINGER_S: Final = 60.0
"""How long files are kept after their executor's end, if they can't be published."""
REASON_BYTES: Final = 4096


class Captured:
    """The output of one executor."""

    def __init__(self, binding: BindingRecord, stdout: Path, stderr: Path, secrets: Sequence[bytes] = ()) -> None:
        """Follow two files on behalf of an executor, of whose session ``secrets`` nothing is to be published."""
        self._secrets = secrets
        self.executor: Final = binding.executor
        self.subject: Final = subjects.log(binding.application, binding.session, binding.executor)
        self.stderr: Final = CapturedFile(stderr, "stderr")
        self.files: Final = (CapturedFile(stdout, "stdout"), self.stderr)
        self.ended_at: float | None = None
        self.look_at = 0.0
        """When to look next, monotonic."""
        self.written_at = time.monotonic()

    def end(self) -> None:
        """Say that the process is gone: publish the rest, then remove the files."""
        self.ended_at = time.monotonic()
        self.look_at = 0.0

    def last_output(self) -> bytes:
        """Return the end of what it wrote to standard error."""
        return self.without_secrets(self.stderr.tail(REASON_BYTES))

    def without_secrets(self, output: bytes) -> bytes:
        """Return some of the output with its session's secrets hidden, where they stand as they are."""
        for secret in self._secrets:
            output = output.replace(secret, HIDDEN.encode())
        return output

    def chunks(self, now: float) -> list[tuple[CapturedFile, bytes]]:
        """Look, and return what is to be published."""
        ended = self.ended_at is not None
        found = [(file, chunk) for file in self.files if (chunk := file.next_chunk(now, ended))]
        if found:
            self.written_at = now
        self.look_at = now + (QUIET_LOOK_S if now - self.written_at > QUIET_S else LOOK_S)
        return found

    def is_done(self, now: float) -> bool:
        """Whether nothing is left to do for it."""
        if self.ended_at is None:
            return False
        return not any(file.unread for file in self.files) or now - self.ended_at > LINGER_S

    def remove(self) -> None:
        """Delete the files."""
        for file in self.files:
            file.remove()


class OutputFollower:
    """Publishes the output of a node's executors."""

    def __init__(self, broker: Broker) -> None:
        """Bind to a broker; `run` does the work."""
        self._broker = broker
        self._captured: set[Captured] = set()

    def follow(
        self, binding: BindingRecord, stdout: Path, stderr: Path, assignment: Assignment | None = None
    ) -> Captured:
        """Begin to follow an executor's output; what is secret in ``assignment`` isn't published."""
        captured = Captured(binding, stdout, stderr, () if assignment is None else _secrets(assignment))
        self._captured.add(captured)
        return captured

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            if not await self.publish_due():
                await asyncio.sleep(LOOK_S)

    async def drain(self) -> None:
        """Publish what is left of ended executors, unless there is no broker."""
        while self._broker.connected and self._captured:
            if not await self.publish_due():
                await asyncio.sleep(LOOK_S / 10)

    def remove_all(self) -> None:
        """Delete what is left."""
        for captured in self._captured:
            captured.remove()
        self._captured.clear()

    async def publish_due(self) -> bool:
        """Publish one chunk of each file that is due; tell whether there was any."""
        now = time.monotonic()
        sent = []
        for captured in [each for each in self._captured if each.look_at <= now]:
            chunks = captured.chunks(now)
            if self._broker.connected:
                sent += [(captured, file, chunk) for file, chunk in chunks]
            elif chunks:  # they would fill the connection's buffer
                captured.look_at = now + RETRY_S
            if captured.is_done(now):
                captured.remove()
                self._captured.discard(captured)
        results = await asyncio.gather(
            *(self._store(captured, file, chunk) for captured, file, chunk in sent), return_exceptions=True
        )
        for (captured, file, chunk), result in zip(sent, results, strict=True):
            if isinstance(result, FlameError):
                captured.look_at = now + RETRY_S
                log.debug("output not published", executor=captured.executor, reason=str(result))
            elif isinstance(result, BaseException):
                raise result
            else:
                file.advance(len(chunk))
                captured.look_at = min(captured.look_at, now)
        return bool(sent)

    async def _store(self, captured: Captured, file: CapturedFile, chunk: bytes) -> None:
        messages: Sequence[bytes] = (chunk,)
        if file.dropped:
            log.warning("output dropped", executor=captured.executor, stream=file.stream, bytes=file.dropped)
            messages = (f"[{file.dropped} bytes of output were dropped here]\n".encode(), chunk)
        for data in messages:
            message = LogChunk(file.stream, time.time(), captured.without_secrets(data)).encode()
            await self._broker.store(captured.subject, message, STORE_TIMEOUT_S)


def _secrets(assignment: Assignment) -> tuple[bytes, ...]:
    groups = (check_secrets("", assignment.credentials), check_secrets("", assignment.delegations))
    return tuple(text.encode() for text in texts_to_hide(*groups))
