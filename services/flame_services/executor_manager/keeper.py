"""Keeping the leases of this node's executors, from their ledgers.

While user code blocks an executor's loop, its tasks stay its own: the manager extends their leases. What the executor
holds and has not started goes back, so that others can run it. When the executor is gone, everything it had goes back
at once, and what it had started counts as an attempt.

A task is handed back once, and only while its lease is certain: a stale one would be delivered a second time while its
present holder runs it.

A run that should have stopped and has not (see `stops`) ends with its executor's process; so does all that runs in an
executor which used too much memory. Such a task isn't handed back: it gets its record here, see `verdicts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.ledger import HELD, RUNNING, LedgerReader, Slot
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.codes import ReasonCode
from flame.protocol.messages import Attempts, TaskFault
from flame.protocol.records import BindingRecord
from flame_services.executor_manager.reasons import Reason
from flame_services.executor_manager.stops import Stops
from flame_services.executor_manager.verdicts import fail_task

log = get_logger("flame.manager.keeper")

PERIOD_S: Final = 0.1
"""Between two looks at the ledgers."""
BLOCKED_S: Final = 0.3
"""An executor whose loop has not turned for this long loses what it has not started."""


@dataclass(slots=True, eq=False)
class _Kept:
    """One executor's ledger."""

    binding: BindingRecord
    reader: LedgerReader
    certain_s: float
    extension_s: float
    extended: dict[tuple[int, int], float] = field(default_factory=dict)
    """When each slot's lease was last extended from here."""
    void_before: float = 0.0
    """Leases from before this are worth nothing: their consumer was replaced."""
    verdicts: dict[tuple[int, int], TaskFault | None] = field(default_factory=dict)
    """Runs that end with the process, and what their records are to say; ``None``: they have one."""
    verdict: TaskFault | None = None
    """What the records of all other runs are to say; ``None``: they are run again."""
    blameless: bool = False
    """That the process ends is no fault of what runs in it."""
    over: bool = False
    """The executor is gone."""

    def is_last(self, slot: Slot) -> bool:
        """Whether a run is not to be repeated."""
        return self.verdict is not None or (slot.number, slot.generation) in self.verdicts

    def fault_of(self, slot: Slot) -> TaskFault | None:
        """Return what the record of such a run is to say; ``None`` if it has one."""
        return self.verdicts.get((slot.number, slot.generation), self.verdict)

    def age(self, slot: Slot, now: float) -> float:
        """For how long a slot's lease has not been extended; infinite if it is void."""
        if slot.taken_at < self.void_before:
            return float("inf")
        return now - self.extended.get((slot.number, slot.generation), slot.taken_at)


def _ignore_stuck(executor: str, reason: Reason) -> None:
    """Stand in for whoever ends executors, until there is somebody."""


