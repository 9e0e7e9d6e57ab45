"""The scheduler: it decides who serves whom, and never touches a running task."""

from __future__ import annotations

from flame_services.program import run_program
from flame_services.scheduler.service import Scheduler, SchedulerSettings


def main() -> None:
    """Run ``flame-scheduler``."""
    run_program(
        "flame-scheduler", "Binds sessions to executors and answers the control API.", SchedulerSettings, Scheduler
    )
