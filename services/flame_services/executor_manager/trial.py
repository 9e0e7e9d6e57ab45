"""A process that was started in a double role: it will be a template if it can, otherwise an executor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from flame_services.executor_manager.process import ExecutorProcess
from flame_services.executor_manager.template import Template, reach

UNAWARE: Final = "its service knows of no templates"
"""Of one that reports as an executor and doesn't say why."""
FRESH: Final = "fresh: "
_LOOK_S: Final = 0.005


class Trial:
    """Finds out which of the two a process has become. It shows by listening, by reporting, or by ending."""

    def __init__(
        self, path: Path, process: ExecutorProcess, environment: Mapping[str, str], decided: Callable[[Trial], None]
    ) -> None:
        """Watch a process that was told of ``path``; ``decided`` is called once, at the end."""
        self.process: Final = process
        self.template: Template | None = None
        """What it has become; ``None`` if it did not, or has not yet."""
        self.hindrance = ""
        """Why it is an executor, if it is one."""
        self.over: Final = asyncio.Event()
        self._path = path
        self._environment = dict(environment)
        self._decided = decided
        self._looking = asyncio.create_task(self._look(), name=f"trial of process {process.pid}")
        process.ended.add_done_callback(lambda _: self._decide())

    def heard(self, started: str) -> None:
        """Take note that it has reported, and so is an executor; ``started`` is what it says of how that came."""
        if not self.over.is_set():
            self.hindrance = started.removeprefix(FRESH) or UNAWARE
            self._decide()

    async def settled(self) -> Template | None:
        """Return when it is decided what it is; the template, if it is one."""
        await self.over.wait()
        return self.template

    async def _look(self) -> None:
        """Try to reach it as a template: it listens when it has become one."""
        while not self.over.is_set():
            connection = reach(self._path, self.process)
            if connection is not None:
                self.template = Template(self._path, self.process, self._environment, connection)
                self._decide()
            else:
                await asyncio.sleep(_LOOK_S)

    def _decide(self) -> None:
        if not self.over.is_set():
            self.over.set()
            self._decided(self)