class LeaseKeeper:
    """All ledgers of a node."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        """Keep ledgers in ``folder``, which should be in memory."""
        self._broker = broker
        self._folder = folder
        self._kept: dict[str, _Kept] = {}
        self._stops = Stops(broker)
        self.on_stuck: Callable[[str, Reason], None] = _ignore_stuck
        """Called with the name of an executor whose process must end, since something in it does not stop."""

    def open(self, binding: BindingRecord, ack_wait_s: float) -> str:
        """Make an executor's ledger and return its path; empty if none can be made: then it keeps its own leases."""
        path = self._folder / f"{binding.executor}.ledger"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            reader = LedgerReader.create(path, time.monotonic(), ack_wait_s)
        except (OSError, FlameError) as error:
            log.warning("no ledger could be made; the executor keeps its own leases", path=str(path), reason=str(error))
            return ""
        certain_s, extension_s = ack_wait_s * defaults.LEASE_CERTAIN, defaults.extension_s(ack_wait_s)
        self._kept[binding.executor] = _Kept(binding, reader, certain_s, extension_s)
        return str(path)

    def consumer_replaced(self, consumer: str) -> None:
        """Forget the leases of a consumer that was made again: what it had delivered is delivered anew."""
        now = time.monotonic()
        for kept in self._kept.values():
            if kept.binding.consumer == consumer:
                kept.void_before = now

    def condemn(self, executor: str, fault: TaskFault) -> None:
        """Have every task that runs in an executor when its process ends fail like this."""
        kept = self._kept.get(executor)
        if kept is not None:
            kept.verdict = fault

    def excuse(self, executor: str) -> None:
        """Don't count it as an attempt of what runs in an executor that its process is ended."""
        kept = self._kept.get(executor)
        if kept is not None:
            kept.blameless = True

    def runs_nothing(self, executor: str) -> bool:
        """Whether it is known that an executor runs no task."""
        kept = self._kept.get(executor)
        if kept is None or not kept.reader.pid:
            return False
        return not any(slot.state == RUNNING for slot in kept.reader.slots())

    def on_reconnect(self) -> None:
        """Take note that the broker was away: something may have been cancelled meanwhile."""
        self._stops.forget_looks()

    async def run(self, period_s: float = PERIOD_S) -> None:
        """Look after the ledgers until cancelled, once every ``period_s``."""
        while True:
            await asyncio.sleep(period_s)
            if not self._broker.connected:
                continue  # nothing said now would be certain; the executors notice and keep their own
            for kept in list(self._kept.values()):
                with contextlib.suppress(FlameError):
                    if not kept.over:
                        await self._look(kept, time.monotonic())

    async def _look(self, kept: _Kept, now: float) -> None:
        kept.reader.keep(now, kept.certain_s)
        slots = kept.reader.slots()
        if not slots:
            kept.extended.clear()
            return
        for slot in slots:
            if kept.extension_s <= kept.age(slot, now) < kept.certain_s:
                kept.extended[slot.number, slot.generation] = now
                await self._broker.extend(slot.handle)
        if kept.over:
            return  # meanwhile
        if len(kept.extended) > 2 * len(slots):
            present = {(slot.number, slot.generation) for slot in slots}
            kept.extended = {key: at for key, at in kept.extended.items() if key in present}
        if now - kept.reader.loop_tick > BLOCKED_S and any(slot.state == HELD for slot in slots):
            stolen = kept.reader.steal()
            if stolen:
                log.info("took tasks from a blocked executor", executor=kept.binding.executor, tasks=len(stolen))
                await self._hand_back(kept, stolen, time.monotonic())
        await self._stops.look(kept.binding, slots, now, partial(self._on_stop, kept))

    def _on_stop(self, kept: _Kept, slot: Slot, fault: TaskFault | None) -> None:
        """Have the process end in which a run does not stop."""
        if (slot.number, slot.generation) in kept.verdicts:
            return
        kept.verdicts[slot.number, slot.generation] = fault
        task = slot.task.rpartition(".")[2]
        why = "was cancelled" if fault is None else "is over its time"
        text = f"task {task} {why} and did not stop within {defaults.TASK_STOP_S:g} s"
        self.on_stuck(kept.binding.executor, Reason(ReasonCode.TASK_STUCK, text))

    async def hand_over(self, executor: str) -> None:
        """Give back what an executor had whose process is gone, and let go of its ledger."""
        kept = self._kept.pop(executor, None)
        if kept is None:
            return
        kept.over = True
        try:
            await self._hand_over(kept)
        except FlameError as error:
            log.warning("tasks of a lost executor wait for their leases", executor=executor, reason=str(error))
        finally:
            kept.reader.close(remove=True)
            await self._leave_session(kept.binding.session)

    async def _leave_session(self, session: str) -> None:
        if self._stops.follows(session) and not any(k.binding.session == session for k in self._kept.values()):
            await self._stops.forget(session)

    def drop(self, executor: str) -> None:
        """Let go of an executor's ledger, if it is still kept; nothing is handed back."""
        kept = self._kept.pop(executor, None)
        if kept is not None:
            kept.reader.close(remove=True)

    async def settle_leftovers(self) -> None:
        """Give back what executors of an earlier manager had; their processes must be gone."""
        for path in self._folder.glob("*.ledger"):
            try:
                reader = LedgerReader(path)
            except FlameError:
                path.unlink(missing_ok=True)
                continue
            try:
                await self._settle_leftover(reader)
            finally:
                reader.close(remove=True)

    async def _settle_leftover(self, reader: LedgerReader) -> None:
        now = time.monotonic()
        # The manager that kept it extended each lease at most this long before its own last sign.
        kept_at = reader.manager_tick - defaults.extension_s(reader.ack_wait_s)
        for slot in reader.slots():
            try:
                if slot.state == RUNNING:
                    await self._count_attempt(slot.task)
                if now - max(slot.taken_at, kept_at) < reader.ack_wait_s * defaults.LEASE_CERTAIN:
                    await self._broker.hand_back(slot.handle)
            except FlameError as error:
                log.warning("a task of an earlier manager waits for its lease", task=slot.task, reason=str(error))

    async def _hand_over(self, kept: _Kept) -> None:
        slots = kept.reader.slots()
        started = [slot for slot in slots if slot.state == RUNNING]
        ending = [slot for slot in started if kept.is_last(slot)]
        again = [slot for slot in slots if slot not in ending]
        if not kept.blameless:
            # Before they are handed back: whoever gets one next reads how often it was lost.
            lost = [slot for slot in again if slot.state == RUNNING]
            await asyncio.gather(*(self._count_attempt(slot.task) for slot in lost))
        await self._hand_back(kept, again, time.monotonic())
        if slots:
            log.info(
                "handed a lost executor's tasks back",
                executor=kept.binding.executor,
                session=kept.binding.session,
                started=len(started),
                held=len(slots) - len(started),
                given_up=len(ending),
            )
        await asyncio.gather(*(self._end_task(kept, slot) for slot in ending))

    async def _end_task(self, kept: _Kept, slot: Slot) -> None:
        """Let go of a task that is not run again."""
        fault = kept.fault_of(slot)
        if fault is None:
            await self._broker.acknowledge(slot.handle)
        else:
            await fail_task(self._broker, kept.binding, slot, fault)

    async def _hand_back(self, kept: _Kept, slots: Iterable[Slot], now: float) -> None:
        for slot in slots:
            if kept.age(slot, now) < kept.certain_s:
                await self._broker.hand_back(slot.handle)

    async def _count_attempt(self, key: str) -> None:
        """Raise the number of executors that were lost while running a task."""
        bucket = self._broker.bucket(subjects.ATTEMPTS)
        while True:
            entry = await bucket.get(key)
            try:
                if entry is None or entry.value is None:
                    await bucket.create(key, Attempts(1).encode())
                else:
                    before = Attempts.decode(entry.value)
                    await bucket.update(key, replace(before, lost=before.lost + 1).encode(), entry.revision)
            except RevisionConflict:
                continue
            return
