"""What a node keeps ready to make executors of one application: its template, or processes that were started ahead."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

from flame.logs import get_logger
from flame.protocol.forking import Adopt
from flame.protocol.records import ApplicationRecord
from flame_services.executor_manager.berth import Berths
from flame_services.executor_manager.launch import LaunchRefused
from flame_services.executor_manager.process import ExecutorProcess
from flame_services.executor_manager.template import Template
from flame_services.executor_manager.trial import Trial
from flame_services.executor_manager.warm import Warm

log = get_logger("flame.manager.stock")

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 60.0
"""When something that was kept ready has died, no other is tried for so long."""
AHEAD_S: Final = 30.0
"""For how long after its last order a template keeps an executor ready that was forked ahead."""
ASKED_FOR: Final = "its application asks for it"
NO_TEMPLATE_NOW: Final = "its template died, and another one is tried later"
_END_S: Final = 1.0


class Stock:
    """The stock of one registration of an application; another specification has another stock."""

    def __init__(self, berths: Berths, record: ApplicationRecord) -> None:
        """Begin with nothing; `tend` fills it."""
        self.record: Final = record
        self.template: Template | None = None
        self.hindrance = ASKED_FOR if record.spec.fresh_process else ""
        """Why its executors are not forked, once that is known for good."""
        self._berths = berths
        self._loop = asyncio.get_running_loop()
        self._trial: Trial | None = None
        self._warm: dict[str, Warm] = {}
        self._templates: set[ExecutorProcess] = set()
        """The processes of all that live, those that are ending included."""
        self._failures = 0
        self._retry_at = 0.0
        self._closed = False
        self._errands: set[asyncio.Task[None]] = set()
        self._log = log.bind(application=record.name)

    def is_for(self, record: ApplicationRecord) -> bool:
        """Whether this was made for the registration that a record tells of."""
        return (record.created, record.spec) == (self.record.created, self.record.spec)

    # ---- the template

    async def ready_template(self) -> Template | None:
        """Return the template, waiting for one that is being started; ``None`` if there is none."""
        while self.template is None and self._trial is not None:
            await self._trial.over.wait()
        return self.template

    def template_path(self) -> Path | None:
        """Return where the next process is to listen if it can be a template; ``None`` if none is to be one now."""
        if self.hindrance or self.template or self._trial or self._closed or self._loop.time() < self._retry_at:
            return None
        return self._berths.folder.templates / f"{self.record.name}.{secrets.token_hex(6)}"

    def try_process(self, path: Path, process: ExecutorProcess, environment: Mapping[str, str]) -> Trial:
        """Find out whether a process that was told of ``path`` becomes the template."""
        self._trial = Trial(path, process, environment, self._on_trial)
        return self._trial

    def why_fresh(self) -> str:
        """Say why an executor is not forked now."""
        return self.hindrance or NO_TEMPLATE_NOW

    def _on_trial(self, trial: Trial) -> None:
        self._trial = None
        if trial.template is not None:
            self._take_template(trial.template)
        elif trial.hindrance:
            self.hindrance = trial.hindrance
            self._log.info("executors can't be forked", reason=self.hindrance)
        else:
            self._back_off()
        self.tend()

    def _take_template(self, template: Template) -> None:
        self._failures = 0
        self.template = template
        self._templates.add(template.process)
        template.on_lost = self._on_lost
        self._berths.note(_note(template), template.process)
        with contextlib.ExitStack() as closing:
            try:
                output = self._berths.folder.open_template_output(self.record.name)
                closing.callback(os.close, output)
                template.adopt(self._wishes(), output)
            except OSError as error:
                self._log.warning("a template goes on writing where its first executor does", reason=str(error))
        self._log.info("executors are forked from a template", pid=template.process.pid)
        if self._closed:
            self._end_template()

    def _wishes(self) -> Adopt:
        wanted = self.record.spec.warm_instances
        return Adopt(str(self._berths.folder.templates), max(1, wanted), 0.0 if wanted else AHEAD_S)

    def _end_template(self) -> None:
        template, self.template = self.template, None
        if template is not None:
            self._spawn(template.end())

    def _on_lost(self, template: Template) -> None:
        self._templates.discard(template.process)
        self._berths.folder.forget_process(_note(template))
        if self.template is template:  # it was not ended by us
            self.template = None
            self._back_off()

    def _back_off(self) -> None:
        self._failures += 1
        wait_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(self._failures - 1, 10))
        self._retry_at = self._loop.time() + wait_s

    # ---- what is started ahead

    def warm(self, name: str) -> Warm | None:
        """Return the process that was started ahead under a name, if no executor has it."""
        return self._warm.get(name)

    def take_warm(self) -> Warm | None:
        """Take a process that was started ahead, one that is ready if there is any."""
        takeable = [warm for warm in self._warm.values() if warm.takeable]
        if not takeable:
            return None
        best = max(takeable, key=lambda warm: warm.ready)
        del self._warm[best.name]
        self.tend()
        return best

    def tend(self) -> None:
        """See to it that what should be ready is, and that a template nobody has used for long ends."""
        now = self._loop.time()
        if self._closed:
            return
        wanted = self.record.spec.warm_instances
        if self.template is not None:
            idle_s = self._berths.settings.template_idle_s
            if not wanted and self.template.unused and now - self.template.used_at > idle_s:
                self._log.info("ending a template that nobody uses", idle_s=idle_s)
                self._end_template()
        elif now >= self._retry_at and self._trial is None:
            for _ in range((wanted if self.hindrance else min(wanted, 1)) - len(self._warm)):
                self._start_ahead()

    def _start_ahead(self) -> None:
        """Start a process for no executor yet; if it can be the template it will."""
        name = f"w{secrets.token_hex(6)}"
        path = self.template_path()
        try:
            berth = self._berths.make(name, f"~{name}", self.record.spec, path)
            try:
                process = berth.start()
            except LaunchRefused:
                berth.leave()
                berth.remove_output()
                raise
        except LaunchRefused as error:
            self._log.warning("nothing can be started ahead", reason=str(error))
            self._back_off()
            return
        berth.close()
        trial = None if path is None else self.try_process(path, process, berth.launch.environment)
        warm = self._warm[name] = Warm(berth, process, trial)
        self._spawn(self._look_after(warm))

    async def _look_after(self, warm: Warm) -> None:
        """Clean up behind a process that became the template, or ended before an executor had it."""
        if warm.trial is not None and await warm.trial.settled() is not None:
            self._warm.pop(warm.name, None)
        else:
            status = await asyncio.shield(warm.process.ended)
            if self._warm.pop(warm.name, None) is None:
                return  # an executor has it, and sees to its end
            if not self._closed:
                self._log.warning("a process that was started ahead has ended", pid=warm.process.pid, status=status)
                self._back_off()
        warm.berth.leave()
        warm.berth.remove_output()

    # ---- the end

    def close(self, reason: str) -> None:
        """Keep nothing ready any more, since ``reason``. Executors live on, and a template until they have ended."""
        if self._closed:
            return
        self._closed = True
        self.hindrance = self.hindrance or reason
        self._end_template()
        for warm in tuple(self._warm.values()):
            self._spawn(self._end(warm.process))

    @property
    def is_gone(self) -> bool:
        """Whether nothing of what was kept ready is left."""
        return not (self._warm or self._templates)

    async def gone(self) -> None:
        """Return when nothing of what was kept ready is left, once it is closed."""
        while self._errands:
            await asyncio.wait(self._errands)

    def kill(self) -> None:
        """End at once what is left."""
        for process in (*(warm.process for warm in self._warm.values()), *self._templates):
            process.signal(signal.SIGKILL)

    async def _end(self, process: ExecutorProcess) -> None:
        process.signal(signal.SIGTERM)
        _, late = await asyncio.wait([process.ended], timeout=_END_S)
        if late:
            process.signal(signal.SIGKILL)

    def _spawn(self, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)


def _note(template: Template) -> str:
    """Return the name under which a template's process is noted: no executor has one like it."""
    return f"~{template.path.name.replace('.', '-')}"
