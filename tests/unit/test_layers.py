"""What a client or a service has to import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FOR_PROGRAMS: set[str] = {"typer", "rich", "yaml", "psutil", "uvloop", "numpy", "openai", "structlog"}
"""What comes with an extra, or costs time at every start of an executor."""


@pytest.mark.parametrize("module", ["flame", "flame.broker.embedded"])
def test_a_client_or_a_service_imports_nothing_that_only_programs_need(module: str) -> None:
    script = f"import json, sys\nimport {module}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    modules: list[str] = json.loads(done.stdout)
    packages = {name.partition(".")[0] for name in modules}
    assert packages & {*FOR_PROGRAMS, "flame_services", "flame_cli"} == set()
    assert "flame" in packages


def test_a_library_stays_silent_and_loads_nothing_to_do_so() -> None:
    script = (
        "import sys\n"
        "from flame.logs import get_logger\n"
        "log = get_logger('flame.part')\n"
        "log.debug('nothing', key=1)\n"
        "log.info('nothing', key=1)\n"
        "assert 'structlog' not in sys.modules\n"
        "log.warning('something', key=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    assert "something" in done.stderr
    assert "nothing" not in done.stderr
