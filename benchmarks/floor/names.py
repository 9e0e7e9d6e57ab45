"""What client and executors of the floor agree on."""

from __future__ import annotations

from typing import Final

TASKS: Final = "FLOOR_TASKS"
RESULTS: Final = "FLOOR_RESULTS"
CONSUMER: Final = "sess"

TASK: Final = "task.sess."
RESULT: Final = "ev.sess."
NOTE: Final = "note.sess."
"""Where a stored result is announced."""

IN_PROGRESS: Final = 2048
"""Tasks of the session that may be delivered and not acknowledged."""
LEASE_S: Final = 30
STANDING: Final = 256
"""Tasks that an executor asks for ahead."""
