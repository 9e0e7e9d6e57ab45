"""Asking services for the JSON schemas of what they take and return: by running their commands here, once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flame.errors import ConfigurationError
from flame.service.environment import DESCRIBE

if TYPE_CHECKING:
    from flame.protocol.records import ApplicationSpec

LIMIT_S: Final = 120.0
"""How long a command may take: it may have to install something first."""
_SCHEMAS: Final = ("input_schema", "output_schema", "common_data_schema")
_TAIL: Final = 2000
"""How much of what a command wrote is shown if it failed."""


def described(name: str, spec: ApplicationSpec, limit_s: float = LIMIT_S) -> ApplicationSpec:
    """Return an application with the schemas that its service tells of; what the application says itself stays.

    Its command is run with the variable ``FLAME_DESCRIBE`` naming a file: `flame.run` writes the schemas there, as a
    JSON object of ``input_schema``, ``output_schema`` and ``common_data_schema``, and returns. A service in another
    language may do the same.

    Raises:
        ConfigurationError: The command can't be run here, fails, or describes nothing.
    """
    if spec.shim == "Log":
        return spec
    with tempfile.TemporaryDirectory(prefix="flame-describe-") as folder:
        file = Path(folder) / "schemas.json"
        _run(name, spec, folder, file, limit_s)
        try:
            found = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ConfigurationError(
                f"application {name}: its command ended without describing anything: does it come to flame.run?"
            ) from None
        except ValueError as error:
            raise ConfigurationError(f"application {name}: what its command described is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"application {name}: expected a JSON object of schemas, got {str(found)[:60]}")
    given: dict[str, Any] = {field: getattr(spec, field) for field in type(spec).model_fields}
    for field in _SCHEMAS:
        given[field] = given[field] or found.get(field, {})
    return type(spec).check(f"application {name}, as its command describes it", given)


def _run(name: str, spec: ApplicationSpec, folder: str, file: Path, limit_s: float) -> None:
    beside = str(Path(sys.executable).parent)  # as executor managers have it: what belongs to this installation first
    path = os.pathsep.join((beside, os.environ.get("PATH", os.defpath)))
    environment = {**os.environ, "PATH": path, **spec.environments, DESCRIBE: str(file)}
    program = shutil.which(spec.command, path=environment["PATH"])
    if program is None:
        raise ConfigurationError(f"application {name}: its command {spec.command} can't be run here: there is none")
    try:
        done = subprocess.run(
            (program, *spec.arguments),
            cwd=spec.working_directory or folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            check=False,
        )
    except OSError as error:
        raise ConfigurationError(f"application {name}: its command can't be run here: {error}") from None
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"application {name}: its command has described nothing within {limit_s:g} s: does it come to flame.run?"
        ) from None
    if done.returncode:
        wrote = done.stdout.decode(errors="replace").strip()[-_TAIL:]
        raise ConfigurationError(
            f"application {name}: its command ended with status {done.returncode} instead of describing itself"
            + (f"; it wrote:\n{wrote}" if wrote else "")
        )
