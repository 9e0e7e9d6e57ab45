"""Which import stands for those of an agent."""

from __future__ import annotations

import importlib.util
from typing import Final

_CANDIDATES: Final = ("langchain", "openai", "numpy")


def heavy_import() -> str:
    """Return the heaviest that is installed; nothing is installed for it."""
    for name in _CANDIDATES:
        if importlib.util.find_spec(name) is not None:
            return name
    return "asyncio"
