"""What importing a part of Flame costs, and what each part may import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAMS_ONLY = ("typer", "rich", "yaml", "psutil", "uvloop", "numpy", "openai", "argparse")
"""What a client or a service does not need: they come with an extra, or cost time at every start of an executor."""


def _imported_by(statement: str) -> set[str]:
    script = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    modules: list[str] = json.loads(done.stdout)
    return {name.partition(".")[0] for name in modules} | set(modules)


@pytest.mark.parametrize("statement", ["import flame", "import flame.broker.embedded"])
def test_a_client_or_a_service_imports_nothing_of_the_programs(statement: str) -> None:
    assert sorted(_imported_by(statement) & {*PROGRAMS_ONLY, "flame_services", "flame_cli"}) == []


def test_the_protocol_imports_no_io() -> None:
    modules = _imported_by("import flame.protocol.api, flame.protocol.messages, flame.protocol.topology")
    ours = {name for name in modules if name.startswith("flame.")}
    assert ours <= {"flame.errors"} | {name for name in ours if name.startswith(("flame.protocol", "flame.client"))}
