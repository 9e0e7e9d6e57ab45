"""A run and its conditions, and the files that are written of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import flame
from benchmarks.figures import Figure, Peer
from benchmarks.meters import file_system
from flame.broker.embedded import find_nats_server

_PACKAGES: Final = ("nats-py", "uvloop", "msgpack")
SYNC: Final = "nats-server's default of two minutes, but for those that say otherwise"


@dataclass(slots=True, kw_only=True)
class Results:
    """A run."""

    date: str
    quick: bool
    versions: dict[str, str]
    conditions: dict[str, str]
    figures: list[Figure] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Benchmarks that did not work."""

    @property
    def stem(self) -> str:
        """What its files are called."""
        day, _, time = self.date.partition("T")
        return f"{day}-{time[:5].replace(':', '')}{'-quick' if self.quick else ''}"

    def as_json(self) -> str:
        """Return everything."""
        fields: dict[str, Any] = dataclasses.asdict(self)
        for figure, value in zip(self.figures, fields["figures"], strict=True):
            value |= {"ratio": figure.ratio, "met": figure.met}
        return json.dumps(fields, indent=2) + "\n"


def begin(folder: Path, *, quick: bool) -> Results:
    """Take note of the conditions before anything runs."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return Results(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        versions={
            "flame": flame.__version__,
            "commit": _commit(),
            "python": platform.python_version(),
            "nats-server": _server_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        conditions={
            "processors": f"{len(os.sched_getaffinity(0))} ({_processor()})",
            "load at the start (1, 5, 15 min)": load,
            "system": f"{platform.system()} {platform.release()}",
            "storage": f"file, on {file_system(folder)}",
            "sync": SYNC,
        },
    )


def _server_version() -> str:
    said = subprocess.run([find_nats_server(), "--version"], capture_output=True, text=True, check=True)
    return said.stdout.strip().rpartition("v")[2]


def _commit() -> str:
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
