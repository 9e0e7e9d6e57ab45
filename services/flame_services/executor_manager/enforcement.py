"""Holding executors to the resources that their sessions asked for, in the best way that this node has.

Memory is held by a control group where the manager may make one, otherwise by looking (`memory_watch`). Processors are
shared out by a control group, otherwise whole ones are assigned (`processors`). What templates and processes started
ahead use is no executor's, and isn't held: an executor's account begins when it has its session.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flame.logs import get_logger
from flame.protocol.resources import Resources
from flame_services.executor_manager.cgroups import Cgroup, Cgroups, find_given
from flame_services.executor_manager.footprint import members
from flame_services.executor_manager.memory_watch import PERIOD_S, MemoryWatch, Watched
from flame_services.executor_manager.processors import CAN_CONFINE, Processors, confine
from flame_services.executor_manager.settings import AUTO, NONE, ManagerSettings

log = get_logger("flame.manager.resources")

WATCH: Final = "watch"
AFFINITY: Final = "affinity"

OnExceeded = Callable[[int], None]
"""Gets how many bytes an executor uses; 0 if that is not known."""


class Hold:
    """One executor that is held to its resources, until `release`."""

    def __init__(self, on_exceeded: OnExceeded) -> None:
        """Begin with nothing that holds it."""
        self.on_exceeded: Final = on_exceeded
        self.group: Cgroup | None = None
        self.watched: Watched | None = None
        self.processors: tuple[int, ...] = ()

    def was_killed_for_memory(self) -> bool:
        """Whether the system has ended a process of it that wanted more memory."""
        return self.group is not None and self.group.has_killed()


class Enforcement:
    """How this node holds its executors."""

    def __init__(self, settings: ManagerSettings) -> None:
        """Take settings; nothing is touched before `claim`."""
        self.memory_by = WATCH if settings.hold_memory else NONE
        self.cpu_by = AFFINITY if settings.hold_cpu and CAN_CONFINE else NONE
        self._settings = settings
        self._groups = Cgroups((), "")
        self._watch = MemoryWatch()
        self._processors = Processors(os.sched_getaffinity(0) if CAN_CONFINE else ())
        self._held: set[Hold] = set()

    def claim(self) -> None:
        """Find out what the system lets us do."""
        wanted = {"memory": self._settings.hold_memory, "cpu": self._settings.hold_cpu}
        named = self._settings.cgroup
        if named != NONE and any(wanted.values()):
            given = find_given("" if named == AUTO else named, _read("mountinfo"), _read("cgroup"))
            self._groups = Cgroups(given, self._settings.node_name)
            self._groups.claim()
        versions = self._groups.versions
        if wanted["memory"] and "memory" in versions:
            self.memory_by = f"cgroup{versions['memory']}"
        if wanted["cpu"] and "cpu" in versions:
            self.cpu_by = f"cgroup{versions['cpu']}"
        log.info("executors are held to what they ask for", memory_by=self.memory_by, cpu_by=self.cpu_by)

    def clear(self) -> None:
        """Remove what an earlier manager has left; its executors are gone."""
        self._groups.clear()

    def hold(self, executor: str, leader: int, resources: Resources, on_exceeded: OnExceeded, *, forked: bool) -> Hold:
        """Hold the process group of a running executor to what it asked for; nothing of an amount of 0."""
        hold = Hold(on_exceeded)
        self._held.add(hold)
        by_group = {"memory": self.memory_by.startswith("cgroup"), "cpu": self.cpu_by.startswith("cgroup")}
        if any(by_group.values()):
            try:
                hold.group = self._groups.make(executor, resources, **by_group)
                hold.group.take(members({leader}).get(leader, []))
            except OSError as error:
                log.warning("no control group for an executor; it is watched", executor=executor, reason=str(error))
                by_group = dict.fromkeys(by_group, False)
        if self._settings.hold_memory and not by_group["memory"] and resources.memory:
            hold.watched = Watched(leader, resources.memory, forked, on_exceeded)
            self._watch.add(hold.watched)
        if self._settings.hold_cpu and not by_group["cpu"] and CAN_CONFINE:
            hold.processors = self._processors.take(resources.cpu)
            if hold.processors:
                confine(members({leader}).get(leader, []), hold.processors)
        return hold

    def let_go(self, hold: Hold) -> None:
        """Say that an executor is gone. Safe to call again."""
        if hold not in self._held:
            return
        self._held.discard(hold)
        if hold.watched is not None:
            self._watch.remove(hold.watched)
        if hold.group is not None:
            hold.group.remove()
        self._processors.give_back(hold.processors)

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._watch.run())
            if self.memory_by.startswith("cgroup"):
                parts.create_task(self._watch_groups())

    async def _watch_groups(self) -> None:
        """Look for executors that have lost a process, but not themselves, to the system's own enforcement."""
        told: set[Hold] = set()
        while True:
            await asyncio.sleep(PERIOD_S)
            told &= self._held
            for hold in self._held - told:
                if hold.was_killed_for_memory():
                    told.add(hold)
                    hold.on_exceeded(0)

    def release(self) -> None:
        """Remove what was made; no executor lives. Safe to call again."""
        self._groups.release()


def _read(name: str) -> str:
    try:
        return Path("/proc/self", name).read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return ""
