"""How a command ends: its exit status, and what standard error says when it did not succeed."""

from __future__ import annotations

import os
import sys
from enum import IntEnum

DEBUG_VARIABLE = "FLAME_DEBUG"

_EXTRAS = {
    "rich": "cli",
    "typer": "cli",
    "yaml": "cli",
    "flame_services": "server",
    "psutil": "server",
}
"""Which extra brings a module."""

_PURPOSES = {"cli": "the command line extra", "server": "the server extra"}


class ExitCode(IntEnum):
    """The exit statuses of every program of the command line."""

    OK = 0
    FAILED = 1
    """It was refused, is not there, or a task failed."""
    USAGE = 2
    """The arguments, a file, a setting or the installation is wrong; nothing was done."""
    UNREACHABLE = 3
    """No broker or no scheduler answers."""
    INTERRUPTED = 130
    """Ctrl-C."""


EXIT_CODES_HELP = (
    "Exit status: 0 done; 1 it failed (refused, not found, a task failed); 2 wrong arguments, file or"
    " installation; 3 the cluster is not reachable; 130 interrupted."
)


class CommandFailed(Exception):
    """A command could not do what it was asked for. ``detail`` is shown below it, such as the end of a log."""

    def __init__(self, message: str, detail: str = "", code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.detail = detail
        self.code = code


class ExtraMissing(CommandFailed):
    """A part of the installation is missing that this command needs."""

    def __init__(self, program: str, extra: str) -> None:
        super().__init__(
            f"{program} needs {_PURPOSES[extra]}: pip install 'flame-engine[{extra}]'", code=ExitCode.USAGE
        )


def debugging() -> bool:
    """Whether tracebacks and the library's logs are wanted."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def debug() -> None:
    """Show tracebacks and the library's logs from now on."""
    os.environ[DEBUG_VARIABLE] = "1"


def report(program: str, error: BaseException) -> ExitCode:
    """Say on standard error what went wrong and return the exit status that it means."""
    if isinstance(error, BrokenPipeError):
        return ExitCode.FAILED  # whoever read the output has seen enough
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if debugging():
        import traceback

        traceback.print_exception(error)
    if isinstance(error, ImportError) and (extra := _EXTRAS.get((error.name or "").partition(".")[0])):
        error = ExtraMissing(program, extra)
    if isinstance(error, ExtraMissing):
        _say(str(error))
        return error.code
    if isinstance(error, CommandFailed):
        _say(f"{program}: error: {one_line(str(error))}", error.detail)
        return error.code
    if isinstance(error, OSError):
        _say(f"{program}: error: {one_line(str(error))}")
        return ExitCode.FAILED
    code = _code_of(error)
    if code is not None:
        _say(f"{program}: error: {one_line(str(error))}")
        return code
    text = one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
    _say(f"{program}: internal error: {text} ({DEBUG_VARIABLE}=1 shows where)")
    return ExitCode.FAILED


def one_line(text: str) -> str:
    """Fold a text into one line that a terminal shows as it is."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


def prepare_output() -> None:
    """See to it that printing fails for no other reason than that it can't be written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the program was started with it closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 (for good)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_output(program: str) -> ExitCode:
    """Write out what is buffered, and say so if that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return report(program, error)
    return ExitCode.OK


def _code_of(error: BaseException) -> ExitCode | None:
    """Return the status of one of Flame's own errors, ``None`` for any other exception."""
    if "flame.errors" not in sys.modules:
        return None  # so it can be none of them, and importing them takes time
    from flame import errors

    if not isinstance(error, errors.FlameError):
        return None
    if isinstance(error, errors.ConfigurationError | errors.InvalidArgument):
        return ExitCode.USAGE
    if isinstance(error, errors.Unavailable):
        return ExitCode.UNREACHABLE
    return ExitCode.FAILED


def _say(line: str, detail: str = "") -> None:
    try:
        print(line, file=sys.stderr)
        for part in detail.splitlines():
            print(f"  | {''.join(char if char.isprintable() else '?' for char in part)}", file=sys.stderr)
    except OSError:
        pass  # nobody is there to read it; the exit status says it
