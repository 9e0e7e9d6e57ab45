"""What all executors of a node share, and how a process is started there."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from flame.broker.seam import Broker
from flame.logs import get_logger
from flame.protocol.records import ApplicationSpec, BindingRecord
from flame_services.executor_manager.consumers import Consumers
from flame_services.executor_manager.keeper import LeaseKeeper
from flame_services.executor_manager.launch import (
    Launch,
    LaunchRefused,
    base_environment,
    executor_variables,
    explain_start_error,
    plan_launch,
)
from flame_services.executor_manager.output import Captured, OutputFollower
from flame_services.executor_manager.process import ExecutorProcess
from flame_services.executor_manager.settings import ManagerSettings
from flame_services.executor_manager.work_folder import ProcessNote, WorkFolder

log = get_logger("flame.manager.place")


@dataclass(frozen=True, slots=True)
class Place:
    """A node, for its executors."""

    node: str
    settings: ManagerSettings
    broker: Broker
    folder: WorkFolder
    output: OutputFollower
    consumers: Consumers
    leases: LeaseKeeper

    def start_process(self, binding: BindingRecord, spec: ApplicationSpec) -> tuple[Captured, ExecutorProcess]:
        """Start the process of an executor, with its output captured; `clean_up` after its end.

        Raises `LaunchRefused`, with nothing left to clean up.
        """
        with contextlib.ExitStack() as undo:
            try:
                folder = self.folder.enter_session(binding.session)
                undo.callback(self.folder.leave_session, binding.session)
                variables = executor_variables(
                    self.settings.endpoint, self.node, binding.executor, self.settings.lifetime_fd
                )
                launch = plan_launch(spec, self.node, folder, base_environment(os.environ), variables)
                captured, process = self._start(binding, launch, spec.command)
            except OSError as error:
                raise LaunchRefused(f"node {self.node} can't keep what it needs to run: {error}") from None
            undo.pop_all()
        try:
            self.folder.note_process(ProcessNote(binding.executor, process.pid, process.identity))
        except OSError as error:  # it runs; only a crash of ours would leave it without a master
            log.warning("no note of a process", executor=binding.executor, pid=process.pid, reason=str(error))
        return captured, process

    def clean_up(self, binding: BindingRecord, captured: Captured) -> None:
        """Let go of what a process that is gone had here."""
        captured.end()
        self.folder.leave_session(binding.session)
        self.folder.forget_process(binding.executor)

    def _start(self, binding: BindingRecord, launch: Launch, command: str) -> tuple[Captured, ExecutorProcess]:
        (stdout, out), (stderr, err) = self.folder.open_output(binding.session, binding.executor)
        captured = self.output.follow(binding, stdout, stderr)
        lifetime_fd = self.settings.lifetime_fd
        try:
            return captured, ExecutorProcess(launch, out, err, () if lifetime_fd is None else (lifetime_fd,))
        except OSError as error:
            captured.end()
            raise LaunchRefused(explain_start_error(command, error)) from None
        finally:
            os.close(out)
            os.close(err)
