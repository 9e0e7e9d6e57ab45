"""`make demo`'s program, from the first line to the last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples" / "agents" / "openai" / "demo.py"


def test_the_demo_runs_an_agent_from_registration_to_answers_and_leaves_nothing_behind() -> None:
    demo = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True, timeout=180, check=False)
    assert demo.returncode == 0, demo.stdout[-3000:] + demo.stderr[-3000:]
    for state in ("pending", "running", "succeed"):
        assert demo.stdout.count(state) >= 4
    assert "$ flmctl list -s" in demo.stdout
    assert "The model's server wrote" in demo.stdout
    assert "All processes have ended." in demo.stdout
