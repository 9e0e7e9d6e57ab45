"""What one executor is given of its node, and that it takes no more."""

from __future__ import annotations

from typing import Final

from flame.protocol.records import BindingRecord
from flame_services.executor_manager.enforcement import Enforcement, Hold, OnExceeded
from flame_services.executor_manager.gpus import Gpus
from flame_services.executor_manager.process import Process


class Share:
    """One executor's share of its node: its GPUs from before its start, the rest from a moment after it."""

    def __init__(self, binding: BindingRecord, gpus: Gpus, enforcement: Enforcement, on_exceeded: OnExceeded) -> None:
        """Plan it; ``on_exceeded`` is called when the executor uses more memory than it asked for."""
        self.devices: tuple[str, ...] = ()
        """Its GPUs."""
        self._binding: Final = binding
        self._gpus: Final = gpus
        self._enforcement: Final = enforcement
        self._on_exceeded: Final = on_exceeded
        self._hold: Hold | None = None
        self._over = False

    async def take_devices(self) -> None:
        """Take the GPUs, waiting for those of executors that end; raise `LaunchRefused` if there never are enough."""
        self.devices = await self._gpus.take(self._binding.resources.gpu)

    def hold(self, process: Process, *, forked: bool) -> None:
        """Hold a process to the rest of it, if it still runs."""
        if not self._over and not process.ended.done():
            name, resources = self._binding.executor, self._binding.resources
            self._hold = self._enforcement.hold(name, process.pid, resources, self._on_exceeded, forked=forked)

    def look(self) -> None:
        """Find out whether the system has ended the process for its memory."""
        if self._hold is not None and self._hold.was_killed_for_memory():
            self._on_exceeded(0)

    def give_back(self) -> None:
        """Say that the executor is gone. Safe to call again."""
        self._over = True
        if self._hold is not None:
            self._enforcement.let_go(self._hold)
        devices, self.devices = self.devices, ()
        self._gpus.give_back(devices)
