"""Keeping the leases of this node's executors, from their ledgers.

While user code blocks an executor's loop, its tasks stay its own: the manager extends their leases. What the executor
holds and has not started goes back, so that others can run it. When the executor is gone, everything it had goes back
at once, and what it had started counts as an attempt.

A task is handed back once, and only while its lease is certain: a stale one would be delivered a second time while its
present holder runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flame.broker.errors import RevisionConflict
from flame.broker.seam import Broker
from flame.errors import FlameError
from flame.ledger import HELD, RUNNING, LedgerReader, Slot
from flame.logs import get_logger
from flame.protocol import defaults, subjects
from flame.protocol.messages import Attempts
from flame.protocol.records import BindingRecord

log = get_logger("flame.manager.keeper")

PERIOD_S: Final = 0.1
"""Between two looks at the ledgers."""
BLOCKED_S: Final = 0.3
"""An executor whose loop has not turned for this long loses what it has not started."""
SHARED_MEMORY: Final = Path("/dev/shm")


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

    def age(self, slot: Slot, now: float) -> float:
        """For how long a slot's lease has not been extended; infinite if it is void."""
        if slot.taken_at < self.void_before:
            return float("inf")
        return now - self.extended.get((slot.number, slot.generation), slot.taken_at)


class LeaseKeeper:
    """All ledgers of a node."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        """Keep ledgers in ``folder``, which should be in memory."""
        self._broker = broker
        self._folder = folder
        self._kept: dict[str, _Kept] = {}

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

    async def run(self) -> None:
        """Look after the ledgers until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            if not self._broker.connected:
                continue  # nothing said now would be certain; the executors notice and keep their own
            for kept in list(self._kept.values()):
                with contextlib.suppress(FlameError):
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
        if len(kept.extended) > 2 * len(slots):
            present = {(slot.number, slot.generation) for slot in slots}
            kept.extended = {key: at for key, at in kept.extended.items() if key in present}
        if now - kept.reader.loop_tick > BLOCKED_S and any(slot.state == HELD for slot in slots):
            stolen = kept.reader.steal()
            if stolen:
                log.info("took tasks from a blocked executor", executor=kept.binding.executor, tasks=len(stolen))
                await self._hand_back(kept, stolen, time.monotonic())

    async def hand_over(self, executor: str) -> None:
        """Give back what an executor had whose process is gone, and let go of its ledger."""
        kept = self._kept.pop(executor, None)
        if kept is None:
            return
        try:
            await self._hand_over(kept)
        except FlameError as error:
            log.warning("tasks of a lost executor wait for their leases", executor=executor, reason=str(error))
        finally:
            kept.reader.close(remove=True)

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
        # Before they are handed back: whoever gets one next reads how often it was lost.
        await asyncio.gather(*(self._count_attempt(slot.task) for slot in started))
        await self._hand_back(kept, slots, time.monotonic())
        if slots:
            log.info(
                "handed a lost executor's tasks back",
                executor=kept.binding.executor,
                session=kept.binding.session,
                started=len(started),
                held=len(slots) - len(started),
            )

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
                    await bucket.update(key, Attempts(Attempts.decode(entry.value).lost + 1).encode(), entry.revision)
            except RevisionConflict:
                continue
            return


def ledger_folder(node: str, work_folder: Path) -> Path:
    """Return where a node's ledgers are: in memory if the system has a place for that."""
    if SHARED_MEMORY.is_dir():
        # The work folder is locked by its manager; its inode tells two nodes of one name apart.
        return SHARED_MEMORY / f"flame-{work_folder.stat().st_ino}-{node}"
    return work_folder / "ledgers"
