"""Which tasks an executor holds, in memory that its manager reads: through user code that blocks, and after a kill.

A ledger is a small file in shared memory. The executor writes a slot for every delivery it takes, before user code
runs, and clears it when the delivery is finished. The manager reads the slots to extend leases, hands tasks of a dead
executor back, and takes tasks that were not started away from one that is blocked.

Neither side waits for the other. What makes that safe is the order of reads and writes:

- A slot's generation, lengths and texts are written before its state. A reader reads generation, state, texts and the
  generation again, and drops what changed under it.
- The executor starts a task by writing *running* and only then reading the steal flag and the slot's mark. The manager
  steals by setting the flag, forcing a memory barrier on the executor (``membarrier``), marking what is still *held*,
  and clearing the flag. So one of the two always sees the other: a task is started or stolen, never both.

Times are ``CLOCK_MONOTONIC`` seconds, which all processes of a machine share.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Self, cast

from flame.errors import ConfigurationError

MAGIC: Final = b"FLMLDGR2"
SLOTS: Final = 1024
"""Deliveries that an executor may hold at once, those whose records are on their way included."""

FREE: Final = 0
HELD: Final = 1
RUNNING: Final = 2

_STEAL_WAIT_S: Final = 0.1
"""The most that an executor waits for a manager that is stealing."""

_HEADER: Final = struct.Struct("<8sIIdddd")  # magic, pid, slots, ack_wait, loop tick, manager tick, kept since
_PID: Final = struct.Struct("<I")
_TIME: Final = struct.Struct("<d")
_PID_AT: Final = 8
_ACK_WAIT_AT: Final = 16
_LOOP_TICK_AT: Final = 24
_MANAGER_TICK_AT: Final = 32
_KEPT_SINCE_AT: Final = 40
_STEAL_AT: Final = 48
_STATES_AT: Final = 64
_MARKS_AT: Final = _STATES_AT + SLOTS
_BODIES_AT: Final = _MARKS_AT + SLOTS
_BODY: Final = 512
_SLOT: Final = struct.Struct(
    "<IHHddd"
)  # generation, length of the handle, of the task id, taken at, started at, deadline
_GENERATION: Final = struct.Struct("<I")
_SLOT_STARTED: Final = struct.Struct("<dd")  # started at, deadline
_STARTED_AT: Final = 16
_TEXT_MOST: Final = _BODY - _SLOT.size
_SLOT_TEXT: Final = struct.Struct(f"{_SLOT.format}{_TEXT_MOST}s")
SIZE: Final = _BODIES_AT + SLOTS * _BODY

_OCCUPIED = re.compile(b"[\x01\x02]")


class Slot(NamedTuple):
    """One delivery in a ledger, as a manager reads it."""

    number: int
    state: int
    generation: int
    handle: str
    task: str
    """The task's key, see `flame.protocol.subjects.task_key`."""
    taken_at: float
    started_at: float
    deadline: float
    """When its run is to have ended; 0: it has no limit, or does not run."""


class Ledger:
    """The executor's side."""

    def __init__(self, path: str) -> None:
        """Open the file that the manager made; raise `ConfigurationError` if it is none."""
        self._map = _map(path)
        self._free = list(range(SLOTS - 1, -1, -1))
        self._generation = 0
        _PID.pack_into(self._map, _PID_AT, os.getpid())
        self.tick(time.monotonic())
        barrier_register()

    @property
    def room(self) -> int:
        """How many more deliveries fit in."""
        return len(self._free)

    def tick(self, now: float) -> None:
        """Say that this process's event loop is not blocked."""
        _TIME.pack_into(self._map, _LOOP_TICK_AT, now)

    def take(self, handle: str, task: str, now: float) -> int:
        """Note a delivery and return its slot; -1 if it can't be noted."""
        text = f"{handle}{task}".encode()
        if not self._free or len(text) > _TEXT_MOST:
            return -1
        slot = self._free.pop()
        self._generation = generation = (self._generation + 1) & 0xFFFFFFFF
        _SLOT_TEXT.pack_into(
            self._map, _BODIES_AT + slot * _BODY, generation, len(handle), len(task), now, 0.0, 0.0, text
        )
        self._map[_MARKS_AT + slot] = 0
        self._map[_STATES_AT + slot] = HELD
        return slot

    def start(self, slot: int, now: float, deadline: float = 0.0) -> bool:
        """Begin to run a delivery that is to have ended by ``deadline``, if that is not 0.

        ``False``: the manager has taken it away, and it must not run.
        """
        data = self._map
        _SLOT_STARTED.pack_into(data, _BODIES_AT + slot * _BODY + _STARTED_AT, now, deadline)
        data[_STATES_AT + slot] = RUNNING
        if data[_STEAL_AT]:
            give_up = time.monotonic() + _STEAL_WAIT_S
            while data[_STEAL_AT] and time.monotonic() < give_up:
                time.sleep(0.0001)
        if data[_MARKS_AT + slot]:
            self.clear(slot)
            return False
        return True

    def clear(self, slot: int) -> None:
        """Forget a delivery that is finished, handed back or stolen."""
        self._map[_STATES_AT + slot] = FREE
        self._free.append(slot)

    def stolen(self, slot: int) -> bool:
        """Whether the manager has taken a held delivery away."""
        return slot >= 0 and bool(self._map[_MARKS_AT + slot])

    def kept_by_manager(self, now: float, silence_s: float) -> bool:
        """Whether the manager has given a sign within ``silence_s``, and so keeps this executor's leases."""
        tick: float = _TIME.unpack_from(self._map, _MANAGER_TICK_AT)[0]
        return now - tick < silence_s

    def kept_since(self) -> float:
        """Since when the manager has kept leases without a gap."""
        since: float = _TIME.unpack_from(self._map, _KEPT_SINCE_AT)[0]
        return since

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()


