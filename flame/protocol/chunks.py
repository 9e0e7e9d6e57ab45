"""What a task emits while it runs, chunk by chunk, and the order in which a listener is to hear it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from flame.protocol import defaults
from flame.protocol.codec import VERSION, pack
from flame.protocol.fields import frame, read_bytes, read_number


@dataclass(slots=True)
class ChunkMessage:
    """A chunk, as an executor stores it."""

    index: int
    """Its place among the chunks of its run, from 0."""
    attempt: int
    """Which run it is of, as in `ResultRecord`."""
    started: float
    """When that run began, as in `ResultRecord`: together with ``attempt`` this tells runs apart."""
    data: bytes = b""

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        return pack(
            {
                "v": VERSION,
                "kind": "chunk",
                "index": self.index,
                "attempt": self.attempt,
                "started": self.started,
                "data": self.data,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> ChunkMessage:
        """Read one; raise `MalformedMessage` if it is none."""
        fields = frame(data, "chunk")
        return cls(
            int(read_number(fields, "index", 0)),
            int(read_number(fields, "attempt", 1)),
            float(read_number(fields, "started", 0.0)),
            read_bytes(fields, "data"),
        )


class RunKey(NamedTuple):
    """Tells the runs of one task apart: two may have the same number if an executor was lost and lived on."""

    attempt: int
    started: float


class MissingChunk(Exception):
    """A chunk that is to come next is not kept any more. Users get `flame.errors.ChunksGone` instead."""


_REACH: Final = defaults.CHUNK_WINDOW
"""A chunk that is not stored when one that is so much later is never will be."""


class ChunkOrder:
    """Puts what is stored of one task into the order in which it is handed on, run by run.

    Of each run chunks come in their order, each once, whatever was stored twice or out of turn. A run that has begun is
    left for good when a later one begins, except for the one whose record the task has: that one counts in the end.
    """

    def __init__(self) -> None:
        """Begin with no run."""
        self._run: RunKey | None = None
        self._next = 0
        self._early: dict[int, bytes] = {}
        self._left: set[RunKey] = set()
        self._final: RunKey | None = None
        self._count = 0
        self._alone = False
        """Only the run that counts is of interest any more."""

    @property
    def complete(self) -> bool:
        """Whether everything of the run that counts was handed on."""
        return self._final is not None and (
            self._count == 0 or (self._run == self._final and self._next >= self._count)
        )

    @property
    def restarted(self) -> bool:
        """Whether the run that counts has emitted nothing, but another one had."""
        return self._final is not None and self._count == 0 and self._run not in (None, self._final)

    def end(self, final: RunKey, count: int) -> bool:
        """Take over which run the output is of, and how many chunks it emitted.

        Returns whether everything is to be read again for it, from the start.
        """
        self._final = final
        self._count = count
        if not self._count or final not in self._left:
            return False
        self._alone = True
        self._run = None
        self._next = 0
        self._early = {}
        return True

    def take(self, message: ChunkMessage) -> list[ChunkMessage]:
        """Take the next one that is stored; return what can be handed on now. Raises `MissingChunk`."""
        run = RunKey(message.attempt, message.started)
        if run != self._run and not self._begin(run):
            return []
        ready = []
        if message.index == self._next:
            ready.append(message)
            self._next += 1
            while self._next in self._early:
                ready.append(ChunkMessage(self._next, *run, self._early.pop(self._next)))
                self._next += 1
        elif message.index - self._next >= _REACH:
            if self._final in (None, run):
                raise MissingChunk(f"chunk {self._next} of attempt {run.attempt}")
        elif message.index > self._next:
            self._early[message.index] = message.data
        return ready

    def _begin(self, run: RunKey) -> bool:
        """Go over to another run, if that is later or the one that counts; otherwise leave that."""
        if run in self._left and not self._alone:
            return False
        if self._final is not None and run != self._final and (self._alone or self._run == self._final):
            return False
        if self._run is not None and run.attempt < self._run.attempt and run != self._final:
            self._left.add(run)
            return False
        if self._run is not None:
            self._left.add(self._run)
        self._run = run
        self._next = 0
        self._early = {}
        return True
