"""How one executor comes by its process: forked from a template, started ahead, or fresh.

A fresh one may turn out to be a template itself; then the executor is the first that it forks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from flame.logs import get_logger
from flame.protocol.forking import COMMON_DATA_BYTES, ForkOrder, difference
from flame.protocol.records import BindingRecord
from flame.protocol.supervision import Assignment, ExecutorReport
from flame_services.executor_manager.berth import Berth
from flame_services.executor_manager.output import Captured
from flame_services.executor_manager.place import Place
from flame_services.executor_manager.process import Process
from flame_services.executor_manager.stock import Stock
from flame_services.executor_manager.template import ForkRefused, Template, TemplateLost
from flame_services.executor_manager.trial import FRESH, Trial
from flame_services.executor_manager.warm import Warm

log = get_logger("flame.manager.start")

FORKED: Final = "forked"


class Start:
    """One executor's start. `run` it once, and `clean_up` when its process is gone or none came of it."""

    def __init__(
        self, place: Place, binding: BindingRecord, stock: Stock, assignment: Assignment, devices: Sequence[str] = ()
    ) -> None:
        """Plan it, with these GPUs; nothing is touched yet."""
        self.process: Process | None = None
        """The process that its service runs in, as far as is known."""
        self.certain: Final = asyncio.Event()
        """Set unless `process` is about to become another: a report may come from that one."""
        self.how = ""
        """How that was started, and why so."""
        self.known_as = binding.executor
        """The executor that the process takes itself for until it has its session."""
        self.new_folder = ""
        """Where it is to go then; empty if it is there."""
        self.captured: Captured | None = None
        """What it writes."""
        self._place = place
        self._binding = binding
        self._stock = stock
        self._assignment = assignment
        self._devices = devices
        self._berth: Berth | None = None
        self._warm: Warm | None = None
        self._trial: Trial | None = None

    async def run(self, template: Template | None, began: Callable[[], None]) -> bool:
        """Start it, and return when it is certain which process it has; tell whether that knows its session already.

        ``template`` forks it, if there is one. ``began`` is called once there is a process that will report to be told
        of its session. Raises `LaunchRefused`.
        """
        try:
            if template is not None:
                forked = await self._fork(template, self._take_berth(may_be_template=False), began)
                if forked is not None:
                    return forked
            # What was started ahead has no GPU, and can't be given one any more.
            elif not self._devices and (warm := self._stock.take_warm()) is not None:
                self._take(warm)
                began()
                warm.give()
                return False
            return await self._start_process(began)
        finally:
            if self._berth is not None:
                self._berth.close()

    def heard(self, report: ExecutorReport) -> None:
        """Take note of a report: a process that reports is no template."""
        if self._trial is not None and not self._trial.over.is_set():
            self._trial.heard(report.started)
            self.how = f"{FRESH}{self._trial.hindrance}"

    def clean_up(self) -> None:
        """Let go of what the process had here. Safe to call again."""
        self.certain.set()
        captured, self.captured = self.captured, None
        if captured is not None:
            captured.end()
        berth, self._berth = self._berth, None
        if berth is not None:
            berth.leave()
        warm, self._warm = self._warm, None
        if warm is not None:
            warm.berth.leave()
            self._place.folder.leave_session(self._binding.session)
            self._place.folder.forget_process(self._binding.executor)
            self._place.stocks.given.pop(warm.name, None)

    def _set_process(self, process: Process) -> None:
        self.process = process
        self.certain.set()

    # ---- the ways

    async def _fork(self, template: Template, berth: Berth, began: Callable[[], None]) -> bool | None:
        """Have it forked; tell whether it knows its session, or return ``None`` if it could not be."""
        assignment = self._assignment
        order = ForkOrder(
            self._binding.executor,
            str(berth.launch.folder),
            difference(berth.launch.environment, template.environment),
            assignment=assignment if assignment.data_bytes <= COMMON_DATA_BYTES else None,
        )
        self.certain.clear()
        try:
            process = await template.fork(order, berth.out, berth.err)
        except (TemplateLost, ForkRefused) as error:
            log.warning("not forked", executor=self._binding.executor, reason=str(error))
            self.how = f"{FRESH}{error}"
            return None
        self.how = FORKED
        self._set_process(process)
        berth.note(process)
        if order.assignment is None:
            began()
        return order.assignment is not None

    def _take(self, warm: Warm) -> None:
        self._warm = warm
        self._place.stocks.given[warm.name] = self._binding.executor
        folder = self._place.folder.enter_session(self._binding.session)
        if not self._stock.record.spec.working_directory:
            self.new_folder = str(folder)
        self.captured = self._place.output.follow(self._binding, warm.berth.stdout, warm.berth.stderr, self._assignment)
        self._set_process(warm.process)
        self.known_as = warm.name
        self.how = f"warm: {self._stock.why_fresh()}"
        self._place.berths.note(self._binding.executor, warm.process)

    async def _start_process(self, began: Callable[[], None]) -> bool:
        """Start a process of its own, which may become the template."""
        berth = self._berth
        if berth is None:
            berth = self._take_berth(may_be_template=True)
        process = berth.start()
        self._set_process(process)
        began()
        if berth.template is None:
            self.how = self.how or f"{FRESH}{self._stock.why_fresh()}"
            return False
        self._trial = self._stock.try_process(berth.template, process, berth.launch.environment)
        template = await self._trial.settled()
        if template is None:
            return False
        berth.rule_template_out()
        forked = await self._fork(template, berth, began)
        return await self._start_process(began) if forked is None else forked

    def _take_berth(self, *, may_be_template: bool) -> Berth:
        path = self._stock.template_path() if may_be_template else None
        berth = self._place.berths.make(
            self._binding.executor, self._binding.session, self._stock.record.spec, path, self._devices
        )
        self._berth = berth
        self.captured = self._place.output.follow(self._binding, berth.stdout, berth.stderr, self._assignment)
        return berth
