"""Types are part of the interface: a type checker sees precise ones, and refuses what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKED = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith(("test_", "__")))


@pytest.mark.parametrize("file", CHECKED, ids=lambda path: path.stem)
def test_a_type_checker_agrees_with_every_line(file: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir=.mypy_cache/of-tests", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
