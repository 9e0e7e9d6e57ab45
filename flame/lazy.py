"""Names of a package that are loaded when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def load_on_use(package: str, module_of: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return what a package needs for ``__getattr__`` and ``__dir__``.

    Args:
        package: Its name.
        module_of: Which module each of its names comes from.
    """

    def load(name: str) -> Any:
        """Load a name when it is first used."""
        module = module_of.get(name)
        if module is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(module), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        """List what there is, loaded or not."""
        return sorted({*vars(sys.modules[package]), *module_of})

    return load, names
