"""What an executor manager can be told, and what it finds out about its node."""

from __future__ import annotations

import functools
import os
import platform
import re
import socket
from pathlib import Path
from typing import Annotated, Final

import psutil
from pydantic import AfterValidator, BeforeValidator, Field

from flame.errors import InvalidArgument
from flame.protocol import defaults
from flame.protocol.records import NodeRecord
from flame.protocol.resources import Resources
from flame.protocol.subjects import check_token, to_token
from flame_services.executor_manager.gpus import detect
from flame_services.program import Settings

STOP_TIMEOUT_S: Final = 10.0
TEMPLATE_IDLE_S: Final = 600.0
AUTO: Final = "auto"
NONE: Final = "none"
_DEVICE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-:/.]*", re.ASCII)
_LONGEST_STOP_S: Final = 40.0
"""Ends a stop well before `flame_services.program` takes it for stuck."""


def _node(value: str | None) -> str | None:
    return None if value is None else check_token("node", value)


def _folder(value: Path) -> Path:
    try:
        return value.expanduser().absolute()
    except RuntimeError as error:
        raise InvalidArgument(f"{value}: {error}") from None


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return Resources.parse(f"mem={value}").memory
    except InvalidArgument:
        raise InvalidArgument(f"{value!r} is no amount of memory: expected bytes, such as 512m or 16g") from None


def _gpus(value: object) -> object:
    """Read a count or a list of devices."""
    if not isinstance(value, str | int):
        return value
    text = str(value).strip()
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    if "," not in text and text.isdecimal():
        names = tuple(map(str, range(int(text))))
    if len(set(names)) != len(names) or not all(map(_DEVICE.fullmatch, names)):
        raise InvalidArgument(f"{value!r} names no GPUs: expected how many there are, or which, such as 0,2")
    return names


def _cgroup(value: str) -> str:
    if value in (AUTO, NONE) or (value.startswith("/") and ".." not in value.split("/")):
        return value
    raise InvalidArgument(f"{value!r} is no control group: expected a path such as /flame, {AUTO} or {NONE}")


class ManagerSettings(Settings):
    """What an executor manager can be told."""

    node: Annotated[str | None, AfterValidator(_node)] = Field(
        None, description="the name of this node, which no other has; made of the host's name if not given"
    )
    work_dir: Annotated[Path, AfterValidator(_folder)] = Field(
        Path("~/.flame/node"),
        validate_default=True,
        description="the manager's own folder; no other manager may use it",
    )
    cpu: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="processors to give to executors; detected if not given"
    )
    memory: Annotated[int | None, BeforeValidator(_bytes)] = Field(
        None, gt=0, description="memory to give to executors, such as 16g; detected if not given"
    )
    gpu: Annotated[tuple[str, ...] | None, BeforeValidator(_gpus)] = Field(
        None,
        description="GPUs to give to executors: how many, or which, such as 0,2 (of one: 2,); detected if not given",
    )
    hold_memory: bool = Field(True, description="end executors that use more memory than their session asked for")
    hold_cpu: bool = Field(True, description="hold executors to the processors that their session asked for")
    cgroup: Annotated[str, AfterValidator(_cgroup)] = Field(
        AUTO,
        description="the control group to hold executors in, such as /flame: it must be there, for this manager alone;"
        " auto: the manager's own if that was delegated to it; none: use none",
    )
    ready_timeout_s: float = Field(
        defaults.READY_TIMEOUT_S,
        gt=0,
        allow_inf_nan=False,
        description="how long a service may take to become ready, in seconds",
    )
    enter_timeout_s: float = Field(
        defaults.ENTER_TIMEOUT_S,
        gt=0,
        allow_inf_nan=False,
        description="how long on_session_enter may take, in seconds",
    )
    stop_timeout_s: float = Field(
        STOP_TIMEOUT_S,
        ge=0,
        le=_LONGEST_STOP_S,
        description="how long running tasks may go on when the manager is told to stop, in seconds",
    )
    template_idle_s: float = Field(
        TEMPLATE_IDLE_S,
        ge=0,
        allow_inf_nan=False,
        description="how long the template of an application that nobody uses is kept, in seconds",
    )

    @property
    def node_name(self) -> str:
        """The name given, or one made of the host's."""
        return self.node or to_token(socket.gethostname())

    def capacity(self) -> Resources:
        """Return what executors may have together: what was given, otherwise what the machine has."""
        return Resources(
            cpu=self.cpu or float(_processors()),
            memory=self.memory or int(psutil.virtual_memory().total),
            gpu=len(self.gpus),
        )

    @functools.cached_property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs given, or those that are found the first time that somebody asks."""
        return detect(os.environ) if self.gpu is None else self.gpu


def node_record(settings: ManagerSettings, started: float, *, memory_by: str = "", cpu_by: str = "") -> NodeRecord:
    """Describe this node to the cluster, with how it holds executors to their resources."""
    record = describe_node(settings.node_name, started, settings.capacity())
    return record.changed(memory_by=memory_by, cpu_by=cpu_by)


def describe_node(name: str, started: float, capacity: Resources) -> NodeRecord:
    """Return the record of a node on this machine."""
    return NodeRecord(
        name=name,
        hostname=socket.gethostname(),
        arch=platform.machine(),
        os=platform.system(),
        capacity=capacity,
        started=started,
    )


def _processors() -> int:
    """Count those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count() or 1
