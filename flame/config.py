"""Where the cluster is."""

from __future__ import annotations

import os
from typing import Final

ENDPOINT_VARIABLE: Final = "FLAME_ENDPOINT"
DEFAULT_ENDPOINT: Final = "nats://127.0.0.1:4222"


def resolve_endpoint(endpoint: str | None = None) -> str:
    """Return the given endpoint, otherwise that of the environment, otherwise the local default."""
    return endpoint or os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT
