"""The GPUs of a node, and which executor has which."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from flame.logs import get_logger
from flame_services.executor_manager.launch import LaunchRefused

log = get_logger("flame.manager.gpus")

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
ORDER: Final = "CUDA_DEVICE_ORDER"
_DEVICES: Final = Path("/dev")
_SMI_S: Final = 5.0
"""How long ``nvidia-smi`` may take: a driver that hangs must not keep the node away."""


def detect(variables: Mapping[str, str], devices: Path = _DEVICES) -> tuple[str, ...]:
    """Return the GPUs that executors may be given, as CUDA calls them; none if there are none, or it can't be told.

    Where the manager itself is given some by ``CUDA_VISIBLE_DEVICES``, it has no others to give.
    """
    if VISIBLE in variables:
        return tuple(filter(None, (device.strip() for device in variables[VISIBLE].split(","))))
    found = sorted(
        int(match[1]) for file in devices.glob("nvidia*") if (match := re.fullmatch(r"nvidia(\d+)", file.name))
    )
    return tuple(map(str, range(len(found)))) if found else _ask_driver()


def _ask_driver() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_SMI_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("nvidia-smi does not say what GPUs there are; none are given", reason=str(error))
        return ()
    return tuple(re.findall(r"^GPU (\d+):", answer.stdout, re.MULTILINE))


class Gpus:
    """Gives each device to one executor at a time."""

    def __init__(self, devices: Sequence[str]) -> None:
        """Begin with all of them free."""
        self.devices: Final = tuple(devices)
        self._free = list(self.devices)
        self._returned = asyncio.Event()

    async def take(self, count: int) -> tuple[str, ...]:
        """Return so many devices, which are nobody else's until `give_back`; wait for those of executors that end.

        Raises `LaunchRefused` if there aren't so many at all.
        """
        if count > len(self.devices):
            raise LaunchRefused(f"its session needs gpu={count}; this node has {len(self.devices)}")
        while len(self._free) < count:
            self._returned.clear()
            await self._returned.wait()
        taken, self._free = tuple(self._free[:count]), self._free[count:]
        return taken

    def give_back(self, devices: Sequence[str]) -> None:
        """Let others have devices that were taken."""
        self._free = sorted((*self._free, *devices), key=self.devices.index)
        self._returned.set()

    def variables(self, devices: Sequence[str]) -> dict[str, str]:
        """Return what tells a process which devices it has; nothing on a node that has none."""
        if not self.devices:
            return {}
        # The order in which the system and nvidia-smi count them; by itself CUDA would put the fastest first.
        return {VISIBLE: ",".join(devices), ORDER: "PCI_BUS_ID"}
