"""Where a process lives on this node: its folder, the files that it writes to, and how it is started there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flame.logs import get_logger
from flame.protocol.records import ApplicationSpec
from flame.service import environment as names
from flame_services.executor_manager.gpus import Gpus
from flame_services.executor_manager.launch import (
    Launch,
    LaunchRefused,
    base_environment,
    executor_variables,
    explain_start_error,
    plan_launch,
)
from flame_services.executor_manager.process import ExecutorProcess, Process
from flame_services.executor_manager.settings import ManagerSettings
from flame_services.executor_manager.work_folder import ProcessNote, WorkFolder

log = get_logger("flame.manager.berth")


class Berth:
    """One process's place. Made by `Berths.make`; `leave` it when the process is gone."""

    def __init__(self, berths: Berths, name: str, session: str, launch: Launch, command: str) -> None:
        """Open the files; raise `OSError` if that can't be."""
        self.name: Final = name
        self.session: Final = session
        self.launch: Final = launch
        self.template: Path | None = None
        """Where a process that is started here listens, if it becomes a template."""
        self._berths: Final = berths
        self._command: Final = command
        (self.stdout, self.out), (self.stderr, self.err) = berths.folder.open_output(session, name)
        """Paths and descriptors; the latter are there until `close`."""

    def start(self) -> ExecutorProcess:
        """Start a process of its own here; raise `LaunchRefused` if the system refuses."""
        lifetime_fd = self._berths.settings.lifetime_fd
        try:
            process = ExecutorProcess(self.launch, self.out, self.err, () if lifetime_fd is None else (lifetime_fd,))
        except OSError as error:
            raise LaunchRefused(explain_start_error(self._command, error)) from None
        self.note(process)
        return process

    def rule_template_out(self) -> None:
        """Have the next process that is started here be an executor, whatever it could be."""
        self.template = None
        self.launch.environment.pop(names.TEMPLATE, None)

    def note(self, process: Process) -> None:
        """Keep a note of the process that lives here now, for a manager that comes after a crash."""
        self._berths.note(self.name, process)

    def close(self) -> None:
        """Let go of the descriptors: the process has its own. Safe to call again."""
        for descriptor in (self.out, self.err):
            if descriptor >= 0:
                os.close(descriptor)
        self.out = self.err = -1

    def leave(self) -> None:
        """Let go of everything but what was written, which whoever reads it removes."""
        self.close()
        self._berths.folder.leave_session(self.session)
        self._berths.folder.forget_process(self.name)

    def remove_output(self) -> None:
        """Delete what was written: nobody reads it."""
        for file in (self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Berths:
    """A node's folder, for its processes."""

    node: str
    settings: ManagerSettings
    folder: WorkFolder
    gpus: Gpus

    def make(
        self,
        name: str,
        session: str,
        spec: ApplicationSpec,
        template: Path | None = None,
        devices: Sequence[str] = (),
    ) -> Berth:
        """Prepare the place of a process; raise `LaunchRefused`, with nothing left to clean up.

        ``name`` is the executor that it is to be, ``session`` whose folder it works in; with ``template`` it may
        become one and listen there. ``devices`` are the GPUs that it has.
        """
        with contextlib.ExitStack() as undo:
            try:
                folder = self.folder.enter_session(session)
                undo.callback(self.folder.leave_session, session)
                berth = Berth(self, name, session, self._plan(name, folder, spec, template, devices), spec.command)
                berth.template = template
            except OSError as error:
                raise LaunchRefused(f"node {self.node} can't keep what it needs to run: {error}") from None
            undo.pop_all()
            return berth

    def note(self, name: str, process: Process) -> None:
        """Keep a note of a process."""
        try:
            self.folder.note_process(ProcessNote(name, process.pid, process.identity))
        except OSError as error:  # it runs; only a crash of ours would leave it without a master
            log.warning("no note of a process", executor=name, pid=process.pid, reason=str(error))

    def _plan(
        self, name: str, folder: Path, spec: ApplicationSpec, template: Path | None, devices: Sequence[str]
    ) -> Launch:
        variables = executor_variables(self.settings.endpoint, self.node, name, self.settings.lifetime_fd)
        variables |= self.gpus.variables(devices)
        if template is not None:
            variables[names.TEMPLATE] = str(template)
        return plan_launch(spec, self.node, folder, _base(), variables)


def _base() -> Mapping[str, str]:
    return base_environment(os.environ)
