"""What an executor's process is told by the manager that starts it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flame.errors import ConfigurationError
from flame.protocol.subjects import check_token

ENDPOINT: Final = "FLAME_ENDPOINT"
NODE: Final = "FLAME_NODE"
EXECUTOR: Final = "FLAME_EXECUTOR"
LIFETIME_FD: Final = "FLAME_LIFETIME_FD"
TEMPLATE: Final = "FLAME_TEMPLATE"
APPLICATION: Final = "FLAME_APPLICATION"
"""Of a process that no manager has started: what it is to be attached for."""
DESCRIBE: Final = "FLAME_DESCRIBE"
"""Names a file into which the service is to be described, and nothing else to be done."""


@dataclass(frozen=True, slots=True)
class ExecutorEnvironment:
    """Who this process is to its manager."""

    endpoint: str
    node: str
    executor: str
    lifetime_fd: int | None = None
    """When the other end closes, the whole cluster has ended and so must this process."""
    template: str = ""
    """Where to listen for orders to fork executors, if this process can be a template for that; empty: it is not to."""

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> ExecutorEnvironment:
        """Read it from the environment; raise `ConfigurationError` if this process is no executor."""
        missing = [name for name in (ENDPOINT, NODE, EXECUTOR) if not variables.get(name)]
        if missing:
            raise ConfigurationError(
                f"flame.run: {', '.join(missing)} not set: a service is started by an executor manager."
                " Register it with `flmctl register -f FILE` and open a session of it."
                f" To attach this process, set {APPLICATION} to the name under which it is registered"
            )
        lifetime = variables.get(LIFETIME_FD, "")
        return cls(
            variables[ENDPOINT],
            check_token(NODE, variables[NODE]),
            check_token(EXECUTOR, variables[EXECUTOR]),
            int(lifetime) if lifetime.isdigit() else None,
            variables.get(TEMPLATE, ""),
        )
