"""The diagrams in the document of lifecycles are those of the tables."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def diagrams() -> ModuleType:
    spec = importlib.util.spec_from_file_location("diagrams", FOLDER / "diagrams.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_drawn_is_current(diagrams: ModuleType) -> None:
    document = diagrams.DOCUMENT.read_text()
    assert diagrams.drawn(document) == document, "run make docs"


def test_every_table_is_drawn_with_every_move(diagrams: ModuleType) -> None:
    document = diagrams.DOCUMENT.read_text()
    assert set(re.findall(r"<!-- drawn: (\w+) -->", document)) == set(diagrams.TABLES)
    for table in diagrams.TABLES.values():
        for (before, event), after in table.moves.items():
            assert f"| {before.value} | {event.value} | {after.value} |" in document