class LedgerReader:
    """The manager's side."""

    def __init__(self, path: Path) -> None:
        """Open a ledger; raise `ConfigurationError` if it is none."""
        self.path = path
        self._map = _map(str(path))

    @classmethod
    def create(cls, path: Path, now: float, ack_wait_s: float) -> Self:
        """Make an empty ledger whose leases, of that length, are kept from now on."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, SIZE)
            os.pwrite(descriptor, _HEADER.pack(MAGIC, 0, SLOTS, ack_wait_s, now, now, now), 0)
        finally:
            os.close(descriptor)
        return cls(path)

    @property
    def pid(self) -> int:
        """Of the executor; 0 before it has opened the ledger."""
        pid: int = _PID.unpack_from(self._map, _PID_AT)[0]
        return pid

    @property
    def loop_tick(self) -> float:
        """When the executor's loop was last known not to be blocked."""
        tick: float = _TIME.unpack_from(self._map, _LOOP_TICK_AT)[0]
        return tick

    @property
    def manager_tick(self) -> float:
        """When a manager last kept this ledger."""
        tick: float = _TIME.unpack_from(self._map, _MANAGER_TICK_AT)[0]
        return tick

    def keep(self, now: float, certain_s: float) -> None:
        """Say that the manager is there; after a gap that leases may not have survived, say since when."""
        if now - self.manager_tick > certain_s:
            _TIME.pack_into(self._map, _KEPT_SINCE_AT, now)
        _TIME.pack_into(self._map, _MANAGER_TICK_AT, now)

    @property
    def ack_wait_s(self) -> float:
        """For how long a delivery of this executor is good after its last extension."""
        ack_wait_s: float = _TIME.unpack_from(self._map, _ACK_WAIT_AT)[0]
        return ack_wait_s

    def slots(self) -> list[Slot]:
        """Read what the executor holds and runs."""
        states = self._map[_STATES_AT:_MARKS_AT]
        found = []
        for match in _OCCUPIED.finditer(states):
            slot = self._read(match.start())
            if slot is not None:
                found.append(slot)
        return found

    def steal(self) -> list[Slot]:
        """Take away everything held that was not started; empty if this machine can't do it safely."""
        stolen = []
        self._map[_STEAL_AT] = 1
        try:
            if not barrier():
                return []
            for slot in self.slots():
                if slot.state == HELD and not self._map[_MARKS_AT + slot.number]:
                    self._map[_MARKS_AT + slot.number] = 1
                    stolen.append(slot)
        finally:
            self._map[_STEAL_AT] = 0
        return stolen

    def _read(self, index: int) -> Slot | None:
        """Read one slot; ``None`` if it changed meanwhile."""
        at = _BODIES_AT + index * _BODY
        generation = _GENERATION.unpack_from(self._map, at)[0]
        state = self._map[_STATES_AT + index]
        # Only now the rest: a state that is seen after its generation was written after everything of it.
        _, handle, task, taken_at, started_at, deadline = _SLOT.unpack_from(self._map, at)
        begin = at + _SLOT.size
        text = self._map[begin : begin + min(handle + task, _TEXT_MOST)]
        if _GENERATION.unpack_from(self._map, at)[0] != generation or state not in (HELD, RUNNING):
            return None
        return Slot(
            index,
            state,
            generation,
            text[:handle].decode("ascii", "replace"),
            text[handle:].decode("ascii", "replace"),
            taken_at,
            started_at,
            deadline,
        )

    def close(self, *, remove: bool) -> None:
        """Let go of the file, and delete it if its executor is gone for good."""
        self._map.close()
        if remove:
            self.path.unlink(missing_ok=True)


def _map(path: str) -> mmap.mmap:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigurationError(f"ledger {path}: {error.strerror}") from None
    try:
        if os.fstat(descriptor).st_size != SIZE or os.pread(descriptor, len(MAGIC), 0) != MAGIC:
            raise ConfigurationError(f"ledger {path}: not a ledger of this version")
        return mmap.mmap(descriptor, SIZE)
    finally:
        os.close(descriptor)


# ---- membarrier(2): a full barrier on every running thread of the processes that registered for it

_MEMBARRIER: Final = {"x86_64": 324, "aarch64": 283}.get(platform.machine(), -1) if os.name == "posix" else -1
_GLOBAL_EXPEDITED: Final = 1 << 1
_REGISTER_GLOBAL_EXPEDITED: Final = 1 << 2


def _system_call() -> Callable[..., int] | None:
    if _MEMBARRIER < 0 or platform.system() != "Linux":
        return None
    try:
        return cast("Callable[..., int]", ctypes.CDLL(None, use_errno=True).syscall)
    except (OSError, AttributeError):
        return None


_syscall = _system_call()
"""Found when this is loaded, which is before any executor is forked: it takes half a millisecond."""


def _membarrier(command: int) -> bool:
    return _syscall is not None and _syscall(_MEMBARRIER, command, 0, 0) == 0


def barrier_register() -> bool:
    """Let managers force barriers on this process; ``False`` where the system has none."""
    return _membarrier(_REGISTER_GLOBAL_EXPEDITED)


def barrier() -> bool:
    """Force a barrier on every process that registered; ``False`` where the system has none."""
    return _membarrier(_GLOBAL_EXPEDITED)
