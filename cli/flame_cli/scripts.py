"""`flmexec`: scripts that run in the cluster."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from flame_cli import cluster
from flame_cli.errors import CommandFailed, one_line
from flame_cli.output import note

if TYPE_CHECKING:
    from flame import Connection, Task
    from flame.scripts import ScriptResult

PROGRAM: Final = "flmexec"
TIMED_OUT: Final = 124
"""The exit status for a script that took too long, as that of timeout(1)."""
SIGNALLED: Final = 128
"""And the signal's number: the exit status for a script that a signal ended, as shells have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A script, and how often to run it."""

    language: str
    code: str
    input: bytes
    times: int
    limit_s: float | None
    """How long a run may take."""


def run_script(endpoint: str | None, job: Job) -> None:
    """Run the script and pass on what it wrote; end with its status."""
    sys.exit(cluster.run(endpoint, lambda connection: _run(connection, job), name=PROGRAM))


async def _run(connection: Connection, job: Job) -> int:
    from flame import FlameError, ProgressBar, scripts

    script = scripts.encode(job.code, language=job.language, input=job.input, timeout_s=job.limit_s)
    session = await connection.create_session(scripts.APPLICATION)
    status = done = 0
    try:
        with ProgressBar("scripts", total=job.times, show=None if job.times > 1 else False) as bar:
            bar(done)
            async for task in session.map(itertools.repeat(script, job.times), raise_failed=False):
                result = result_of(task)
                bar.clear()
                _pass_on(result)
                status = status or status_of(result)
                done += 1
                bar(done)
    finally:
        try:
            await connection.close_session(session.id)
        except FlameError as error:
            note(f"(session {session.id} is not closed: {one_line(str(error))})")
    return status


def result_of(task: Task) -> ScriptResult:
    """Return what came of a script, whether or not it succeeded; raise `CommandFailed` if it did not run."""
    from flame import TaskError, scripts
    from flame.errors import MalformedMessage

    try:
        fault = task.error
        return scripts.decode(task.output if fault is None else fault.details)
    except MalformedMessage:
        try:
            task.check()
        except TaskError as error:
            raise CommandFailed(str(error)) from None
        raise


def status_of(result: ScriptResult) -> int:
    """Return the exit status that a shell would have for it."""
    if result.timed_out:
        return TIMED_OUT
    return result.status if result.status >= 0 else SIGNALLED - result.status


def _pass_on(result: ScriptResult) -> None:
    """Write what a script wrote, where it wrote it, as it is."""
    for stream, data in ((sys.stdout, result.stdout), (sys.stderr, result.stderr)):
        stream.flush()
        stream.buffer.write(data)
        stream.buffer.flush()
