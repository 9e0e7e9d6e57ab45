"""Where the programs of the command line begin.

Nothing but the standard library is imported before the first line that could fail: a missing extra, a Ctrl-C
while modules are loading, anything at all ends in one line on standard error and never in a traceback.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run ``flmctl``."""
    _run("flmctl")


def flmping() -> NoReturn:
    """Run ``flmping``."""
    _run("flmping")


def flmexec() -> NoReturn:
    """Run ``flmexec``."""
    _run("flmexec")


def _run(program: str) -> NoReturn:
    _hurry()
    from flame_cli import errors

    errors.prepare_output()
    try:
        from flame_cli.app import run

        run(program)
        status: int | str | None = errors.ExitCode.OK
    except SystemExit as end:
        status = end.code
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (the last one there is: it says so in one line)
        status = errors.report(program, error)
    flushed = errors.flush_output(program)
    sys.exit(status or flushed)


def _hurry() -> None:
    """Save a quarter of the time that most commands take, which is that of importing modules."""
    # What modules make stays; looking again and again whether it is garbage is in vain.
    gc.set_threshold(50_000)
    # To find out that there are no plugins, the metadata of every installed package would be read.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


if __name__ == "__main__":
    main()
