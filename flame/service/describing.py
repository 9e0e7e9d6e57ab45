"""Telling what a service takes and returns, instead of serving: what ``flmctl register --describe`` runs it for."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def describe(service: object, file: str) -> None:
    """Write the JSON schemas of a service into a file, as one JSON object: see `flame.schemas_of`.

    Raises:
        ConfigurationError: A type of it has none.
    """
    typed = sys.modules.get("flame.service.typed")  # where it isn't loaded, no service is a typed one
    schemas = {} if typed is None else typed.schemas_of(service)
    Path(file).write_text(json.dumps(schemas), encoding="utf-8")
