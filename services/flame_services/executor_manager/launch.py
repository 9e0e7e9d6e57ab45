"""How an application's service is started on this node: command, environment, folder.

Its refusals reach users as the reason of a failed session, so each names the thing and where it was looked for.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flame.config import SECURITY_VARIABLES, absolute
from flame.errors import FlameError
from flame.protocol.records import ApplicationSpec
from flame.service import environment as names

_KEPT: Final = ("HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH")
"""Variables that an executor has from its manager, where the manager has them; besides these `SECURITY_VARIABLES`."""
_SYSTEM_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
_LOG_SHIM: Final = "flame_services.builtin.log_shim"


class LaunchRefused(FlameError):
    """The application's service can't be started on this node. Nothing was started."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to start."""

    command: tuple[str, ...]
    """The first is an absolute path."""
    folder: Path
    environment: dict[str, str]


def base_environment(variables: Mapping[str, str], interpreter: str = sys.executable) -> dict[str, str]:
    """Return what every executor on this node has, made of the manager's own ``variables``.

    Programs beside the manager's interpreter are found first: those are the versions it was installed with.
    """
    base = {name: variables[name] for name in _KEPT if name in variables}
    base |= {name: str(absolute(variables[name])) for name in SECURITY_VARIABLES if variables.get(name)}
    beside = str(Path(interpreter).parent)
    base["PATH"] = os.pathsep.join((beside, variables.get("PATH") or _SYSTEM_PATH))
    base["PYTHONUNBUFFERED"] = "1"
    return base


def executor_variables(endpoint: str, node: str, executor: str, lifetime_fd: int | None) -> dict[str, str]:
    """Return what tells a process who it is: what `flame.service.environment` reads."""
    variables = {names.ENDPOINT: endpoint, names.NODE: node, names.EXECUTOR: executor}
    if lifetime_fd is not None:
        variables[names.LIFETIME_FD] = str(lifetime_fd)
    return variables


def plan_launch(
    spec: ApplicationSpec, node: str, folder: Path, base: Mapping[str, str], identity: Mapping[str, str]
) -> Launch:
    """Return how to start a service, or raise `LaunchRefused`.

    ``folder`` is where it starts unless its application names another; ``identity`` is what it must not override.
    """
    if spec.working_directory:
        folder = _working_directory(spec.working_directory, node)
    environment = {**base, **spec.environments, **identity}
    if spec.shim == "Log":
        return Launch((sys.executable, "-m", _LOG_SHIM, *spec.arguments), folder, environment)
    program = _find(spec.command, node, folder, environment.get("PATH", ""))
    return Launch((program, *spec.arguments), folder, environment)


def _working_directory(name: str, node: str) -> Path:
    folder = Path(name)
    if not folder.is_absolute():
        raise LaunchRefused(f"working_directory {name!r} is not absolute")
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise LaunchRefused(f"working_directory {name!r} {what} on node {node}")
    return folder


def _find(command: str, node: str, folder: Path, path: str) -> str:
    if "/" not in command:
        found = shutil.which(command, path=path)
        if found is None:
            raise LaunchRefused(f"command {command!r} is not on the PATH of node {node} ({path})")
        return str(Path(found).absolute())
    program = folder / command  # an absolute command stays as it is
    if not program.exists():
        where = "" if program == Path(command) else f" in {folder}"
        raise LaunchRefused(f"command {command!r} does not exist{where} on node {node}")
    if not program.is_file():
        raise LaunchRefused(f"command {command!r} is not a program but a folder or a device")
    if not os.access(program, os.X_OK):
        raise LaunchRefused(f"command {command!r} is not executable: chmod +x it on node {node}")
    return str(program)


def explain_start_error(command: str, error: OSError) -> str:
    """Say why the system would not run a program that is there."""
    if isinstance(error, FileNotFoundError):
        return f"command {command!r} can't be run: the interpreter named in its first line does not exist"
    if error.errno == errno.ENOEXEC:
        return f"command {command!r} can't be run: it is no program of this kind of machine, and no script with #!"
    return f"command {command!r} can't be run: {error.strerror}"
