"""What every Flame program does the same way: settings, logs, start, stop.

Settings come from a YAML file (``--config``), the environment (``FLAME_…``) and flags, the later winning over the
earlier. SIGTERM and SIGINT are a clean stop, and so is the end of the lifetime pipe of whoever owns the program.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flame.cancel import end_task, end_tasks
from flame.config import DEFAULT_ENDPOINT
from flame.errors import ConfigurationError, FlameError
from flame.logs import configure_logs, get_logger
from flame.protocol.records import explain
from flame.version import __version__

log = get_logger("flame.program")

EXIT_FAILED = 1
EXIT_USAGE = 2
FORCED_STOP_S = 60.0
"""A stop that takes longer than this is not clean any more and ends anyway."""


class Settings(BaseModel):
    """What every program can be told. A field's description is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint: str = Field(default=DEFAULT_ENDPOINT, description="where the broker is: nats://HOST:PORT[,…]")
    log_level: str = Field(
        default="info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error"
    )
    log_json: bool = Field(default=False, description="log one JSON object a line")
    lifetime_fd: int | None = Field(
        default=None, description="a descriptor inherited from the owner; when its other end closes, this program stops"
    )


class Program(Protocol):
    """Something that runs until it is stopped."""

    async def start(self) -> None:
        """Return when it is ready."""

    async def stop(self) -> None:
        """Drain and end, within a limit. Idempotent, and safe before `start`."""

    async def failed(self) -> str:
        """Return the reason if it can't go on by itself, an empty one if it has no more to do; otherwise never."""


S = TypeVar("S", bound=Settings)


def run_program(
    name: str, summary: str, settings_type: type[S], make: Callable[[S], Program], argv: Sequence[str] | None = None
) -> None:
    """Run a program from the command line and exit with its status."""
    try:
        settings = read_settings(name, summary, settings_type, sys.argv[1:] if argv is None else argv)
        configure_logs(settings.log_level, settings.log_json)
        sys.exit(asyncio.run(_run(name, make(settings), settings)))
    except FlameError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


def failure_of(parts: Iterable[asyncio.Task[None]]) -> str:
    """Return why one of the parts of a program that should go on has ended, and log it: it is a fault of ours."""
    part = next(part for part in parts if part.done())
    error = None if part.cancelled() else part.exception()
    log.error("a part of the program failed", part=part.get_name(), exc_info=error)
    return f"{part.get_name()} failed: {error!r}"


def read_settings(name: str, summary: str, settings_type: type[S], argv: Sequence[str]) -> S:
    """Read settings from file, environment and flags; raise `ConfigurationError` naming what is wrong."""
    parser = argparse.ArgumentParser(prog=name, description=summary, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--config", metavar="FILE", help="read settings from a YAML file (also FLAME_CONFIG_FILE)")
    for field, info in settings_type.model_fields.items():
        flag = _flag(field)
        text = f"{info.description} (also {_variable(field)}; default: {info.default})"
        if info.annotation is bool:
            parser.add_argument(flag, dest=field, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, dest=field, metavar=field.rpartition("_")[2].upper(), default=None, help=text)
    flags = vars(parser.parse_args(argv))
    file = flags.pop("config") or os.environ.get("FLAME_CONFIG_FILE")
    values: dict[str, Any] = _read_file(Path(file)) if file else {}
    said_by = dict.fromkeys(map(str, values), str(file))
    for field in settings_type.model_fields:
        if (value := flags[field]) is not None:
            values[field], said_by[field] = value, _flag(field)
        elif (value := os.environ.get(_variable(field))) is not None:
            values[field], said_by[field] = value, _variable(field)
    try:
        return settings_type.model_validate(values)
    except ValidationError as error:
        wrong = [str(place) for fault in error.errors() for place in fault["loc"][:1]]
        sources = dict.fromkeys(said_by.get(field, "settings") for field in wrong)
        raise ConfigurationError(f"{', '.join(sources) or 'settings'}: {explain(error)}") from None


def _flag(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _variable(field: str) -> str:
    return f"FLAME_{field.upper()}"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: expected settings as name: value, got a {type(values).__name__}")
    return values


async def _run(name: str, program: Program, settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if settings.lifetime_fd is not None:
        _watch_lifetime(loop, settings.lifetime_fd, stopping)
    waits: list[asyncio.Task[Any]] = [asyncio.create_task(stopping.wait())]
    reason = ""
    try:
        starting = asyncio.create_task(program.start())
        await asyncio.wait([starting, waits[0]], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            await end_task(starting)
            return 0
        starting.result()
        log.info("ready", program=name, version=__version__, endpoint=settings.endpoint)
        failing = asyncio.create_task(program.failed())
        waits.append(failing)
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            reason = failing.result()
            if reason:
                log.error("stopping after a failure", program=name, reason=reason)
        return EXIT_FAILED if reason else 0
    finally:
        await end_tasks(waits)
        try:
            async with asyncio.timeout(FORCED_STOP_S):
                await program.stop()
        except TimeoutError:
            log.error("the stop took too long", program=name, limit_s=FORCED_STOP_S)
        log.info("stopped", program=name)


def _watch_lifetime(loop: asyncio.AbstractEventLoop, fd: int, stopping: asyncio.Event) -> None:
    """Stop when the owner's end of its pipe is gone, however the owner ended."""

    def ended() -> None:
        loop.remove_reader(fd)
        stopping.set()

    try:
        os.set_inheritable(fd, False)
        loop.add_reader(fd, ended)
    except OSError as error:
        raise ConfigurationError(f"lifetime_fd {fd}: {error.strerror}; it must be an inherited pipe") from None
