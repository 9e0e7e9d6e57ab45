"""What is measured against each other: the same few operations of Flame and of the floor."""

from __future__ import annotations

from typing import Protocol

Processes = dict[str, list[int]]
"""Process ids by the part that they play."""


class Contestant(Protocol):
    """One session whose tasks return their input, with its executors ready."""

    def processes(self) -> Processes:
        """Return the processes that work for it, but for the client, which is this one."""

    async def invoke(self, data: bytes) -> bytes:
        """Run one task and return its output."""

    async def run_all(self, inputs: list[bytes]) -> None:
        """Store a task for each input, pipelined, and return when all are stored and have their results."""
