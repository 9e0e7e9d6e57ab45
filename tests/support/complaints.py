"""What a program that is run with ``-X dev`` has to complain of."""

from __future__ import annotations

_SLOW_STEP = "Executing <"


def complaints(stderr: str) -> str:
    """Return what it wrote to standard error, but for asyncio's notes that a step took long: the machine is busy."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith(_SLOW_STEP))
