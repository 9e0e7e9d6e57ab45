"""Functions and classes of a program that run in the cluster without being deployed; see `flame.functions`."""

from __future__ import annotations

from typing import Final

APPLICATION: Final = "flmfunc"
"""The built-in application whose sessions run them."""
